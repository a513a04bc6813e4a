"""Random compositions over every family, bias, layout and dtype: a `Case` for each (seed, index).

The sizes are mostly small, since what goes wrong goes wrong there too and a hundred thousand
cases have to be feasible; a few lie on the borders of tiles and run to 3,000 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tests.campaign.case import Case, Spec

ALIGNS = ("bottom_right", "top_left")
BORDERS = (63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513)
LONG = (1023, 1024, 1025, 2047, 2048, 2049, 3000)
CELLS = ((0.003, 9_000_000), (0.04, 1_000_000), (1.0, 120_000))
"""How many cells all score matrices may have together, and in which share of the cases."""


@dataclass(frozen=True)
class Options:
    """What is drawn, beyond the defaults."""

    largest: int = 3000
    dtypes: tuple[str, ...] = ("float64",) * 4 + ("float32",) * 3 + ("bfloat16", "float16")
    packed: bool = True
    square: bool = False
    skip: frozenset[str] = frozenset()
    """What is left out: garbage, softcap, scale, lse, lowest, pairs; not compared: max."""


def draw(seed: int, index: int, options: Options = Options()) -> Case:
    """Return one case, the same for the same arguments."""
    return _Draw(Random(f"{seed}:{index}"), options).case()


class _Draw:
    def __init__(self, random: Random, options: Options) -> None:
        self.r, self.options = random, options

    def chance(self, share: float) -> bool:
        return self.r.random() < share

    def takes(self, feature: str, share: float) -> bool:
        return self.chance(share) and feature not in self.options.skip

    # -- sizes ------------------------------------------------------------------------------

    def length(self, least: int = 0) -> int:
        """Mostly small, sometimes around the border of a tile, rarely long."""
        turn = self.r.random()
        if turn < 0.87:
            return self.r.randint(max(least, 1), 20) if self.r.random() < 0.98 else least
        if turn < 0.975:
            return self.r.choice((self.r.randint(25, 130), *BORDERS[:6]))
        if turn < 0.9955:
            return self.r.choice((self.r.randint(130, 600), *BORDERS[6:]))
        return self.r.choice((self.r.randint(600, 3000), *LONG))

    def case(self) -> Case:
        r = self.r
        kv_heads, group = r.choice((1, 1, 2, 3)), r.choice((1, 1, 2, 3))
        batch = r.choice((1, 1, 2, 3)) if not self.chance(0.005) else 0
        packed = self.options.packed and self.chance(0.25)
        if packed:
            batch = r.randint(1, 5)
        lengths = self.sequences(batch if packed else 1)
        lengths = self.bounded(lengths, batch if not packed else 1)
        q, kv = max(n for n, _ in lengths), max(n for _, n in lengths)
        batch, kv_heads, group = self.affordable(q * kv, batch, packed, kv_heads, group)
        layout = "TND" if packed else r.choice(("BSND", "BNSD", "BSH", "SBH", "BSND"))
        self.heads, self.batch = kv_heads * group, batch
        self.lengths = lengths if packed else lengths * max(batch, 1)
        self.same = len(set(self.lengths)) == 1
        dim = (
            r.choice((1, 2, 3, 4, 8, 8, 16))
            if q * kv > 10_000
            else r.choice((1, 2, 4, 8, 16, 32, 64))
        )
        mask = self.mask()
        softcap = r.choice((0.5, 2.0, 30.0)) if self.takes("softcap", 0.15) else None
        bias = self.bias()
        return Case(
            mask=mask,
            bias=bias,
            layout=layout,
            batch=batch,
            q_len=sum(n for n, _ in lengths) if packed else q,
            kv_len=sum(n for _, n in lengths) if packed else kv,
            q_lens=tuple(n for n, _ in lengths) if packed else None,
            kv_lens=tuple(n for _, n in lengths) if packed else None,
            heads=self.heads,
            kv_heads=kv_heads,
            dim=dim,
            value_dim=dim if self.chance(0.7) else r.choice((1, 4, 5, 16)),
            dtype=self.dtype,
            scale=self.scale(),
            softcap=softcap,
            sink=self.chance(0.2),
            garbage=r.choice(("nan", "inf", "big")) if self.takes("garbage", 0.15) else "",
            module=self.chance(0.3) and batch > 0,
            strided=self.chance(0.3),
            lse=self.takes("lse", 0.3),
            seed=r.randrange(10**6) * 10,
        )

    def sequences(self, count: int) -> list[tuple[int, int]]:
        self.dtype = self.r.choice(self.options.dtypes)
        alike = self.chance(0.25)
        found: list[tuple[int, int]] = []
        for _ in range(count):
            q = min(self.length(), self.options.largest)
            kv = (
                q
                if self.chance(0.6) or self.options.square
                else min(self.length(), self.options.largest)
            )
            found.append(found[0] if alike and found else (q, kv))
        return found

    def bounded(self, lengths: list[tuple[int, int]], batch: int) -> list[tuple[int, int]]:
        """Halve what is too long for a dense oracle, one side of one sequence at a time."""
        turn = self.r.random()
        self.most = most = next(cells for share, cells in CELLS if turn <= share)
        while self._cells(lengths) > most:
            n = max(range(len(lengths)), key=lambda n: lengths[n][0] * lengths[n][1])
            q, kv = lengths[n]
            pair = (q // 2 + 1, kv) if self.chance(0.5) else (q, kv // 2 + 1)
            lengths = [pair if len(set(lengths)) == 1 or k == n else one
                       for k, one in enumerate(lengths)]  # fmt: skip
        return lengths

    @staticmethod
    def _cells(lengths: list[tuple[int, int]]) -> int:
        return len(lengths) * max(q for q, _ in lengths) * max(kv for _, kv in lengths)

    def affordable(
        self, cells: int, batch: int, packed: bool, kv_heads: int, group: int
    ) -> tuple[int, int, int]:
        """Fewer heads and batch elements where the matrices are large."""
        most = self.most
        if not packed and cells * batch * kv_heads * group > most:
            batch = min(batch, 1)
        if cells * batch * kv_heads * group > most:
            kv_heads = 1
        if cells * batch * group > most:
            group = 1
        return batch, kv_heads, group

    def scale(self) -> float | None:
        if not self.takes("scale", 0.4):
            return None
        return self.r.choice((0.0, -0.5, -1.0, 1.0, 3.0, 0.01, 1e-30, 1e-320, 40.0, 1e4, 1e8, -1e4))

    # -- masks ------------------------------------------------------------------------------

    def mask(self) -> Spec:
        mask = self.cut() if self.chance(0.08) else self.atom()
        for _ in range(self.r.choice((0, 0, 0, 1, 1, 1, 2, 3))):
            mask = (self.r.choice("&&&||-"), mask, self.atom())
        return ("~", mask) if self.chance(0.06) else mask

    def atom(self, heads: bool = True) -> Spec:
        """One mask that fits every sequence of the case."""
        r = self.r
        q, kv = self.lengths[0]
        align, size = r.choice(ALIGNS), self.size()
        kinds = [
            "Full", "Causal", "Causal", "SlidingWindow", "SlidingWindow", "Band", "Columns", "Rows",
            "Prefix", "PrefixLM", "Padding", "Padding", "Chunked", "BlockCausal", "Dilated",
            "Predicate", "Documents", "Dense", "Slices",
        ]  # fmt: skip
        kind = r.choice([*kinds, "PerHead", "PerHead"] if heads else kinds)
        if kind in ("Documents", "Dense", "Slices") and not (self.same and self.batch):
            kind = "SlidingWindow"
        if kind == "Dense" and q * kv * self.batch * self.heads > 2_000_000:
            kind = "Chunked"
        shortest = min(n for _, n in self.lengths)
        match kind:
            case "Full":
                return ("Full",)
            case "Causal":
                return ("Causal", align)
            case "SlidingWindow" | "Chunked" | "BlockCausal":
                return (kind, size, align)
            case "Dilated":
                return ("Dilated", r.choice((1, 2, 2, 3, 5, size)), align)
            case "Band":
                left, right = r.choice((None, size, size)), r.choice((None, 0, self.size()))
                if left is not None and self.chance(0.15):
                    left, right = -left, None if right is None else left + right
                return ("Band", left, right, align)
            case "Columns" | "Rows":
                start = r.choice((0, 0, self.size() - 1))
                return (kind, start, None if self.chance(0.4) else start + self.size())
            case "Prefix" | "PrefixLM":
                length: int | tuple[int, ...] = self.size() - 1
                if self.chance(0.4) and self.batch:
                    length = tuple(self.size() - 1 for _ in range(self.batch))
                return (kind, length) if kind == "Prefix" else (kind, length, align)
            case "Padding" if self.batch:
                lengths = tuple(r.randint(0, shortest) for _ in range(self.batch))
                return ("Padding", lengths, r.choice(("right", "right", "left")))
            case "Predicate":
                return self.predicate(heads)
            case "Documents":
                return self.documents(q, kv)
            case "Dense":
                return self.dense(q, kv, heads)
            case "Slices":
                return self.slices(q, kv)
            case "PerHead":
                return ("PerHead", tuple(self.atom(heads=False) for _ in range(self.heads)))
        return ("Causal", align)

    def size(self) -> int:
        """A size that matters at the case's lengths."""
        most = max(max(pair) for pair in self.lengths)
        return self.r.randint(1, max(1, self.r.choice((3, 8, most // 2, most, most + 2))))

    def predicate(self, heads: bool) -> Spec:
        name = self.r.choice(
            ("even", "thirds", "told_apart", "looks_back", "same_id", "by_keys_only",
             "last_axis", "whole_pair")
        )  # fmt: skip
        if name == "whole_pair" and "pairs" in self.options.skip:
            name = "even"
        if name in ("last_axis", "whole_pair") and max(max(p) for p in self.lengths) > 200:
            name = "even"
        if name == "told_apart" and not (heads and self.batch):
            name = "thirds"
        if name == "told_apart":
            return ("Predicate", name, self.batch, self.heads)
        return ("Predicate", name, None, None)

    def split(self, total: int, parts: int) -> tuple[int, ...]:
        ends = sorted(self.r.randint(0, total) for _ in range(parts - 1))
        return tuple(b - a for a, b in zip([0, *ends], [*ends, total], strict=True))

    def documents(self, q: int, kv: int) -> Spec:
        count = self.r.randint(1, 6)

        def lists(total: int, apart: bool) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
            if apart:
                return tuple(self.split(total, count) for _ in range(self.batch))
            return self.split(total, count)

        apart = self.chance(0.3)
        if q == kv and self.chance(0.6):
            return ("Documents", lists(q, apart), None)
        return ("Documents", lists(q, apart), lists(kv, apart))

    def dense(self, q: int, kv: int, heads: bool) -> Spec:
        shapes: list[tuple[int, ...]] = [(q, kv)]
        if heads:
            per_head = (self.heads, q, kv) if self.heads != self.batch else (1, self.heads, q, kv)
            shapes += [per_head, (self.batch, self.heads, q, kv), (1, self.heads, 1, kv)]
        shapes += [(self.batch, 1, q, kv), (self.batch, 1, 1, kv)]
        share = self.r.choice((0.1, 0.5, 0.9, 0.98))
        kind = self.r.choice(("noise", "noise", "causal", "almost"))
        how = self.r.choice(("keep", "drop"))
        return ("Dense", self.r.randrange(10**6), self.r.choice(shapes), share, how, kind)

    def slices(self, q: int, kv: int) -> Spec:
        def one() -> tuple[int | None, ...]:
            i = sorted(self.r.randint(0, q) for _ in range(2))
            j = sorted(self.r.randint(0, kv) for _ in range(2))
            lo = self.r.choice((None, self.r.randint(-q, kv)))
            hi = self.r.choice((None, self.r.randint(-q, kv)))
            if lo is not None and hi is not None and lo > hi:
                lo, hi = hi, lo
            return (*i, *j, lo, hi)

        def some() -> tuple[tuple[int | None, ...], ...]:
            return tuple(one() for _ in range(self.r.randint(1, 3)))

        apart = self.chance(0.3)
        return ("Slices", tuple(some() for _ in range(self.batch)) if apart else some(), q, kv)

    def cut(self) -> Spec:
        """A cut of a larger matrix down to the case's, in one of the ways it can be written."""
        kept = self.lengths
        i0, j0 = self.r.randint(0, 5), self.r.randint(0, 5)
        if not self.same or self.chance(0.4):
            # Both ranges run to the end: fits any lengths.
            self.lengths = [(i0 + q, j0 + kv) for q, kv in kept]
            part = self.free()
            self.lengths = kept
            return ("Cut", part, (i0, None), (j0, None), (None, None), False)
        q, kv = kept[0]
        rows, keys = i0 + q + self.r.randint(0, 4), j0 + kv + self.r.randint(0, 4)
        self.lengths = [(rows, keys)] * len(kept)
        fixed = self.batch and self.chance(0.4) and rows * keys < 100_000
        part = self.dense(rows, keys, True) if fixed else self.free()
        if fixed and self.chance(0.5):
            part = self.documents(rows, keys)
        self.lengths = kept
        return ("Cut", part, (i0, i0 + q), (j0, j0 + kv), (rows, keys), not fixed)

    def free(self) -> Spec:
        """An atom that fits any lengths."""
        for _ in range(50):
            found = self.atom(heads=False)
            if found[0] not in ("Documents", "Dense", "Slices", "Padding"):
                return found
        return ("Causal", "top_left")

    # -- biases -----------------------------------------------------------------------------

    def bias(self) -> tuple[Spec, ...]:
        if self.chance(0.5):
            return ()
        count = self.r.choice((1, 1, 1, 2, 3))
        found: list[Spec] = []
        while len(found) < count:
            one = self.addend()
            # Two of the lowest numbers have a sum that no dtype holds: it means nothing.
            if not (one[-1] == "lowest_rows" and any(s[-1] == "lowest_rows" for s in found)):
                found.append(one)
        return tuple(found)

    def addend(self) -> Spec:
        r = self.r
        q, kv = self.lengths[0]
        align, seed = r.choice(ALIGNS), r.randrange(10**6)
        grad = self.chance(0.5)
        dtype = self.dtype if self.chance(0.8) else r.choice(("float32", "float64"))
        kinds = ["ALiBi", "ALiBi", "SqrtALiBi", "LearnableALiBi", "T5Relative", "T5Relative"]
        alike = self.same and self.batch > 0
        if alike and q * kv * self.heads < 300_000:
            kinds += ["Dense", "Dense", "Dense", "Cut"]
        if alike or len({n for _, n in self.lengths}) == 1:
            kinds += ["KeyBias", "KeyBias"]
        match r.choice(kinds):
            case "ALiBi" | "SqrtALiBi" as kind:
                return (kind, self.slopes(), align)
            case "LearnableALiBi":
                return ("LearnableALiBi", self.heads, align, seed)
            case "T5Relative":
                both = self.chance(0.5)
                buckets = r.choice((4, 8, 32)) if both else r.choice((2, 4, 8, 32))
                far = buckets + r.choice((1, 4, 96))
                return ("T5Relative", self.heads, buckets, far, both, align, seed, dtype, grad)
            case "KeyBias":
                shapes = ((kv,), (self.heads, kv), (max(self.batch, 1), self.heads, kv), (1, 1, kv))
                return ("KeyBias", r.choice(shapes), seed, dtype, grad)
            case "Dense":
                return self.dense_bias(q, kv, seed, dtype, grad)
            case _:
                return self.cut_bias(q, kv, align, seed, dtype, grad)

    def dense_bias(self, q: int, kv: int, seed: int, dtype: str, grad: bool) -> Spec:
        shapes = [(q, kv), (self.heads, q, kv), (1, 1, q, kv), (self.batch, self.heads, q, kv)]
        if self.takes("lowest", 0.08):
            return ("Dense", self.r.choice(shapes), seed, dtype, False, False, "lowest_rows")
        side = self.chance(0.3)
        return ("Dense", self.r.choice(shapes), seed, dtype, grad, side, "numbers")

    def cut_bias(self, q: int, kv: int, align: str, seed: int, dtype: str, grad: bool) -> Spec:
        i0, j0 = self.r.randint(0, 4), self.r.randint(0, 4)
        whole = i0 + q + self.r.randint(0, 3), j0 + kv + self.r.randint(0, 3)
        part: Spec = self.r.choice((
            ("ALiBi", self.slopes(), align),
            ("SqrtALiBi", self.slopes(), align),
            ("LearnableALiBi", self.heads, align, seed),
            ("T5Relative", self.heads, 8, 20, True, align, seed, dtype, grad),
            ("KeyBias", (whole[1],), seed, dtype, grad),
            ("Dense", whole, seed, dtype, grad, False, "numbers"),
        ))  # fmt: skip
        return ("Cut", part, (i0, i0 + q), (j0, j0 + kv), whole)

    def slopes(self) -> int | tuple[float, ...]:
        if self.chance(0.7):
            return self.heads
        return tuple(self.r.choice((0.0, 0.5, 1.0, -0.3, 0.01)) for _ in range(self.heads))
