"""`Tree`: tokens that see those on their way to a root, as drafts of speculative decoding do."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from attnkit.arguments import IntsLike, check_int, check_ints, check_readable
from attnkit.errors import CompositionError
from attnkit.geometry import Region, Slice
from attnkit.masks.base import MASKS, Enclosure, Mask, Rectangle
from attnkit.masks.trace import MOST_RUNS
from attnkit.strips import Canonical

__all__ = ["Tree"]

Parents = tuple[int, ...]
_Runs = tuple[tuple[int, int], ...]
_Ints = np.ndarray[Any, np.dtype[np.int64]]


@MASKS.register("tree")
@dataclass(frozen=True, repr=False, eq=False)
class Tree(Mask):
    """Tokens of a tree see all keys before it, their ancestors and themselves.

    Token i of the tree is key ``prefix + i``; its parent is the token ``parents[i]``, -1 for a
    root (there may be several). ``allowed(i, j) = j < prefix or (j - prefix) in {i, parents[i],
    parents[parents[i]], ...}``. Parents may come before their children or behind them. `prefix` is
    the number of keys before the tree; None (default): all that there are, kv_len - q_len, so that
    the mask stays the same as a cache grows. One list of parents serves every batch element, or
    each has its own, of one length.

    It is the mask of speculative decoding that verifies many drafts in one pass (SpecInfer, Miao
    et al., ASPLOS 2024; Medusa, Cai et al., ICML 2024), and of texts that share their beginnings,
    answers to one prompt for instance. Where the region would have more than 131,072 runs, the
    mask is known by its cells.

    Raises `CompositionError` for a parent that is no token of the tree, for a cycle, and where
    there are other lengths.

    >>> print(Tree([-1, 0, 0, 1], prefix=2).show(4, 6))
    ###...
    ####..
    ###.#.
    ####.#
    """

    parents: Parents | tuple[Parents, ...]
    prefix: int | None = None

    if TYPE_CHECKING:  # more is taken than is kept

        def __init__(
            self, parents: IntsLike | Sequence[IntsLike], prefix: int | None = None
        ) -> None: ...

    def __post_init__(self) -> None:
        given: Any = self.parents
        if isinstance(given, torch.Tensor):
            check_readable("Tree parents", given)
        if isinstance(given, torch.Tensor | np.ndarray) and given.ndim == 2:
            given = list(given)
        many = isinstance(given, tuple | list) and any(map(_is_row, given))
        kept = tuple(_checked(row) for row in given) if many else _checked(given)
        object.__setattr__(self, "parents", kept)
        sizes = {len(row) for row in self._rows}
        if len(sizes) > 1:
            raise CompositionError(
                f"Tree has {sorted(sizes)} tokens by batch element; all trees of one batch have "
                "one length (fill up with roots of their own, and leave their rows out)"
            )
        if self.prefix is not None:
            check_int("Tree prefix", self.prefix, 0)

    @property
    def _rows(self) -> tuple[Parents, ...]:
        """The parents of each batch element, or of all."""
        each = self.parents if self.batches else (self.parents,)
        return cast("tuple[Parents, ...]", each)

    @property
    def batches(self) -> int | None:
        """One list of parents per batch element, where they differ."""
        return len(self.parents) if isinstance(self.parents[0], tuple) else None

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The tokens of the tree; and of the keys as many more as are said."""
        size = len(self._rows[0])
        return size, None if self.prefix is None else self.prefix + size

    def check(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> None:
        """Also refuse fewer keys than the tree has tokens."""
        super().check(q_len, kv_len, batch, heads)
        if kv_len < q_len:
            raise CompositionError(
                f"{self!r} has {q_len} tokens, which are the last {q_len} keys, but the score "
                f"matrix has kv_len={kv_len}; give the keys of the tree, behind those of the text"
            )

    def _before(self, q_len: int, kv_len: int) -> int:
        return kv_len - q_len if self.prefix is None else self.prefix

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """The runs of each token's ancestors; where they are too many, what lies around them."""
        before, each = self._before(q_len, kv_len), self._paths[batch if self.batches else 0]
        whole = Region.full(q_len, kv_len)
        if each is None:
            return Enclosure(Region.of(Slice(0, q_len, 0, min(before, kv_len))), whole)
        out = Canonical()
        for i, runs in enumerate(each):
            moved = [(before + a, 0, before + b, 0) for a, b in runs]
            if before and moved[0][0] == before:
                moved[0] = (0, *moved[0][1:])
            elif before:
                moved.insert(0, (0, 0, before, 0))
            out.add(i, i + 1, tuple(moved))
        region = Region(tuple(out.strips))
        region = region if region.fits(q_len, kv_len) else region & whole  # a cut may ask for less
        return Enclosure(region, region)

    @cached_property
    def _paths(self) -> tuple[tuple[_Runs, ...] | None, ...]:
        """For each tree the runs of tokens that each one sees; None where they are too many."""
        return tuple(_paths(row) for row in self._rows)

    @cached_property
    def _tours(self) -> tuple[tuple[_Ints, _Ints], ...]:
        """For each tree, when a walk in depth enters each token, and when it has left it."""
        return tuple(_tour(row) for row in self._rows)

    def _read(self, at: Rectangle, device: torch.device | str | None = None) -> torch.Tensor:
        # The formula itself: it is faster than the runs of each row.
        return self._cells(at, device)

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> torch.Tensor:
        device = torch.get_default_device() if device is None else device
        before = self._before(at.q_len, at.kv_len)
        enters, leaves = (
            torch.from_numpy(one).to(device) for one in self._tours[at.batch if self.batches else 0]
        )
        own = enters[at.rows[0] : at.rows[1], None]
        first, stop = (max(end - before, 0) for end in at.keys)
        # A token is inside of what a walk meets between entering and leaving an ancestor.
        tree = (enters[first:stop] <= own) & (own < leaves[first:stop])
        text = max(min(before, at.keys[1]) - at.keys[0], 0)
        return torch.cat([tree.new_ones(len(own), text), tree], dim=1)


def _is_row(entry: object) -> bool:
    return isinstance(entry, tuple | list) or (
        isinstance(entry, torch.Tensor | np.ndarray) and entry.ndim == 1
    )


def _checked(given: object) -> Parents:
    parents = check_ints("Tree parents", given, -1)
    for token, parent in enumerate(parents):
        if parent >= len(parents):
            raise CompositionError(
                f"Tree parents[{token}]={parent} is no token of the tree, which has "
                f"{len(parents)}, counted from 0; a root has -1"
            )
    order = _downwards(parents)
    if len(order) < len(parents):
        token = min(set(range(len(parents))) - set(order))
        raise CompositionError(
            f"Tree parents[{token}]={parents[token]} leads into a cycle: the way from token "
            f"{token} over its parents ends in no root; a root has the parent -1"
        )
    return parents


def _children(parents: Parents) -> list[list[int]]:
    """Return the children of each token, and last the roots."""
    below: list[list[int]] = [[] for _ in range(len(parents) + 1)]
    for token, parent in enumerate(parents):
        below[parent].append(token)
    return below


def _downwards(parents: Parents) -> list[int]:
    """Return the tokens that have a root, each behind its parent."""
    below = _children(parents)
    order = list(below[-1])
    for token in order:  # grows as it is read
        order += below[token]
    return order


def _paths(parents: Parents) -> tuple[_Runs, ...] | None:
    runs: dict[int, _Runs] = {-1: ()}
    found = 0
    for token in _downwards(parents):
        runs[token] = _with(runs[parents[token]], token)
        found += len(runs[token])
        if found > MOST_RUNS:
            return None
    return tuple(runs[token] for token in range(len(parents)))


def _with(runs: _Runs, token: int) -> _Runs:
    """Return runs of tokens with one more, which is in none."""
    k = bisect_left(runs, (token,))
    start, stop, first, last = token, token + 1, k, k
    if k and runs[k - 1][1] == token:
        first, start = k - 1, runs[k - 1][0]
    if k < len(runs) and runs[k][0] == token + 1:
        last, stop = k + 1, runs[k][1]
    return (*runs[:first], (start, stop), *runs[last:])


def _tour(parents: Parents) -> tuple[_Ints, _Ints]:
    order, sizes = _downwards(parents), [1] * (len(parents) + 1)
    for token in reversed(order):
        sizes[parents[token]] += sizes[token]
    enters, free = [0] * len(parents), [0] * (len(parents) + 1)
    for token in order:  # behind the walks through the older children of its parent
        parent = parents[token]
        enters[token] = free[parent]
        free[parent] += sizes[token]
        free[token] = enters[token] + 1
    begins = np.array(enters, np.int64)
    return begins, begins + np.array(sizes[:-1], np.int64)
