"""Random mask expressions against plain numpy formulas that share no code with the package.

    python -m tests.masks.campaign --count 1000000 --seed 1

Every expression is one of all families, operators, cuts, mixes of heads and documents with masks
inside, at small sizes. Its tensor, its regions, its bounds, its text and copies are compared
with the formulas; now and then its simplest form, its findings and its picture too.
"""

from __future__ import annotations

import argparse
import copy
import pickle
import sys
import time
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch

from attnkit import masks

Cells = Any  # bool array [B, N, Sq, Skv]

FEATURES = np.random.default_rng(5).integers(-3, 4, (64, 4))
TABLE = torch.from_numpy(FEATURES)


class Node(NamedTuple):
    """A mask, and the formula of its cells at any lengths (or at its own)."""

    mask: Any
    cells: Callable[[int, int], Cells]
    writable: bool = True


class World:
    """What one expression is made in: its random numbers, and how many planes there are."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = Random(f"{seed}:{number}")
        draw = self.random.random()
        self.batch = 1 if draw < 0.65 else self.random.randint(1, 3)
        self.heads = 1 if draw < 0.65 else self.random.randint(1, 3)

    # -- formulas --------------------------------------------------------------------------

    def all(self, q: int, k: int, plane: Cells) -> Cells:
        return np.broadcast_to(plane, (self.batch, self.heads, q, k))

    def grid(self, q: int, k: int) -> tuple[Any, Any, Any]:
        """Query i [q, 1], key j [1, k], and the batch element [B, 1, 1, 1]."""
        b = np.arange(self.batch)[:, None, None, None]
        return np.arange(q)[:, None], np.arange(k)[None, :], b

    def node(
        self, mask: Any, formula: Callable[..., Cells], align: str = "top_left", **more: bool
    ) -> Node:
        """A mask with a formula of the query's position p, the key j, the query i and b."""

        def cells(q: int, k: int) -> Cells:
            i, j, b = self.grid(q, k)
            p = i + (k - q if align == "bottom_right" else 0)
            return self.all(q, k, formula(p, j, i, b) & np.ones((q, k), bool))

        return Node(mask, cells, **more)

    # -- atoms -----------------------------------------------------------------------------

    def atom(self, size: tuple[int, int] | None) -> Node:
        made = self.random.choice(FREE if size is None else FREE + SIZED)
        return made(self) if made in FREE else made(self, *size)

    def align(self) -> str:
        return self.random.choice(("bottom_right", "top_left"))

    def full(self) -> Node:
        return self.node(masks.Full(), lambda p, j, i, b: True)

    def causal(self) -> Node:
        a = self.align()
        return self.node(masks.Causal(a), lambda p, j, i, b: j <= p, a)

    def window(self) -> Node:
        a, w = self.align(), self.random.randint(1, 9)
        mask = masks.SlidingWindow(w, a)
        return self.node(mask, lambda p, j, i, b: (p - w < j) & (j <= p), a)

    def band(self) -> Node:
        a = self.align()
        left = self.random.choice((None, *range(-4, 9)))
        least = -9 if left is None else -left
        right = self.random.choice((None, *range(least, 9)))

        def formula(p: Any, j: Any, i: Any, b: Any) -> Any:
            low = True if left is None else p - left <= j
            return low & (True if right is None else j <= p + right)

        return self.node(masks.Band(left, right, a), formula, a)

    def spans(self) -> Node:
        a, per_batch = self.align(), self.random.random() < 0.5
        each = [
            [
                (start, start + self.random.randint(1, 4))
                for start in self.random.sample(range(8), self.random.randint(0, 3))
            ]
            for _ in range(self.batch if per_batch else 1)
        ]

        def formula(p: Any, j: Any, i: Any, b: Any) -> Any:
            found = np.zeros(np.broadcast_shapes(p.shape, j.shape, b.shape), bool)
            for n in range(self.batch):
                for start, stop in each[n % len(each)]:
                    inside = (start <= p) & (p < stop) & (start <= j) & (j < stop)
                    found |= (b == n) & inside
            return found

        return self.node(masks.Spans(each if per_batch else each[0], a), formula, a)

    def chunked(self) -> Node:
        a, s = self.align(), self.random.randint(1, 6)
        f = [self.random.randint(0, 7) for _ in range(self.batch)]
        if self.random.random() < 0.5:
            return self.node(masks.Chunked(s, a), lambda p, j, i, b: j // s == p // s, a)

        def formula(p: Any, j: Any, i: Any, b: Any) -> Any:
            return (j - np.array(f)[b]) // s == (p - np.array(f)[b]) // s

        return self.node(masks.Chunked(s, a, f), formula, a)

    def block_causal(self) -> Node:
        a, s = self.align(), self.random.randint(1, 6)
        f, n = self.random.randint(0, 7), self.random.choice((None, 0, 1, 2))

        def formula(p: Any, j: Any, i: Any, b: Any) -> Any:
            ahead = (p - f) // s - (j - f) // s
            return (ahead >= 0) & (True if n is None else ahead <= n)

        return self.node(masks.BlockCausal(s, a, f, n), formula, a)

    def keys(self) -> Node:
        each: list[list[tuple[int, int | None]]] = []
        for _ in range(self.batch):
            ends = sorted(self.random.sample(range(9), self.random.choice((0, 2, 4))))
            runs: list[Any] = list(zip(ends[::2], ends[1::2], strict=True))
            if runs and self.random.random() < 0.5:
                runs[-1] = (runs[-1][0], None)
            each.append(runs)

        def formula(p: Any, j: Any, i: Any, b: Any) -> Any:
            found = np.zeros(np.broadcast_shapes(j.shape, b.shape), bool)
            for n, runs in enumerate(each):
                for start, stop in runs:
                    found |= (b == n) & (start <= j) & (j < (10**6 if stop is None else stop))
            return found

        return self.node(masks.Keys(each), formula)

    def dilated(self) -> Node:
        a, s = self.align(), self.random.randint(1, 5)
        return self.node(masks.Dilated(s, a), lambda p, j, i, b: (p - j) % s == 0, a)

    def span(self) -> tuple[int, int | None, int]:
        start = self.random.randint(0, 7)
        stop = self.random.choice((None, start + self.random.randint(1, 6)))
        return start, stop, 10**6 if stop is None else stop

    def columns(self) -> Node:
        start, stop, end = self.span()
        return self.node(masks.Columns(start, stop), lambda p, j, i, b: (start <= j) & (j < end))

    def rows(self) -> Node:
        start, stop, end = self.span()
        return self.node(masks.Rows(start, stop), lambda p, j, i, b: (start <= i) & (i < end))

    def prefix(self) -> Node:
        n = self.random.randint(0, 9)
        return self.node(masks.Prefix(n), lambda p, j, i, b: j < n)

    def prefixes(self) -> Node:
        n = [self.random.randint(0, 9) for _ in range(self.batch)]
        return self.node(masks.Prefix(n), lambda p, j, i, b: j < np.array(n)[b])

    def prefix_lm(self) -> Node:
        a, n = self.align(), self.random.randint(0, 9)
        return self.node(masks.PrefixLM(n, a), lambda p, j, i, b: (j <= p) | (j < n), a)

    def predicate(self) -> Node:
        which = self.random.randrange(4)
        n = self.random.randint(0, 6)
        fns: list[tuple[Any, Any]] = [
            (lambda b, h, i, j: (i * 2 + j) % 3 != n % 3, lambda i, j, b: (i * 2 + j) % 3 != n % 3),
            (
                lambda b, h, i, j: (TABLE[i] * TABLE[j]).sum() > n - 3,
                lambda i, j, b: (FEATURES[i] * FEATURES[j]).sum(-1) > n - 3,
            ),
            (lambda b, h, i, j: (i >= j) | (j < n), lambda i, j, b: (i >= j) | (j < n)),
            (
                lambda b, h, i, j: torch.stack([i, j, b + n]).max() % 2 == 0,
                lambda i, j, b: np.maximum(np.maximum(i, j), b + n) % 2 == 0,
            ),
        ]
        fn, formula = fns[which]
        mask = masks.Predicate(fn, batch=self.batch if which == 3 else None)
        return self.node(mask, lambda p, j, i, b: formula(i, j, b), writable=False)

    # -- atoms for one size ----------------------------------------------------------------

    def split(self, total: int, parts: int) -> tuple[int, ...]:
        cuts = sorted(self.random.randint(0, total) for _ in range(parts - 1))
        return tuple(b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True))

    def documents(self, q: int, k: int) -> Node:
        counts = self.random.randint(1, 4)
        per_batch = self.random.random() < 0.3
        each = self.batch if per_batch else 1
        rows = [self.split(q, counts) for _ in range(each)]
        square = q == k and self.random.random() < 0.5
        keys = rows if square else [self.split(k, counts) for _ in range(each)]
        inside = self.tree(1, None, True) if self.random.random() < 0.5 else None

        def cells(q: int, k: int) -> Cells:
            out = np.zeros((self.batch, self.heads, q, k), bool)
            for b in range(self.batch):
                i = j = 0
                for r, c in zip(rows[b % each], keys[b % each], strict=True):
                    part = np.True_ if inside is None else inside.cells(r, c)[b]
                    out[b, :, i : i + r, j : j + c] = part
                    i, j = i + r, j + c
            return out

        lengths: Any = tuple(rows) if per_batch else rows[0]
        others: Any = None if square else tuple(keys) if per_batch else keys[0]
        mask = masks.Documents(lengths, others, inside=None if inside is None else inside.mask)
        return Node(mask, cells, inside is None or inside.writable)

    def numbers(self, q: int, k: int) -> Node:
        if not (q and k):
            return self.slices(q, k)
        rows, keys = (
            np.array([[self.random.randint(-1, 2) for _ in range(n)] for _ in range(self.batch)])
            for n in (q, k)
        )
        none = self.random.choice((None, -1, 0))

        def formula(p: Any, j: Any, i: Any, b: Any) -> Any:
            return (rows[b, i] == keys[b, j]) & (rows[b, i] != none)

        return self.node(masks.SameId.of(rows, keys, none), formula)

    def padding(self, q: int, k: int) -> Node:
        n = [self.random.randint(0, k) for _ in range(self.batch)]
        if self.random.random() < 0.5:
            return self.node(masks.Padding(n), lambda p, j, i, b: j < np.array(n)[b])
        mask = masks.Padding(n, "left")
        return self.node(mask, lambda p, j, i, b: j >= k - np.array(n)[b])

    def dense(self, q: int, k: int) -> Node:
        axes = self.random.randint(2, 4)
        shape = [*(self.batch, self.heads)[4 - axes :], self.random.choice((q, q, 1)), k]
        share = self.random.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        bits = np.array([self.random.random() < share for _ in range(int(np.prod(shape)))], bool)
        given = bits.reshape(shape)
        tensor = torch.from_numpy(given.copy())
        tensor = tensor[None] if axes == 3 and self.batch == self.heads else tensor
        if self.random.random() < 0.5:
            return Node(masks.Dense.keep(tensor), lambda q, k: self.all(q, k, given))
        return Node(masks.Dense.drop(tensor), lambda q, k: self.all(q, k, ~given))

    def slices(self, q: int, k: int) -> Node:
        pieces = []
        for _ in range(self.random.randint(0, 3)):
            i0, i1 = sorted((self.random.randint(0, q), self.random.randint(0, q)))
            j0, j1 = sorted((self.random.randint(0, k), self.random.randint(0, k)))
            lo = self.random.choice((None, self.random.randint(-9, 9)))
            hi = self.random.choice((None, self.random.randint(-9, 9)))
            pieces.append((i0, i1, j0, j1, lo, hi))

        def formula(p: Any, j: Any, i: Any, b: Any) -> Any:
            found = np.zeros((q, k), bool)
            for i0, i1, j0, j1, lo, hi in pieces:
                part = (i0 <= i) & (i < i1) & (j0 <= j) & (j < j1)
                part = part & (True if lo is None else lo <= j - i)
                found |= part & (True if hi is None else j - i <= hi)
            return found

        return self.node(masks.Slices(pieces, q, k), formula)

    def table(self, q: int, k: int) -> Node:
        if not (q and k):
            return self.slices(q, k)
        a, causal = self.align(), self.random.random() < 0.4
        rows, keys = self.random.randint(1, 4), self.random.randint(1, 4)
        planes = self.random.choice(((1, 1), (self.batch, 1), (self.batch, self.heads)))
        shape = (*planes, -(-q // rows), -(-k // keys))
        bits = [self.random.random() < 0.5 for _ in range(int(np.prod(shape)))]
        given = np.array(bits, bool).reshape(shape)
        mask = masks.Blocks(given, rows, keys, causal, a, q_len=q, kv_len=k)

        def formula(p: Any, j: Any, i: Any, b: Any) -> Any:
            found = given[:, :, i // rows, j // keys]
            return found & (j <= p) if causal else found

        return self.node(mask, formula, a)

    def ancestors(self, q: int, k: int) -> Node:
        if not 0 < q <= k:
            return self.slices(q, k)
        each = []
        for _ in range(self.random.choice((1, self.batch))):
            names = self.random.sample(range(q), q)
            parents = [-1] * q
            for n, name in enumerate(names):
                parents[name] = self.random.choice((-1, *names[:n]))
            each.append(parents)
        cells = np.zeros((len(each), 1, q, k), bool)
        cells[..., : k - q] = True
        for b, parents in enumerate(each):
            for token in range(q):
                above = token
                while above >= 0:
                    cells[b, 0, token, k - q + above] = True
                    above = parents[above]
        prefix = self.random.choice((None, k - q))
        mask = masks.Tree(each if len(each) > 1 else each[0], prefix)
        return self.node(mask, lambda p, j, i, b: cells)

    def image(self, q: int, k: int) -> Node:
        if q != k or not q:
            return self.slices(q, k)
        shape = self.random.choice([(h, q // h) for h in range(1, q + 1) if q % h == 0])
        mask, seen = self.random.choice((self.near, self.tiles, self.windows))(shape)

        def formula(p: Any, j: Any, i: Any, b: Any) -> Any:
            wide = shape[1]
            return seen(0, i // wide, j // wide) & seen(1, i % wide, j % wide)

        return self.node(mask, formula)

    def near(self, shape: tuple[int, int]) -> tuple[Any, Any]:
        kernel = [self.random.randint(1, n) for n in shape]
        step = [self.random.randint(1, n // own) for n, own in zip(shape, kernel, strict=True)]
        causal = [self.random.random() < 0.3 for _ in shape]

        def seen(axis: int, i: Any, j: Any) -> Any:
            n, d, own = shape[axis], step[axis], kernel[axis]
            most = (n - 1 - i % d) // d  # the last position of this residue
            low = np.clip(i // d - own // 2, 0, most - own + 1)
            inside = (low <= j // d) & (j // d < low + own)
            if causal[axis]:
                inside = (j <= i) & (i // d - j // d < own)
            return inside & ((i - j) % d == 0)

        return masks.Neighborhood(shape, kernel, step, causal), seen

    def tiles(self, shape: tuple[int, int]) -> tuple[Any, Any]:
        tile = [self.random.choice([t for t in range(1, n + 1) if n % t == 0]) for n in shape]
        many = [n // t for n, t in zip(shape, tile, strict=True)]
        window = [self.random.choice((*range(1, n + 1, 2), n)) for n in many]

        def seen(axis: int, i: Any, j: Any) -> Any:
            t, w = tile[axis], window[axis]
            low = np.clip(i // t - w // 2, 0, many[axis] - w)
            return (low <= j // t) & (j // t < low + w)

        return masks.SlidingTiles(shape, tile, window), seen

    def windows(self, shape: tuple[int, int]) -> tuple[Any, Any]:
        window = [self.random.choice([w for w in range(1, n + 1) if n % w == 0]) for n in shape]
        shift = [
            self.random.randrange(w) if w < n else 0 for n, w in zip(shape, window, strict=True)
        ]

        def seen(axis: int, i: Any, j: Any) -> Any:
            return (i - shift[axis]) // window[axis] == (j - shift[axis]) // window[axis]

        return masks.ShiftedWindows(shape, window, shift), seen

    # -- expressions -----------------------------------------------------------------------

    def tree(self, depth: int, size: tuple[int, int] | None, apart: bool = False) -> Node:
        """A random expression of at most this depth; `apart`: it tells no heads apart."""
        draw = self.random.random()
        if depth == 0 or draw < 0.2:
            return self.atom(size if not apart or self.heads == 1 else None)
        if draw < 0.3:
            x = self.tree(depth - 1, size, apart)
            return Node(~x.mask, lambda q, k: ~x.cells(q, k), x.writable)
        if draw < 0.75:
            return self.joined(depth, size, apart)
        if draw < 0.85 and not apart:
            each = [self.tree(depth - 1, size, True) for _ in range(self.heads)]
            mask = masks.PerHead([one.mask for one in each])
            return Node(
                mask,
                lambda q, k: np.stack([e.cells(q, k)[:, h] for h, e in enumerate(each)], axis=1),
                all(one.writable for one in each),
            )
        if draw < 0.88 and self.batch > 1:
            return self.per_batch(depth, size, apart)
        if draw < 0.94 and size is not None:
            return self.placed(depth, size, apart)
        return self.cut(depth, size, apart)

    def per_batch(self, depth: int, size: tuple[int, int] | None, apart: bool) -> Node:
        """A mask of its own for each batch element, of parts that tell none apart."""
        each: list[Node] = []
        while len(each) < self.batch:
            one = self.tree(depth - 1, size, apart)
            each += [one] if one.mask.batches is None else []
        return Node(
            masks.PerBatch([one.mask for one in each]),
            lambda q, k: np.stack([one.cells(q, k)[b] for b, one in enumerate(each)]),
            all(one.writable for one in each),
        )

    def joined(self, depth: int, size: tuple[int, int] | None, apart: bool) -> Node:
        x, y = (self.tree(depth - 1, size, apart) for _ in range(2))
        writable = x.writable and y.writable
        sign = self.random.choice("&|-")
        if sign == "&":
            return Node(x.mask & y.mask, lambda q, k: x.cells(q, k) & y.cells(q, k), writable)
        if sign == "|":
            return Node(x.mask | y.mask, lambda q, k: x.cells(q, k) | y.cells(q, k), writable)
        return Node(x.mask - y.mask, lambda q, k: x.cells(q, k) & ~y.cells(q, k), writable)

    def placed(self, depth: int, size: tuple[int, int], apart: bool) -> Node:
        """A mask between other tokens, as many as there is room for."""
        before = [self.random.randint(0, min(n, 3)) for n in size]
        after = [self.random.randint(0, min(n - a, 2)) for n, a in zip(size, before, strict=True)]
        q, k = (n - a - z for n, a, z in zip(size, before, after, strict=True))
        x = self.tree(depth - 1, (q, k), apart)

        def cells(rows: int, keys: int) -> Cells:
            out = np.zeros((self.batch, self.heads, rows, keys), bool)
            out[:, :, before[0] : before[0] + q, before[1] : before[1] + k] = x.cells(q, k)
            return out

        return Node(masks.Placed(x.mask, before, after), cells, x.writable)

    def cut(self, depth: int, size: tuple[int, int] | None, apart: bool) -> Node:
        i0, j0 = self.random.randint(0, 3), self.random.randint(0, 3)
        if size is None:
            x = self.tree(depth - 1, None, apart)
            return Node(
                x.mask[i0:, j0:],
                lambda q, k: x.cells(q + i0, k + j0)[..., i0:, j0:],
                x.writable,
            )
        q, k = size
        below, right = self.random.choice(((0, 0), (2, 1), (0, 3)))
        whole = q + i0 + below, k + j0 + right
        x = self.tree(depth - 1, whole, apart)
        ranges = (i0, i0 + q), (j0, j0 + k)
        if (below, right) == (0, 0):
            mask = x.mask[i0:, j0:]
        elif not x.mask.anchored and self.random.random() < 0.5:
            mask = x.mask[i0 : i0 + q, j0 : j0 + k]
        else:
            own = x.mask.extent
            q_len, kv_len = (w if o is None else None for w, o in zip(whole, own, strict=True))
            mask = x.mask.cut(*ranges, q_len=q_len, kv_len=kv_len)
        return Node(mask, lambda q, k: x.cells(*whole)[..., i0 : i0 + q, j0 : j0 + k], x.writable)


FREE = [
    World.full, World.causal, World.window, World.band, World.chunked, World.block_causal,
    World.dilated, World.columns, World.rows, World.prefix, World.prefixes, World.prefix_lm,
    World.predicate, World.spans, World.keys,
]  # fmt: skip
SIZED = [
    World.documents, World.documents, World.padding, World.dense, World.slices, World.numbers,
    World.table, World.ancestors, World.image, World.image,
]  # fmt: skip


def drawn(region: Any, q: int, k: int) -> Cells:
    """A region's rows as cells."""
    cells = np.zeros((q, k), bool)
    for i in range(q):
        for a, b in region.row(i):
            cells[i, a:b] = True
    return cells


class Campaign:
    """Checks expressions; remembers one region for each set of cells, for there is only one."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.regions: dict[tuple[int, int, bytes], Any] = {}
        self.made: Counter[str] = Counter()

    def check(self, number: int) -> str | None:
        """Make and check one expression; return what is wrong with it, if anything."""
        world = World(self.seed, number)
        q, k = world.random.randint(0, 8), world.random.randint(0, 8)
        node = world.tree(world.random.randint(1, 4), (q, k))
        try:
            wrong = self.compare(world, node, q, k, number)
        except Exception as error:  # whatever it is, it is a finding
            wrong = f"{type(error).__name__}: {error}"
        return None if wrong is None else f"{node.mask!r} at {q} x {k}: {wrong}"

    def compare(self, world: World, node: Node, q: int, k: int, number: int) -> str | None:
        mask, right = node.mask, node.cells(q, k)
        given = mask.materialize(q, k, world.batch, world.heads).numpy()
        if given.shape != right.shape or (given != right).any():
            return "materialize differs"
        for b in range(mask.batches or 1):
            for h in range(mask.heads or 1):
                wrong = self.plane(mask, right[b, h], q, k, b, h)
                if wrong is not None:
                    return f"{wrong} in plane {b}, {h}"
        if node.writable:
            twin = masks.parse(str(mask))
            if twin != mask or hash(twin) != hash(mask) or str(twin) != str(mask):
                return "the text is read back as another mask"
            self.made["text"] += 1
        if number % 8 == 0 and node.writable:
            twin = pickle.loads(pickle.dumps(mask)) if number % 16 else copy.deepcopy(mask)
            if twin != mask or hash(twin) != hash(mask):
                return "a copy is another mask"
        if number % 100 == 0:
            simple = mask.simplify(q, k)
            if (simple.materialize(q, k, world.batch, world.heads).numpy() != right).any():
                return f"simplified to {simple!r}"
            mask.lint(q, k)
            self.made["simplified"] += 1
        return None

    def plane(self, mask: Any, right: Cells, q: int, k: int, b: int, h: int) -> str | None:
        known = mask.enclosure(q, k, b, h)
        inner = drawn(known.inner, q, k)
        if known.inner == known.outer:
            self.made["regions"] += 1
            region = mask.region(q, k, b, h)
            if (inner != right).any() or region != known.inner:
                return "the region differs"
            area = int(right.sum())
            if region.area != area:
                return "the area differs"
            if area % 8 == 0 and mask.show(q, k, b, h) != picture(right):
                return "the picture differs"
            kept = self.regions.setdefault((q, k, right.tobytes()), region)
            if kept != region or hash(kept) != hash(region):
                return "two regions have these cells"
            if len(self.regions) > 50_000:
                self.regions.clear()
            return None
        outer = drawn(known.outer, q, k)
        if (inner & ~right).any() or (right & ~outer).any():
            return "the bounds do not hold it"
        self.made["bounds"] += 1
        return None


def picture(cells: Cells) -> str:
    return "\n".join("".join("#" if cell else "." for cell in row) for row in cells)


def run(count: int, seed: int, first: int = 0, report: int = 0) -> tuple[list[str], Counter[str]]:
    """Check `count` expressions; return what is wrong, and how much of what was checked."""
    campaign = Campaign(seed)
    found = []
    start = time.monotonic()
    for number in range(first, first + count):
        wrong = campaign.check(number)
        if wrong is not None:
            found.append(f"seed {seed}, number {number}: {wrong}")
            if report:
                print(found[-1], flush=True)
        if report and (number - first + 1) % report == 0:
            rate = (number - first + 1) / (time.monotonic() - start)
            print(f"{number - first + 1} of {count}, {len(found)} wrong, {rate:.0f}/s", flush=True)
    return found, campaign.made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first expression")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, made = run(options.count, options.seed, options.first, report=10_000)
    print(f"{options.count} expressions, seed {options.seed}: {len(found)} wrong; {dict(made)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
