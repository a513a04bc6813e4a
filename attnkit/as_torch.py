"""`AsTorch`: layers from `nn.MultiheadAttention`, and back."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from attnkit.arguments import check_bool
from attnkit.attention import Attention
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.masks import Full, Mask
from attnkit.pse import Pse
from attnkit.rotary import Rotary

__all__ = ["AsTorch"]

Self = TypeVar("Self", bound="AsTorch")

_THREE = ("q", "k", "v")


class AsTorch(nn.Module):
    """What a layer of attnkit has in common with torch's, and where they part."""

    attention: Attention
    dim: int
    kv_dim: int
    v_dim: int
    v_head_dim: int
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    gate_proj: nn.Module | None
    rotary: Rotary | None
    extra_k: nn.Parameter | None
    extra_v: nn.Parameter | None

    @classmethod
    def from_torch(
        cls: type[Self],
        source: nn.MultiheadAttention,
        *,
        mask: Mask | None = None,
        pse: Pse | None = None,
        backend: str = "auto",
    ) -> Self:
        """Return a layer with copies of the parameters of an `nn.MultiheadAttention`.

        Packed and separate projections, their biases, `kdim` and `vdim` (`kv_dim`, `v_dim`),
        `add_bias_kv` (`extra_key`), `add_zero_attn` (a sink that stays 0), dropout, the mode,
        dtype and device, and which parameters train. Tokens are ``[b s dim]`` here whatever
        `batch_first` says there. Masks go to torch's with each call; here the layer knows its own.
        (For models that go on calling it as torch does: `attnkit.interop.torch.replace`.)

        >>> import torch
        >>> from attnkit import masks
        >>> from attnkit.modules import MultiHeadAttention
        >>> theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        >>> ours = MultiHeadAttention.from_torch(theirs, mask=masks.Causal())
        >>> x, later = torch.randn(2, 5, 16), torch.ones(5, 5).triu(1).bool()
        >>> torch.allclose(ours(x), theirs(x, x, x, attn_mask=later)[0], atol=1e-6)
        True
        """
        if not isinstance(source, nn.MultiheadAttention):
            raise CompositionTypeError(f"from_torch got {shown(source)}; give a MultiheadAttention")
        has_bias: Tensor | None = source.in_proj_bias
        biased = {*_THREE} if has_bias is not None else set()
        if source.out_proj.bias is not None:
            biased.add("out")
        arguments: dict[str, Any] = {
            "kv_dim": source.kdim,
            "v_dim": source.vdim,
            "bias": biased,
            "extra_key": source.bias_k is not None,
            "dropout": source.dropout,
            "sink": bool(source.add_zero_attn),
            "device": source.out_proj.weight.device,
            "dtype": source.out_proj.weight.dtype,
        }
        given = {"mask": mask, "pse": pse, "backend": backend}
        layer = cls(source.embed_dim, source.num_heads, **arguments, **given)
        for ours, theirs, trains in layer._paired(source):
            with torch.no_grad():
                ours.copy_(theirs.view(ours.shape))
            ours.requires_grad_(trains)
        if layer.attention.sink is not None:
            layer.attention.sink.requires_grad_(False)
        return layer.train(source.training)

    def to_torch(self, *, batch_first: bool = True) -> nn.MultiheadAttention:
        """Return an `nn.MultiheadAttention` with copies of this layer's parameters.

        Masks are given to it with each call, so that the layer must have none of its own. A bias
        that only some of q, k and v have is 0 in the others. Raises `CompositionError` with
        all that torch's module has no place for.

        >>> from attnkit.modules import MultiHeadAttention
        >>> MultiHeadAttention(16, 2, num_kv_heads=1, rotary=True).to_torch()
        Traceback (most recent call last):
        ...
        attnkit.errors.CompositionError: nn.MultiheadAttention has no num_kv_heads=1, no rotary
        """
        check_bool("batch_first", batch_first)
        foreign = self._beyond()
        if foreign:
            raise CompositionError(f"nn.MultiheadAttention has no {', no '.join(foreign)}")
        core, projections = self.attention, self._linears()
        biased = {name: projections[name].bias is not None for name in (*_THREE, "out")}
        weight = projections["out"].weight
        made = nn.MultiheadAttention(
            self.dim,
            core.num_heads,
            core.composition.dropout,
            bias=any(biased.values()),
            add_bias_kv=self.extra_k is not None,
            add_zero_attn=core.sink is not None,
            kdim=self.kv_dim,
            vdim=self.v_dim,
            batch_first=batch_first,
            device=weight.device,
            dtype=weight.dtype,
        )
        if not any(biased[name] for name in _THREE):
            made.register_parameter("in_proj_bias", None)
        if not biased["out"]:
            made.out_proj.register_parameter("bias", None)
        for ours, theirs, _ in self._paired(made):
            with torch.no_grad():
                theirs.copy_(ours.view(theirs.shape))
        return made.train(self.training)

    def _linears(self) -> dict[str, Any]:
        return {name: getattr(self, f"{name}_proj") for name in (*_THREE, "out")}

    def _paired(self, other: nn.MultiheadAttention) -> list[tuple[Tensor, Tensor, bool]]:
        """Return (ours, theirs, whether theirs trains) for every tensor that both have."""
        packed: Tensor | None = other.in_proj_weight
        biases: Tensor | None = other.in_proj_bias
        found: list[tuple[Tensor | None, Tensor | None, bool]] = []
        for k, (name, linear) in enumerate(self._linears().items()):
            weight: Tensor | None
            bias: Tensor | None
            weight, bias = other.out_proj.weight, other.out_proj.bias
            trains = [one is not None and one.requires_grad for one in (weight, bias)]
            if name != "out":
                whole = getattr(other, f"{name}_proj_weight") if packed is None else packed
                weight = whole if packed is None else packed.chunk(3)[k]
                bias = None if biases is None else biases.chunk(3)[k]
                trains = [whole.requires_grad, biases is not None and biases.requires_grad]
            found += zip((linear.weight, linear.bias), (weight, bias), trains, strict=True)
        for ours, bias in ((self.extra_k, other.bias_k), (self.extra_v, other.bias_v)):
            found.append((ours, bias, bias is not None and bias.requires_grad))
        return [(a, b, trains) for a, b, trains in found if a is not None and b is not None]

    def _beyond(self) -> list[str]:
        """Return what this layer has and torch's has not."""
        core, composed = self.attention, self.attention.composition
        sizes = core.num_heads * core.head_dim == self.dim
        zero = core.sink is None or not (core.sink.requires_grad or bool(core.sink.any()))
        beyond = {
            f"num_kv_heads={core.num_kv_heads}": core.num_kv_heads != core.num_heads,
            f"head_dim={core.head_dim}": not sizes,
            f"v_head_dim={self.v_head_dim}": self.v_head_dim != core.head_dim,
            "norm of queries or keys": self.q_norm is not None or self.k_norm is not None,
            "gate": self.gate_proj is not None,
            "rotary": self.rotary is not None,
            f"mask={composed.mask!r} of its own (give it with each call)": composed.mask != Full(),
            "bias on scores of its own (give it as attn_mask)": composed.pse is not None,
            f"scale={composed.scale}": composed.scale not in (None, core.head_dim**-0.5),
            "softcap": composed.softcap is not None,
            "score_fn": composed.score_fn is not None,
            "sink that is learned": not zero,
            "projection but nn.Linear": not all(
                isinstance(one, nn.Linear) for one in self._linears().values()
            ),
        }
        return [name for name, there in beyond.items() if there]
