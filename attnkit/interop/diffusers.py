"""attnkit among the attention backends of diffusers (read and tested with 0.42.1).

Models of diffusers that have an attention dispatcher (Flux, Wan, HunyuanVideo, Qwen-Image and most
others) name their backend; this file adds the name "attnkit". Others, the UNets among them, call
torch's `scaled_dot_product_attention`: `attnkit.interop.torch.routed` computes these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn

from attnkit.display import Told
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.interop.torch.sdpa import scaled_dot_product_attention

__all__ = ["NAME", "Dispatched", "attend", "enable", "register"]

NAME = "attnkit"


def register() -> str:
    """Make "attnkit" a name of diffusers' attention backends, and return it.

    After it ``model.set_attention_backend("attnkit")`` and ``attention_backend("attnkit")`` work,
    as they do for diffusers' own. Their names are a closed enumeration, which gets one member more;
    no entry of another backend changes. Doing it again changes nothing.

    >>> register()
    'attnkit'
    """
    if NAME not in AttentionBackendName._value2member_map_:
        member = str.__new__(AttentionBackendName, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        AttentionBackendName._member_names_.append(NAME.upper())
        AttentionBackendName._member_map_[NAME.upper()] = member
        AttentionBackendName._value2member_map_[NAME] = member
    name = AttentionBackendName(NAME)
    _AttentionBackendRegistry.register(name)(attend)
    # What a function does not name, the dispatcher drops without a word: this one is given all.
    _AttentionBackendRegistry._supported_arg_names[name] = _All()
    return NAME


class _All(set[str]):
    """The names of all arguments."""

    def __contains__(self, name: object) -> bool:
        return True

    def __rsub__(self, names: object) -> set[str]:
        return set()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: object = None,
    **unknown: object,
) -> Tensor:
    """Attend as diffusers' dispatcher asks for it: tensors ``[b s n d]``, masks as in torch.

    A mask ``[b kv_len]`` says which keys exist. What the dispatcher hands on besides is an error:
    log-sum-exps, context parallelism, and any name that is not above.
    """
    if return_lse or _parallel_config is not None:
        raise CompositionError(
            "diffusers asks for log-sum-exps or context parallelism (return_lse, "
            "_parallel_config), which this backend does not compute; use one of its own"
        )
    given = [name for name, value in unknown.items() if value is not None]
    if given:
        raise CompositionError(
            f"diffusers hands {', '.join(map(shown, given))} to the attention backend, which are "
            "arguments of one of its own backends; leave them out of attention_kwargs"
        )
    if attn_mask is not None and attn_mask.shape == (len(query), key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return output.transpose(1, 2)


@dataclass(frozen=True)
class Dispatched(Told):
    """What `enable` did: the attention modules that ask attnkit, and those that cannot, and why."""

    switched: tuple[str, ...]
    left: Mapping[str, str]
    _before: tuple[tuple[Any, Any], ...] = field(repr=False)

    def undo(self) -> None:
        """Let every processor ask for the backend that it asked for before."""
        for processor, backend in self._before:
            processor._attention_backend = backend

    def __str__(self) -> str:
        lines = [f"{len(self.switched)} attention modules dispatch to attnkit"]
        lines += [f"left as it is: {name}, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def enable(model: nn.Module) -> Dispatched:
    """Have every attention module of a model that dispatches ask for attnkit.

    A pipeline's model is its part: ``enable(pipe.transformer)``. Only this model changes, where
    `set_attention_backend` of diffusers changes the default of all others, too. Raises
    `CompositionError` where no module dispatches.
    """
    if not isinstance(model, nn.Module):
        raise CompositionTypeError(
            f"enable got {shown(model)}; give a model, of a pipeline its part (pipe.transformer)"
        )
    found, left = {}, {}
    for name, processor in _processors(model):
        if hasattr(processor, "_attention_backend"):
            found[name] = processor
        else:
            left[name] = f"{type(processor).__name__} does not dispatch"
    if not found:
        kinds = sorted(set(left.values()))
        raise CompositionError(
            f"{type(model).__name__} has no attention module that asks diffusers' dispatcher "
            f"({'; '.join(kinds) or 'none at all'}); run it inside of "
            "attnkit.interop.torch.routed(), which computes calls of torch's attention"
        )
    register()
    before = tuple((one, one._attention_backend) for one in found.values())
    for processor in found.values():
        processor._attention_backend = AttentionBackendName(NAME)
    return Dispatched(tuple(found), left, before)


def _processors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        processor = getattr(module, "processor", None)
        if processor is not None:
            yield name, processor
