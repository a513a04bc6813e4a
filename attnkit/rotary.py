"""`Rotary`: rotary position embedding as a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from attnkit.arguments import check_choice, check_device, check_int, check_number, check_tensor
from attnkit.attend import is_exporting, is_tracing
from attnkit.constants import constant
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.handles import told
from attnkit.layouts import SeqLens, check_lengths
from attnkit.scaling import Dynamic, Interpolation, Llama3, Scaling, YaRN

__all__ = [
    "Dynamic",
    "Interpolation",
    "Llama3",
    "Order",
    "Pairing",
    "Rotary",
    "Scaling",
    "YaRN",
    "positions",
    "positions_in_each",
]

Pairing = Literal["half", "interleaved"]
Order = Literal["blocks", "interleaved", "axial"]

_PAIRINGS = {
    "half": "dimensions c and c + r/2, as in Hugging Face weights",
    "interleaved": "2c and 2c + 1, as in the paper",
}
_ORDERS = {
    "blocks": "the first pairs are the first axis's",
    "interleaved": "the axes take turns",
    "axial": "blocks, each with its own count of pairs",
}

_FARTHEST = 2**40
_MOST_PAIRS = 2**20
_BASES = (1e-30, 1e30)  # beyond, the angles of some pair do not fit into float32


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: pair `c` of a head turns by ``position * base**(-2*c/r)``.

    ``(x, y) -> (x*cos - y*sin, x*sin + y*cos)`` for each of the ``r/2`` pairs among the first
    ``r = rotary_dim`` dimensions of a head (None: all; a float such as 0.25: this part of the
    head); the others pass unchanged. Two conventions exist for which dimensions form pair `c`,
    and weights trained with one are useless with the other, so they are named:

    - ``pairing="half"``: ``(c, c + r/2)``, as in GPT-NeoX and the Llama weights of Hugging Face;
    - ``pairing="interleaved"``: ``(2c, 2c + 1)``, as in the paper, GPT-J and Meta's Llama.

    `scaling` turns the pairs of texts that are longer than those of the training: `Interpolation`,
    `Llama3`, `YaRN`, `Dynamic`.

    `sections` are for positions of several axes (time, height, width): how many pairs each axis
    turns. `order` says which pairs, and how fast:

    - ``order="blocks"``: the first pairs are the first axis's, ... (M-RoPE of Qwen2-VL);
    - ``order="interleaved"``: the axes take turns, what remains is the first's (Qwen3-VL);
    - ``order="axial"``: blocks, in each of which `c` counts from 0 and `r` is twice its pairs, so
      that all axes turn alike (2-D positions of a ViT, FLUX).

    Raises `CompositionError` for a base that is not from 1e-30 to 1e30, an odd or too large
    `rotary_dim`, an unknown pairing or order, and sections that are not the pairs of a head.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).

    >>> import math, torch
    >>> quarter = Rotary().rotate(torch.tensor([[[1.0, 0.0]]]), torch.tensor([math.pi / 2]))
    >>> quarter.round().tolist()
    [[[-0.0, 1.0]]]
    >>> qwen3 = Rotary(1e6, scaling=YaRN(4.0, original_max_position_embeddings=32768))
    >>> qwen2_vl = Rotary(1e6, sections=(16, 24, 24))
    >>> where = torch.tensor([[0, 1, 1], [0, 0, 0], [0, 0, 1]])  # time, height, width
    >>> qwen2_vl.rotate(torch.ones(3, 2, 128), where).shape
    torch.Size([3, 2, 128])
    """

    base: float = 10000.0
    rotary_dim: int | float | None = None
    pairing: Pairing = "half"
    scaling: Scaling | None = None
    sections: tuple[int, ...] | None = None
    order: Order = "blocks"

    def __post_init__(self) -> None:
        low, high = _BASES
        check_number("Rotary: base", self.base, lambda b: low <= b <= high, f"from {low} to {high}")
        dim = self.rotary_dim
        part = isinstance(dim, float) and 0 < dim <= 1
        if not part and dim is not None and (type(dim) is not int or dim < 2 or dim % 2):
            raise CompositionError(
                f"Rotary: rotary_dim={shown(dim)}; dimensions turn in pairs, so give an even "
                "number, a part of the head such as 0.25, or None for the whole head"
            )
        check_choice("Rotary: pairing", self.pairing, _PAIRINGS)
        self._check_scaling()
        self._check_sections()

    def _check_scaling(self) -> None:
        if not isinstance(self.scaling, Scaling | None):
            raise CompositionTypeError(
                f"Rotary: scaling={shown(self.scaling)}; give an Interpolation, Llama3, YaRN or "
                "Dynamic of attnkit.rotary, or None"
            )
        if self.scaling is not None and self.base <= 1:
            raise CompositionError(f"{self}: a scaling takes a base above 1")

    def _check_sections(self) -> None:
        order, given = check_choice("Rotary: order", self.order, _ORDERS), self.sections
        if given is None and order == "blocks":
            return
        counts = isinstance(given, tuple | list) and all(type(n) is int and n > 0 for n in given)
        if given is None or not counts or len(given) < 2 or sum(given) > _MOST_PAIRS:
            raise CompositionError(
                f"Rotary: sections={shown(given)}, order={order!r}; give for each of two or more "
                "axes how many pairs it turns, such as (16, 24, 24)"
            )
        object.__setattr__(self, "sections", tuple(given))
        if any(self._axes().count(axis) != n for axis, n in enumerate(given)):
            raise CompositionError(
                f"Rotary: sections={given} cannot take turns; the first must be the largest, or "
                "choose order='blocks'"
            )
        if self.scaling is not None and self.scaling._by_length:
            raise CompositionError(f"{self}: {self.scaling} follows the length of one axis")

    def dims(self, head_dim: int) -> int:
        """Return how many dimensions of a head turn; raise where they cannot.

        >>> Rotary(rotary_dim=16).dims(64), Rotary(rotary_dim=0.5).dims(64)
        (16, 32)
        """
        check_int("head_dim", head_dim, 1)
        given = head_dim if self.rotary_dim is None else self.rotary_dim
        dim = int(given * head_dim) if isinstance(given, float) else given
        if dim > head_dim or dim % 2 or not dim:
            raise CompositionError(
                f"{self}: cannot turn {shown(dim)} dimensions of a head of {shown(head_dim)}; "
                "rotary_dim must be even and at most head_dim"
            )
        if self.sections is not None and 2 * sum(self.sections) != dim:
            raise CompositionError(
                f"{self}: the sections are of {sum(self.sections)} pairs, and {dim} dimensions "
                f"of a head of {head_dim} turn, which are {dim // 2} pairs"
            )
        return dim

    def check_positions(self, positions: Tensor, tokens: Sequence[int]) -> None:
        """Raise `CompositionError` unless positions are for tokens ``[..., s]``.

        One for each token, ``[s]`` (of every text) or ``[..., s]``; with sections one along each
        axis, ``[a, s]`` or ``[a, ..., s]``, or ``[s]`` where they are the same along all.

        >>> Rotary().check_positions(torch.zeros(2, 5), (2, 5))
        >>> Rotary(sections=(1, 1, 2)).check_positions(torch.zeros(3, 2, 5), (2, 5))
        """
        check_tensor("Rotary: positions", positions)
        if positions.dtype == torch.bool or positions.is_complex():
            raise CompositionTypeError(
                f"Rotary: positions of {positions.dtype}; give positions that are numbers"
            )
        axes = () if self.sections is None else (len(self.sections),)
        last, all_of = (*axes, *tokens[-1:]), (*axes, *tokens)
        if tuple(positions.shape) not in (tuple(tokens[-1:]), last, all_of):
            told = "" if not axes else f" along each of {axes[0]} axes, [{axes[0]}, s]"
            raise CompositionError(
                f"Rotary: positions {list(positions.shape)} for tokens {list(tokens)}; give one "
                f"position per token{told or ', [s]'}, or {list(all_of)}"
            )

    def rotate(self, heads: Tensor, positions: Tensor, longest: Tensor | None = None) -> Tensor:
        """Return ``... s n d`` turned by the positions of its tokens (`check_positions`).

        `longest` is the last position of the longest text plus 1, where tokens are only a part of
        it (`Dynamic` turns by it), in a tensor.

        Angles are taken in float32 (float64 for float64 heads): half precision cannot tell
        distant positions apart. The result has the dtype of `heads`.

        Raises `CompositionError` when positions and tokens do not match, `CompositionTypeError`
        for heads that are not floating-point numbers and positions that count nothing.

        >>> turned = Rotary().rotate(torch.ones(2, 5, 3, 8), torch.arange(5))
        >>> turned.shape, bool((turned[:, 0] == 1).all())  # position 0 does not turn
        (torch.Size([2, 5, 3, 8]), True)
        """
        check_tensor("Rotary: heads", heads)
        if not heads.is_floating_point():
            raise CompositionTypeError(f"Rotary: heads of {heads.dtype}; give floating-point heads")
        if heads.ndim < 3:
            raise CompositionError(f"Rotary: heads {list(heads.shape)}; give heads [..., s, n, d]")
        self.check_positions(positions, heads.shape[:-2])
        if heads.device != positions.device:
            raise CompositionError(
                f"Rotary: heads on {heads.device}, positions on {positions.device}; move one of "
                "them"
            )
        dim = self.dims(heads.shape[-1])
        exact = torch.float64 if heads.dtype == torch.float64 else torch.float32
        cos, sin = self._cos_sin(positions, dim, exact, longest)
        # One axis counts the pairs, the other the two of each.
        ends, two = ((-1, 2), -1) if self.pairing == "interleaved" else ((2, -1), -2)
        x, y = torch.unflatten(heads[..., :dim].to(exact), -1, ends).unbind(two)
        turned = torch.stack((x * cos - y * sin, x * sin + y * cos), dim=two).flatten(-2)
        turned = turned.to(heads.dtype)
        return turned if dim == heads.shape[-1] else torch.cat((turned, heads[..., dim:]), dim=-1)

    def _cos_sin(
        self, positions: Tensor, dim: int, exact: torch.dtype, longest: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return cos and sin ``[..., s, 1, r/2]`` of the angle of every pair, scaled."""
        turns = _turns(self, dim, exact, positions.device)
        where, scaling = positions.to(exact), self.scaling
        if scaling is not None and scaling._by_length and positions.numel():
            longest = positions.amax() + 1 if longest is None else longest
            turns = scaling._scaled(turns, self.base, longest)
        if self.sections is not None and where.ndim > 1:
            axes = _axes(self, positions.device)
            angle = where.movedim(0, -1).index_select(-1, axes) * turns
        else:
            angle = where[..., None] * turns
        size = 1.0 if scaling is None else scaling._size
        return size * angle.cos()[..., None, :], size * angle.sin()[..., None, :]

    def _axes(self) -> list[int]:
        """Return the axis that turns each pair."""
        sections = self.sections or ()
        if self.order != "interleaved":
            return [axis for axis, n in enumerate(sections) for _ in range(n)]
        count = len(sections)
        return [c % count if c < count * sections[c % count] else 0 for c in range(sum(sections))]


@constant
def _turns(rotary: Rotary, dim: int, exact: torch.dtype, device: torch.device) -> Tensor:
    """Return what each pair turns by for one position, in a text of the original length."""
    sections = rotary.sections if rotary.order == "axial" else None
    parts = []
    for size in [dim] if sections is None else [2 * n for n in sections]:
        pairs = torch.arange(0, size, 2, device=device, dtype=exact)
        turns = float(rotary.base) ** (-pairs / size)
        scaling = rotary.scaling
        parts.append(turns if scaling is None else scaling._scaled(turns, rotary.base, None))
    return torch.cat(parts)


@constant
def _axes(rotary: Rotary, device: torch.device) -> Tensor:
    return torch.tensor(rotary._axes(), device=device)


def positions(
    lengths: Sequence[int], offset: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """Return the position of every token: each sequence counts from `offset`.

    Raises `CompositionError` for what is not a length, an offset or a device.

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


def positions_in_each(seqlens: SeqLens, tokens: int, device: torch.device) -> Tensor:
    """Return the position of every token of a packed batch, in its own sequence.

    In a graph the lengths are data, and only the number of all tokens is known.

    >>> from attnkit import SeqLens
    >>> positions_in_each(SeqLens([2, 3]), 5, torch.device("cpu")).tolist()
    [0, 1, 0, 1, 2]
    """
    if is_tracing() and not is_exporting():
        found: Tensor = _positions(seqlens._handle, tokens, device)
        return found
    return positions(seqlens.q, 0, device)


def _counted(lengths: Tensor, tokens: int, device: torch.device) -> Tensor:
    seqlens: SeqLens = told(lengths)
    seqlens.check_totals(tokens, seqlens.total_kv)
    return positions(seqlens.q, 0, device)


_positions = torch.library.custom_op(
    "attnkit::positions",
    _counted,
    mutates_args=(),
    schema="(Tensor lengths, SymInt tokens, Device device) -> Tensor",
)
_positions.register_fake(
    lambda lengths, tokens, device: torch.empty(tokens, dtype=torch.int64, device=device)
)
