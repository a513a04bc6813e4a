"""What stands between tokens and heads: projections, their norms, and what they may be given."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from attnkit.arguments import check_choice, check_device, check_float_dtype, check_int
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.rotary import Rotary

__all__ = [
    "Norm",
    "Projections",
    "axis",
    "computed_like",
    "gate_size",
    "head_size",
    "heads_of",
    "rotary_of",
]

Norm: TypeAlias = str | Callable[[int], nn.Module] | None
"""A norm of queries or keys: one of `NORMS`, or what makes a module for heads ``[..., n, d]``."""

_GATES = {"head": "one number for each head", "elementwise": "one for each of its dimensions"}
_WIDEST = 2**31 - 1


class _WholeRMS(nn.RMSNorm):
    """RMSNorm over all heads together."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).view(x.shape)


NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "rms": lambda count, size: nn.RMSNorm(size, eps=1e-6),
    "layer": lambda count, size: nn.LayerNorm(size),
    "rms_whole": lambda count, size: _WholeRMS(count * size, eps=1e-6),
}
"""Norms of queries and keys by name, made for a number of heads and their size."""


@dataclass(frozen=True)
class Projections:
    """How the parts of a layer are made: which projections have a bias, on which device.

    >>> Projections.of({"q"}, ("q", "k"), None, None).linear("q", 8, 4)
    Linear(in_features=8, out_features=4, bias=True)
    """

    biased: frozenset[str]
    device: torch.device | str | None
    dtype: torch.dtype | None

    @staticmethod
    def of(
        bias: bool | Collection[str],
        names: Collection[str],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> Projections:
        """Check what a layer is given, for projections of these names."""
        if isinstance(bias, bool):
            bias = frozenset(names if bias else ())
        if not isinstance(bias, set | frozenset | list | tuple):
            raise CompositionTypeError(
                f"bias={shown(bias)}; it is True or False, for all projections, or the set of "
                "those that have one, such as {'q', 'k', 'v'} (a bias on the scores is pse=)"
            )
        if not all(isinstance(name, str) and name in names for name in bias):
            raise CompositionError(f"bias={shown(bias)}; the projections are {', '.join(names)}")
        check_device(device)
        if dtype is not None:
            check_float_dtype("dtype", dtype)
        return Projections(frozenset(bias), device, dtype)

    def linear(self, name: str, width: int, out: int) -> nn.Linear:
        """Return a projection."""
        try:
            return nn.Linear(width, out, name in self.biased, self.device, self.dtype)
        except RuntimeError as error:
            raise CompositionError(
                f"{name}_proj has {width:,} x {out:,} weights, for which there is no memory; give "
                "fewer or smaller heads"
            ) from error

    def own(self, count: int, size: int) -> nn.Parameter:
        """Return a key or a value for each head that follows from no token."""
        made = torch.empty(count, size, device=self.device, dtype=self.dtype)
        return nn.Parameter(nn.init.xavier_normal_(made))

    def norm(self, kind: Norm, count: int, size: int) -> nn.Module | None:
        """Return a norm for that many heads of a size."""
        if kind is None:
            return None
        made: Any = None
        if isinstance(kind, str) and kind in NORMS:
            made = NORMS[kind](count, size)
        elif callable(kind):
            made = kind(size)
        if not isinstance(made, nn.Module):
            raise CompositionTypeError(
                f"qk_norm={shown(kind)}; give one of {', '.join(NORMS)}, or a function that makes "
                "a module for heads of a size, such as nn.RMSNorm"
            )
        return made.to(device=self.device, dtype=self.dtype)


def axis(name: str, value: int) -> int:
    """Return the extent of an axis, if it can be one."""
    return check_int(name, value, 1, _WIDEST)


def head_size(dim: int, num_heads: int, head_dim: int | None) -> int:
    """Return the extent of a head."""
    if head_dim is not None:
        return axis("head_dim", head_dim)
    if dim % num_heads:
        raise CompositionError(
            f"dim={dim} does not divide into num_heads={num_heads} heads; change one of them, or "
            "give head_dim="
        )
    return dim // num_heads


def gate_size(gate: object, v_head_dim: int) -> int:
    """Return how many numbers the gate has for each head."""
    if gate is None:
        return 0
    return 1 if check_choice("gate", gate, _GATES) == "head" else v_head_dim


def rotary_of(given: bool | Rotary, head_dim: int) -> Rotary | None:
    """Return the rotary positions of heads of a size."""
    if not isinstance(given, (bool, Rotary)):
        raise CompositionTypeError(f"rotary={shown(given)}; give True, False or a Rotary")
    rotary = given if isinstance(given, Rotary) else Rotary() if given else None
    if rotary is not None:
        rotary.dims(head_dim)
    return rotary


def heads_of(
    projection: nn.Module, norm: nn.Module | None, source: Tensor, count: int, size: int
) -> Tensor:
    """Return the heads ``[..., n, d]`` of tokens, whatever module projects them."""
    flat = projection(source)
    if not isinstance(flat, Tensor) or flat.shape != (*source.shape[:-1], count * size):
        raise CompositionError(
            f"{shown(projection)} returned {shown(flat)} for {shown(source)}; {count} heads of "
            f"{size} take [..., {count * size}] (their sizes are head_dim= and v_head_dim=)"
        )
    heads = flat.reshape(*source.shape[:-1], count, size)
    # Under autocast a norm may answer in float32, and attention takes one dtype.
    return heads if norm is None else norm(heads).to(heads.dtype)


def computed_like(
    projection: nn.Module, norm: nn.Module | None, source: Tensor, count: int, size: int
) -> Tensor:
    """Return a tensor with the properties of `heads_of`, and no data; nothing is projected.

    A projection is taken to answer in the dtype that it is given (that of autocast, under it).
    """
    kind = source.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else source.dtype
    weights = [p for part in (projection, norm) if part is not None for p in part.parameters()]
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in [source, *weights])
    cell = torch.empty(1, dtype=dtype, device=source.device).requires_grad_(grad)
    return cell.expand(*source.shape[:-1], count, size)
