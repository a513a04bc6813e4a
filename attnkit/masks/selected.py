"""`SelectedBlocks`: blocks of keys that a model selects while it runs, by a tensor of indices.

What is static is one value, `Selection`: sizes of blocks, how many are selected, causality. It is
all that a plan depends on. Which blocks they are is data of a call, and stays on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from attnkit.arguments import check_bool, check_int, check_tensor
from attnkit.constants import constant
from attnkit.errors import CompositionError, CompositionTypeError, clipped, shown
from attnkit.masks.base import LONGEST_REPR, Enclosure, Mask, Rectangle
from attnkit.masks.selection import Selection

__all__ = ["SelectedBlocks"]

_INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True, repr=False, eq=False)
class SelectedBlocks(Mask):
    """Blocks of keys that are selected at run time, for each block of queries: MoBA, NSA by block.

    With ``I = i // q_block`` and ``J = j // kv_block``, and for each batch element and head:

    ``allowed(i, j) = J in indices[I]``                                       (not causal)
    ``allowed(i, j) = J in indices[I][:min(k, own)] or own * kv_block <= j <= i'``  (causal)

    where i' = i + kv_len - q_len is the query's position and ``own`` the key block of the query
    block's first position. So a causal query block always sees its own keys up to each query, it
    selects from the blocks before, and where there are fewer than k of them, only so many of its
    indices are read: what `torch.topk` puts last, with -inf for own and later blocks.

    - `indices`: ``[1 | b, heads, q_blocks, k]`` of int64 or int32, on the device of the queries.
      `heads` is 1 for all alike, the number of key heads, or of query heads.
    - `q_block`, `kv_block`: tokens of a block. ``q_blocks * q_block`` is the number of queries.
      Without causality `kv_block` divides the number of keys; with it, keys behind the last whole
      block are seen as own ones. Blocks whose sizes divide each other are gathered as a whole.
    - `gates`: floating tensor shaped as `indices`; a gate is added to all scores of its block,
      ``score = scale * q.k + gate``, so weights are multiplied by ``exp(gate)`` before they are
      normalised. It trains, and its gradient is exact. Own keys have a gate of 0.
    - `counts`: ``[1 | b, heads, q_blocks]`` integers, how many of the k indices count: k is then a
      capacity, as for a top-p selection. What stands behind them is not read.

    It comes with a call, ``layer(q, k, v, mask=SelectedBlocks(...))``: one plan serves every
    selection of such sizes, and no index is read on the host. It is not combined with other masks.
    Raises `CompositionError` (or its TypeError form) for tensors and sizes that do not fit, and,
    when it runs, for indices that are out of range, occur twice, or are those of own or later
    blocks. Of tensors on a device these are looked at there: by an asynchronous assert where
    the device has one, as CUDA does; elsewhere all that the call returns becomes NaN.

    Sources: MoBA (Lu et al. 2025, arXiv:2502.13189), NSA (Yuan et al. 2025, arXiv:2502.11089).

    >>> indices = torch.tensor([0, 0, 1, 0]).view(1, 1, 4, 1)
    >>> print(SelectedBlocks(indices, 2, 2, causal=True).show(8, 8))
    #.......
    ##......
    ###.....
    ####....
    ..###...
    ..####..
    ##....#.
    ##....##
    >>> SelectedBlocks(indices, q_block=2, kv_block=2, causal=True)
    SelectedBlocks(indices [1, 1, 4, 1], q_block=2, kv_block=2, causal=True)
    """

    indices: Tensor
    q_block: int
    kv_block: int
    causal: bool = False
    gates: Tensor | None = None
    counts: Tensor | None = None
    comes_with_call = True

    def __new__(cls, *given: Any, **named: Any) -> SelectedBlocks:
        """Make one; inside of a compiled function, one whose tensors are its graph's."""
        if torch.compiler.is_dynamo_compiling():
            return object.__new__(cls)
        return super().__new__(cls, *given, **named)

    def __post_init__(self) -> None:
        check_int("SelectedBlocks q_block", self.q_block, 1)
        check_int("SelectedBlocks kv_block", self.kv_block, 1)
        check_bool("SelectedBlocks causal", self.causal, "True: own and earlier blocks only")
        indices = _integers("indices", self.indices)
        if indices.dim() != 4 or 0 in indices.shape[1:]:
            raise CompositionError(
                f"SelectedBlocks: indices {list(indices.shape)}; they are [b, heads, q_blocks, k], "
                "with b or heads of 1 for all alike"
            )
        if self.gates is not None:
            check_tensor("SelectedBlocks gates", self.gates)
            if not self.gates.is_floating_point():
                raise CompositionTypeError(
                    f"SelectedBlocks: gates of {self.gates.dtype}; they are added to scores, so "
                    "give floating numbers"
                )
            _alike("gates", self.gates, indices, 4)
        if self.counts is not None:
            _alike("counts", _integers("counts", self.counts), indices, 3)

    # -- what a call and a plan know -----------------------------------------------------

    @cached_property
    def form(self) -> Selection:
        """All but the numbers: what a plan is for."""
        b, heads, q_blocks, k = self.indices.shape
        return Selection((b, heads, q_blocks, k), *self.words)

    @property
    def words(self) -> tuple[int, int, bool, bool, bool]:
        """What a graph knows of it beside its tensors."""
        has = (self.gates is not None, self.counts is not None)
        return self.q_block, self.kv_block, self.causal, *has

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Indices, and gates and counts if there are."""
        return tuple(t for t in (self.indices, self.gates, self.counts) if t is not None)

    @property
    def batches(self) -> int | None:
        """As the indices; 1 serves every batch element."""
        return self.indices.shape[0] if self.indices.shape[0] > 1 else None

    @property
    def heads(self) -> int | None:
        """As the indices, each for an equal group of query heads; 1 serves every head."""
        return self.indices.shape[1] if self.indices.shape[1] > 1 else None

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The number of queries, and any number of keys."""
        return self.form.extent

    @property
    def anchored(self) -> bool:
        """Causality is anchored at the last query."""
        return self.causal

    def check(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> None:
        """Raise `CompositionError` unless blocks and indices fit these sizes."""
        self.form.check(q_len, kv_len, batch, heads)

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """What lies in the past, or everything: indices are not read to tell."""
        return self.form.enclosure(q_len, kv_len, batch, head)

    # -- numbers -------------------------------------------------------------------------

    def wrong(self, kv_len: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return where indices are out of range and where they repeat ``[b h q k]``, and counts.

        What is not read is not wrong.

        >>> chosen = SelectedBlocks(torch.tensor([[1, 1]])[None, None], 2, 2)
        >>> [found.any().item() for found in chosen.wrong(4)]
        [False, True, False]
        """
        indices, live = self.indices.long(), self.live(kv_len)
        choices = _column(self.form.choices(kv_len), indices.device)
        outside = live & ((indices < 0) | (indices >= choices))
        # What is not read becomes a number that nothing else has.
        apart = -1 - torch.arange(indices.shape[3], device=indices.device)
        ordered = torch.where(live, indices, apart).sort(-1)
        same = ordered.values[..., 1:] == ordered.values[..., :-1]
        again = torch.zeros_like(live)
        again[..., 1:] = same & (ordered.values[..., 1:] >= 0)
        repeats = torch.zeros_like(live).scatter(-1, ordered.indices, again)
        if self.counts is None:
            return outside, repeats, live.new_zeros(())
        return outside, repeats, (self.counts < 0) | (self.counts > indices.shape[3])

    def refuse_wrong(self, kv_len: int) -> None:
        """Raise `CompositionError` for wrong indices or counts; they are on the host.

        >>> SelectedBlocks(torch.tensor([[2]])[None, None], 2, 2).refuse_wrong(4)
        Traceback (most recent call last):
        ...
        attnkit.errors.CompositionError: SelectedBlocks: indices[0, 0, 0, 0] is 2, out of range; \
blocks of 2 of 4 keys are 0 to 1
        """
        outside, repeats, many = (found.nonzero().tolist() for found in self.wrong(kv_len))
        if many and self.counts is not None:
            b, h, i = many[0]
            raise CompositionError(
                f"SelectedBlocks: counts[{b}, {h}, {i}] is {int(self.counts[b, h, i])}; the "
                f"indices have room for 0 to {self.indices.shape[3]}"
            )
        if outside:
            b, h, i, c = outside[0]
            block, last = int(self.indices[b, h, i, c]), self.form.choices(kv_len)[i] - 1
            rule = f"blocks of {self.kv_block} of {kv_len} keys are 0 to {last}"
            if self.causal:
                rule = f"query block {i} selects from the blocks before its own, 0 to {last}"
            raise CompositionError(
                f"SelectedBlocks: indices[{b}, {h}, {i}, {c}] is {block}, out of range; {rule}"
            )
        if repeats:
            b, h, i, c = repeats[0]
            raise CompositionError(
                f"SelectedBlocks: indices[{b}, {h}, {i}, {c}] is {int(self.indices[b, h, i, c])}, "
                "and so is another of that query block; a block that is selected twice would "
                "count twice, so select different ones"
            )

    @property
    def is_at_hand(self) -> bool:
        """Whether its numbers can be looked at without waiting for a device."""
        at_hand = (t.device.type == "cpu" and not isinstance(t, FakeTensor) for t in self.tensors)
        return all(at_hand)

    def live(self, kv_len: int) -> Tensor:
        """Return which indices are read, ``[b h q k]``.

        >>> chosen = SelectedBlocks(torch.zeros(1, 1, 3, 1).long(), 2, 2, causal=True)
        >>> chosen.live(6).flatten()
        tensor([False,  True,  True])
        """
        indices = self.indices
        places = torch.arange(indices.shape[3], device=indices.device)
        blocks = tuple(sight.blocks for sight in self.form.sights(kv_len))
        found = (places < _column(blocks, indices.device)).expand(indices.shape)
        return found if self.counts is None else found & (places < self.counts[..., None])

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> Tensor:
        """Return the cells of one batch element and head; heads as the indices count them."""
        chosen = self._by_block(self.live(at.kv_len), at.kv_len)
        plane = chosen[at.batch if len(chosen) > 1 else 0]
        plane = plane[at.head if len(plane) > 1 else 0] > 0
        here = torch.device(device) if device is not None else self.indices.device
        return self._spread(plane, at).to(here) | self._own(at, here)

    def _added(self, at: Rectangle, dtype: torch.dtype) -> Tensor | None:
        """Return the gates of a rectangle, ``[1 | b, heads, rows, keys]``; own keys have 0."""
        if self.gates is None:
            return None
        live = self.live(at.kv_len)
        gates = torch.where(live, self.gates.to(dtype), 0.0)
        return self._spread(self._by_block(gates, at.kv_len), at)

    def _by_block(self, values: Tensor, kv_len: int) -> Tensor:
        """Return values of selected blocks, by key block: ``[b h q k] -> [b h q blocks]``."""
        blocks = torch.arange(-(-kv_len // self.kv_block), device=values.device)
        here = self.indices[..., None] == blocks
        return (here * values[..., None]).sum(-2)

    def _spread(self, blocks: Tensor, at: Rectangle) -> Tensor:
        """Return the cells ``[... rows keys]`` of query and key blocks."""
        rows, keys = (torch.arange(*ends, device=blocks.device) for ends in (at.rows, at.keys))
        by_row = blocks.index_select(-2, rows // self.q_block)
        return by_row.index_select(-1, keys // self.kv_block)

    def _own(self, at: Rectangle, device: torch.device) -> Tensor:
        if not self.causal:
            return torch.zeros(at.shape, dtype=torch.bool, device=device)
        rows, keys = (torch.arange(*ends, device=device) for ends in (at.rows, at.keys))
        starts = tuple(sight.start for sight in self.form.sights(at.kv_len))
        start = _column(starts, device).index_select(0, rows // self.q_block)
        return (keys >= start) & (keys <= rows[:, None] + (at.kv_len - at.q_len))

    def materialize(
        self,
        q_len: int,
        kv_len: int,
        batch: int = 1,
        heads: int = 1,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Return the mask as a bool tensor [B, N, Sq, Skv]: each head of the indices for a group.

        >>> indices = torch.tensor([[0], [1]]).view(1, 2, 1, 1)
        >>> SelectedBlocks(indices, 1, 2).materialize(1, 4, heads=4)[0, :, 0].int()
        tensor([[1, 1, 0, 0],
                [1, 1, 0, 0],
                [0, 0, 1, 1],
                [0, 0, 1, 1]], dtype=torch.int32)
        """
        self.check(q_len, kv_len, batch, heads)
        own = self.indices.shape[1]
        cells = super().materialize(q_len, kv_len, self.batches or 1, own, device)
        return cells.repeat_interleave(heads // own, 1).expand(batch, heads, q_len, kv_len)

    # -- value ---------------------------------------------------------------------------

    def _value(self) -> Hashable:
        # Tensors are compared by what they are, as those of biases: reading them would wait.
        return (self.form, *map(id, self.tensors))

    def _text(self, show: Callable[[Any], str]) -> str:
        return self.form._text(show)

    def __repr__(self) -> str:
        return clipped(self._text(repr), LONGEST_REPR)


def _integers(name: str, tensor: Tensor) -> Tensor:
    check_tensor(f"SelectedBlocks {name}", tensor)
    if tensor.dtype not in _INTEGERS:
        raise CompositionTypeError(
            f"SelectedBlocks: {name} of {tensor.dtype}; give int64 or int32, as torch.topk does"
        )
    return tensor


def _alike(name: str, tensor: Tensor, indices: Tensor, axes: int) -> None:
    """Check that a tensor has the first axes of the indices, and their device."""
    if tensor.shape != indices.shape[:axes]:
        raise CompositionError(
            f"SelectedBlocks: {name} {shown(list(tensor.shape))} for indices "
            f"{list(indices.shape)}; they have {list(indices.shape[:axes])}"
        )
    if tensor.device != indices.device:
        raise CompositionError(
            f"SelectedBlocks: {name} on {tensor.device} and indices on {indices.device}; move "
            "them to one device"
        )


@constant
def _column(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a number for each query block, ``[q 1]``."""
    return torch.tensor(values, device=device)[:, None]
