"""`Rotary`: rotary position embedding as a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from attnkit.arguments import check_choice, check_device, check_int, check_number, check_tensor
from attnkit.attend import is_tracing
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.layouts import check_lengths

__all__ = ["Pairing", "Rotary", "positions"]

Pairing = Literal["half", "interleaved"]

_PAIRINGS = {
    "half": "dimensions c and c + r/2, as in Hugging Face weights",
    "interleaved": "2c and 2c + 1, as in the paper",
}

_FARTHEST = 2**40
_BASES = (1e-30, 1e30)  # beyond, the angles of some pair do not fit into float32


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: pair `c` of a head turns by ``position * base**(-2*c/r)``.

    ``(x, y) -> (x*cos - y*sin, x*sin + y*cos)`` for each of the ``r/2`` pairs among the first
    ``r = rotary_dim`` dimensions of a head (None: all); the others pass unchanged. Two
    conventions exist for which dimensions form pair `c`, and weights trained with one are
    useless with the other, so they are named:

    - ``pairing="half"``: ``(c, c + r/2)``, as in GPT-NeoX and the Llama weights of Hugging Face;
    - ``pairing="interleaved"``: ``(2c, 2c + 1)``, as in the paper, GPT-J and Meta's Llama.

    Raises `CompositionError` for a base that is not from 1e-30 to 1e30, an odd or too large
    `rotary_dim`, or an unknown pairing.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).

    >>> import math, torch
    >>> quarter = Rotary().rotate(torch.tensor([[[1.0, 0.0]]]), torch.tensor([math.pi / 2]))
    >>> quarter.round().tolist()
    [[[-0.0, 1.0]]]
    """

    base: float = 10000.0
    rotary_dim: int | None = None
    pairing: Pairing = "half"

    def __post_init__(self) -> None:
        low, high = _BASES
        check_number("Rotary: base", self.base, lambda b: low <= b <= high, f"from {low} to {high}")
        dim = self.rotary_dim
        if dim is not None and (type(dim) is not int or dim < 2 or dim % 2):
            raise CompositionError(
                f"Rotary: rotary_dim={shown(dim)}; dimensions turn in pairs, so give an even "
                "number, or None for the whole head"
            )
        check_choice("Rotary: pairing", self.pairing, _PAIRINGS)

    def dims(self, head_dim: int) -> int:
        """Return how many dimensions of a head turn; raise where they cannot.

        >>> Rotary(rotary_dim=16).dims(64)
        16
        """
        check_int("head_dim", head_dim, 1)
        dim = head_dim if self.rotary_dim is None else self.rotary_dim
        if dim > head_dim or dim % 2:
            raise CompositionError(
                f"{self}: cannot turn {shown(dim)} dimensions of a head of {shown(head_dim)}; "
                "rotary_dim must be even and at most head_dim"
            )
        return dim

    def rotate(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Return ``... s n d`` turned by the positions ``s`` of its tokens.

        Angles are taken in float32 (float64 for float64 heads): half precision cannot tell
        distant positions apart. The result has the dtype of `heads`.

        Raises `CompositionError` when positions and tokens do not match, `CompositionTypeError`
        for heads that are not floating-point numbers and positions that count nothing.

        >>> turned = Rotary().rotate(torch.ones(2, 5, 3, 8), torch.arange(5))
        >>> turned.shape, bool((turned[:, 0] == 1).all())  # position 0 does not turn
        (torch.Size([2, 5, 3, 8]), True)
        """
        check_tensor("Rotary: heads", heads)
        check_tensor("Rotary: positions", positions)
        if not heads.is_floating_point() or positions.dtype == torch.bool or positions.is_complex():
            raise CompositionTypeError(
                f"Rotary: heads of {heads.dtype} and positions of {positions.dtype}; give "
                "floating-point heads, and positions that are numbers"
            )
        if heads.device != positions.device:
            raise CompositionError(
                f"Rotary: heads on {heads.device}, positions on {positions.device}; move one of "
                "them"
            )
        if heads.ndim < 3 or positions.shape != heads.shape[-3:-2]:
            raise CompositionError(
                f"Rotary: heads {list(heads.shape)} and positions {list(positions.shape)}; give "
                "heads [..., s, n, d] and one position per token, [s]"
            )
        dim = self.dims(heads.shape[-1])
        exact = torch.float64 if heads.dtype == torch.float64 else torch.float32
        pair = torch.arange(0, dim, 2, device=heads.device, dtype=exact)
        angle = positions.to(exact)[:, None, None] * float(self.base) ** (-pair / dim)
        cos, sin = angle.cos(), angle.sin()
        x, y = self._pairs(heads[..., :dim].to(exact))
        turned = self._join(x * cos - y * sin, x * sin + y * cos).to(heads.dtype)
        return turned if dim == heads.shape[-1] else torch.cat((turned, heads[..., dim:]), dim=-1)

    def _pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.pairing == "interleaved":
            return x[..., 0::2], x[..., 1::2]
        half = x.shape[-1] // 2
        return x[..., :half], x[..., half:]

    def _join(self, x: Tensor, y: Tensor) -> Tensor:
        if self.pairing == "interleaved":
            return torch.stack((x, y), dim=-1).flatten(-2)
        return torch.cat((x, y), dim=-1)


def positions(
    lengths: Sequence[int], offset: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """Return the position of every token: each sequence counts from `offset`.

    Raises `CompositionError` for what is no length, offset or device.

    >>> positions([2, 3]).tolist()
    [0, 1, 0, 1, 2]
    """
    if not is_tracing():
        lengths = check_lengths("positions: lengths", lengths)
        check_int("positions: offset", offset, None)
        if abs(offset) > _FARTHEST or sum(lengths) > _FARTHEST:
            raise CompositionError(
                f"positions: {shown(sum(lengths))} tokens from {shown(offset)} on; a position is a "
                "64-bit number"
            )
        if not isinstance(device, torch.device):  # one that exists
            check_device(device)
    if len(lengths) == 1:
        return torch.arange(offset, offset + lengths[0], device=device)
    # Built on the host: one copy to the device instead of one launch per sequence.
    total = sum(lengths)
    starts = torch.tensor(list(accumulate(lengths, initial=-offset))[:-1])
    first = torch.repeat_interleave(starts, torch.tensor(lengths), output_size=total)
    return (torch.arange(total) - first).to(device=device, non_blocking=True)
