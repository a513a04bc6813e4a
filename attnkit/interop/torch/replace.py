"""`replace`: the attention of every `nn.MultiheadAttention` in a model, in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from attnkit.arguments import check_bool
from attnkit.display import Told
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.interop.torch.multihead import MultiheadAttention

__all__ = ["Replaced", "replace"]

_THEIRS = nn.MultiheadAttention


@dataclass(frozen=True)
class Replaced(Told):
    """What `replace` did to a model.

    `switched` names the modules that attnkit computes, `flattened` the encoders that hand on
    padded tensors now where they made nested ones, `left` those that stay, with the reason.
    """

    model: nn.Module = field(repr=False)
    switched: tuple[str, ...]
    flattened: tuple[str, ...]
    left: Mapping[str, str]

    def undo(self) -> None:
        """Give every module back what it was; its parameters stay those that it has now."""
        modules = dict(self.model.named_modules())
        for name in self.switched:
            module = modules[name]
            module.__class__ = _THEIRS
            module._qkv_same_embed_dim = module.in_proj_weight is not None
            module.__dict__.pop("weights_wanted", None)
        for name in self.flattened:
            modules[name].use_nested_tensor = True

    def __str__(self) -> str:
        lines = [f"{len(self.switched)} nn.MultiheadAttention run on attnkit"]
        lines += [f"  {name or 'the model itself'}" for name in self.switched]
        if self.flattened:
            lines.append(f"{len(self.flattened)} encoders make no nested tensors any more")
        lines += [f"left as it is: {name}, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def replace(model: nn.Module, *, weights: bool = True) -> Replaced:
    """Have attnkit compute every `nn.MultiheadAttention` in a model, in place.

    Also those inside of `nn.TransformerEncoderLayer`, `nn.TransformerDecoderLayer` and
    `nn.Transformer`. Each module stays the object that it is, with its parameters, hooks and
    place; it becomes a `MultiheadAttention`, so that state dicts, optimizers and checkpoints are
    what they were. Encoder layers call it in inference too, where they would run one operator of
    torch's instead, and encoders no longer make nested tensors of padded ones.

    `weights`: False says that nobody looks at the attention weights. torch returns them by default
    (`need_weights`), and computing them is slow; modules then return None in their place.

    Subclasses with a forward of their own stay, and are told. Raises `CompositionError` where
    nothing was found to switch.

    >>> import torch
    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 2)
    >>> print(replace(model))
    2 nn.MultiheadAttention run on attnkit
      layers.0.self_attn
      layers.1.self_attn
    1 encoders make no nested tensors any more
    """
    if not isinstance(model, nn.Module):
        raise CompositionTypeError(f"replace got {shown(model)}; give an nn.Module")
    check_bool("weights", weights, "whether calls that ask for attention weights get them")
    switched, flattened, left = [], [], {}
    for name, module in model.named_modules():
        if type(module) is _THEIRS:
            switched.append(name)
        elif isinstance(module, _THEIRS) and not isinstance(module, MultiheadAttention):
            left[name] = f"{type(module).__qualname__} is a class of its own"
        elif getattr(module, "use_nested_tensor", False) and isinstance(
            module, nn.TransformerEncoder
        ):
            flattened.append(name)
    if not switched:
        told = "; ".join(f"{name}: {why}" for name, why in left.items())
        raise CompositionError(
            f"nothing to switch in {type(model).__name__}: it holds no nn.MultiheadAttention that "
            f"is not switched yet{f' ({told})' if told else ''}; calls of "
            "F.scaled_dot_product_attention are routed by attnkit.interop.torch.routed"
        )
    modules = dict(model.named_modules())
    for name in switched:
        module = modules[name]
        module.__class__ = MultiheadAttention
        module.called_by_layers()
        if not weights:
            module.weights_wanted = False
    for name in flattened:
        modules[name].use_nested_tensor = False
    return Replaced(model, tuple(switched), tuple(flattened), left)
