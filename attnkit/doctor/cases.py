"""The conformance cases, as data: compositions, the sizes they run with, and forced calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnkit import layouts, masks, pse
from attnkit.backends import BACKENDS, Operands
from attnkit.geometry import Region, Slice
from attnkit.kernel import AttenMask
from attnkit.layouts import SeqLens, Sizes
from attnkit.masks import Mask
from attnkit.planner.scoring import ScoreFunction
from attnkit.pse import Pse

__all__ = ["CASES", "OTHER_CASES", "Case", "Inputs", "Regions", "cases_of"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Inputs(Operands):
    """The tensors of a case: what its plan runs on, and the output's gradient."""

    grad: Tensor


@dataclass(frozen=True)
class Case:
    """One composition and the sizes it runs with.

    - `pse` is a bias without tensors, `matrix` the shape of a random bias matrix beside it.
    - `call` forces arguments of the kernel call, by name, where the planner would take others;
      the composition is then whatever the kernel's contract says that this call computes.
    - `learned` lets the bias matrix want a gradient.
    - `merges` asks for calls that merge, with keys side by side, where others would be cheaper;
      `gathers` for calls that gather keys from several places, with every row once.
    - `dropout` above 0 makes it a case about dropout: its statistics and its backward.
    - `quick` cases are those of the quick suite.
    """

    name: str
    mask: Mask = masks.Full()  # noqa: RUF009 -- a frozen value
    pse: Pse | None = None
    matrix: tuple[int, ...] = ()
    before_scale: bool = False
    learned: bool = False
    layout: str = "BSND"
    batch: int = 2
    q_len: int = 24
    kv_len: int = 24
    heads: int = 4
    kv_heads: int = 4
    dim: int = 16
    value_dim: int = 16
    seqlens: SeqLens | None = None
    sink: bool = False
    scale: float | None = None
    softcap: float | None = None
    score_fn: ScoreFunction | None = None
    call: tuple[tuple[str, Any], ...] = ()
    merges: bool = False
    gathers: bool = False
    dropout: float = 0.0
    group: str = ""
    quick: bool = True

    @property
    def composition(self) -> str:
        """The composition in one line, for people."""
        parts = ["a forced call" if self.call else repr(self.mask)]
        parts += [f"{name}={value}" for name, value in self.call]
        parts += [repr(self.pse)] if self.pse is not None else []
        if self.matrix:
            when = " before the scale" if self.before_scale else ""
            learned = "learned " if self.learned else ""
            parts.append(f"{learned}bias matrix {list(self.matrix)}{when}")
        parts += ["sink"] if self.sink else []
        parts += [f"scale {self.scale:g}"] if self.scale is not None else []
        parts += [f"soft-cap {self.softcap:g}"] if self.softcap is not None else []
        parts += [f"score function {self.score_fn.__name__}"] if self.score_fn is not None else []
        parts += [f"dropout {self.dropout:g}"] if self.dropout else []
        sizes = f"batch {self.batch}, {self.q_len} x {self.kv_len}"
        if self.seqlens is not None:
            sizes = f"{self.seqlens}"
        heads = f"{self.heads}" + (f" on {self.kv_heads}" if self.kv_heads != self.heads else "")
        return f"{', '.join(parts)}; {self.layout}, {sizes}, {heads} heads of {self.dim}"

    @property
    def sizes(self) -> tuple[Sizes, Sizes, Sizes]:
        """The sizes of query, key and value."""
        batch, q_len, kv_len = self.batch, self.q_len, self.kv_len
        if self.seqlens is not None:
            batch, q_len, kv_len = 1, self.seqlens.total_q, self.seqlens.total_kv
        key = Sizes(batch, kv_len, self.kv_heads, self.dim)
        return Sizes(batch, q_len, self.heads, self.dim), key, replace(key, dim=self.value_dim)

    def inputs(self, dtype: torch.dtype) -> Inputs:
        """Return the case's tensors on the CPU: drawn in float64, rounded to `dtype`."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        shape = layouts.get(self.layout).shape
        output = replace(self.sizes[0], dim=self.value_dim)
        query, key, value, grad = (draw(*shape(sizes)) for sizes in (*self.sizes, output))
        bias = self.pse
        if self.matrix:
            numbers = draw(*self.matrix).requires_grad_(self.learned)
            matrix = pse.Dense(numbers, before_scale=self.before_scale)
            bias = matrix if bias is None else bias + matrix
        sink = draw(self.heads) if self.sink else None
        return Inputs(query, key, value, bias, sink, grad=grad)


@dataclass(frozen=True, repr=False)
class Regions(Mask):
    """The cells that a forced call computes: a region, or one per batch element or sequence."""

    parts: tuple[Region, ...]

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        return self.parts[batch if len(self.parts) > 1 else 0]

    @property
    def batches(self) -> int | None:
        """One entry per region, where there are several."""
        return len(self.parts) if len(self.parts) > 1 else None

    def __repr__(self) -> str:
        return "the set of the forced call"


def _checkers(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (i + j) % 3 != 1


def leaning(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Return a score that depends on everything that a score function is told."""
    return score * (1 + 0.1 * h) - 0.05 * (i - j) + 0.1 * b


_CAUSAL = masks.Causal()
_WINDOW = _CAUSAL & masks.SlidingWindow(5)
_EVEN = SeqLens([9, 4, 11])
_LONGER = SeqLens([50, 64, 30])
_UNEVEN = SeqLens([5, 0, 12, 7], [5, 3, 12, 9])
_WINDOW_AND_START = _WINDOW | (_CAUSAL & masks.Columns(0, 2))
_HEADS = masks.PerHead([_CAUSAL, masks.Full(), masks.Band(2, 2), _CAUSAL])
_BLOCKS = masks.Blocks(torch.tensor([[1, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]]).bool(), 6, 8)
_SQUARE = AttenMask.full((24, 24), [Region.of(Slice(0, 24, 0, 24, lo=-9, hi=4))])
_PREFIXED = AttenMask.full(
    (2, 1, 24, 24),
    [Region.of(Slice(0, 24, 0, 24, hi=0)) | Region.of(Slice(0, 24, 0, n)) for n in (6, 11)],
)
_CUT = (("atten_mask", AttenMask.causal()), ("pre_tokens", 24))
_WIDE: dict[str, Any] = {"q_len": 64, "kv_len": 64}
# Longer than one tile of the emulator, and of most kernels.
_TILES: dict[str, Any] = {"batch": 1, "q_len": 400, "kv_len": 400, "heads": 2}
_TILES |= {"dim": 64, "value_dim": 64, "quick": False}
# Value heads as wide as there are keys: with the unit matrix for values, weights can be read.
_DROP: dict[str, Any] = {"dropout": 0.25, "dim": 64, "value_dim": 64, **_WIDE}

_CASES = {
    "sparse modes": (
        Case("full"),
        Case("mode-0-mask", call=(("atten_mask", _SQUARE), ("pre_tokens", 9), ("next_tokens", 4))),
        Case("mode-1", call=(("atten_mask", _SQUARE), ("sparse_mode", 1))),
        Case("mode-2", masks.Causal(align="top_left"), q_len=16, kv_len=40),
        Case("mode-3", _CAUSAL),
        Case("mode-3-chunk", _CAUSAL, q_len=8, kv_len=40),
        Case("mode-3-one-query", _CAUSAL, q_len=1, kv_len=40),
        Case("mode-4-window", _WINDOW),
        Case("mode-4-chunk", _WINDOW, q_len=8, kv_len=40),
        Case("mode-4-band", masks.Band(3, 4)),
        Case("mode-5", call=(("atten_mask", _PREFIXED), ("sparse_mode", 5), ("prefix", (6, 11)))),
        Case("mode-6", masks.PrefixLM(6)),
        Case("mode-6-per-batch", masks.PrefixLM((6, 11))),
        Case(
            "mode-7",
            layout="TND",
            seqlens=SeqLens([9, 4, 11], [9, 4, 14]),
            call=(*_CUT, ("sparse_mode", 7), ("next_tokens", -2)),
        ),
        Case(
            "mode-8",
            layout="TND",
            seqlens=_EVEN,
            call=(*_CUT, ("sparse_mode", 8), ("next_tokens", 2)),
        ),
        Case("mode-3-tiles", _CAUSAL, kv_heads=1, **_TILES),
        Case("mode-4-tiles", _CAUSAL & masks.SlidingWindow(150), kv_heads=1, **_TILES),
        Case("mode-6-tiles", masks.PrefixLM(170), kv_heads=1, **_TILES),
    ),
    "masks": (
        Case("chunked", _CAUSAL & masks.Chunked(8)),
        Case("block-causal", masks.BlockCausal(6)),
        Case("documents", masks.Documents([7, 11, 6]) & _CAUSAL),
        Case("documents-per-batch", masks.Documents([[7, 17], [12, 12]]) & _CAUSAL),
        Case("padding", masks.Padding((24, 13))),
        Case("padding-left", masks.Padding((24, 13), side="left") & _CAUSAL),
        Case("dilated", masks.Dilated(2) & _CAUSAL),
        Case("predicate", masks.Predicate(_checkers)),
    ),
    "empty rows": (
        Case("empty-rows", masks.Rows(3, 9)),
        Case("empty-rows-causal", _CAUSAL, q_len=40, kv_len=24),
        Case(
            "empty-rows-mask",
            call=(
                ("atten_mask", AttenMask.full((24, 24), [Region.of(Slice(4, 24, 0, 24, hi=-4))])),
                ("sparse_mode", 1),
                ("inner_precise", 2),
            ),
        ),
        Case("empty-sequences", _CAUSAL, layout="TND", seqlens=_UNEVEN),
        Case("sequence-without-keys", layout="TND", seqlens=SeqLens([3, 4], [0, 9])),
    ),
    "merged calls": (
        Case("merge-two-calls", _WINDOW_AND_START, merges=True, **_WIDE),
        Case("merge-two-calls-sink", _WINDOW_AND_START, sink=True, merges=True, **_WIDE),
        Case("merge-packed", _WINDOW_AND_START, layout="TND", seqlens=_LONGER, merges=True),
        # Heads with a bias of their own are not folded into the batch.
        Case("merge-heads", _HEADS, pse.ALiBi(4), merges=True),
        Case(
            "merge-tiles",
            (_CAUSAL & masks.SlidingWindow(100)) | (_CAUSAL & masks.Columns(0, 20)),
            merges=True,
            kv_heads=2,
            **_TILES,
        ),
    ),
    "gathered keys": (
        Case("gather-start", _WINDOW_AND_START, gathers=True, **_WIDE),
        Case("gather-blocks", _BLOCKS, kv_heads=2, gathers=True),
        Case("gather-blocks-causal", _BLOCKS & _CAUSAL, gathers=True),
        Case("gather-heads", masks.PerHead([_BLOCKS, ~_BLOCKS] * 2), gathers=True),
        Case("gather-grid", masks.Neighborhood((6, 8), 5), q_len=48, kv_len=48, gathers=True),
    ),
    "biases": (
        Case("alibi", _CAUSAL, pse.ALiBi(4)),
        Case("alibi-chunk", _CAUSAL, pse.ALiBi(4), q_len=8, kv_len=40),
        Case("alibi-window", _WINDOW, pse.ALiBi(4)),
        Case("alibi-packed", _CAUSAL, pse.ALiBi(4), layout="TND", seqlens=_EVEN),
        Case("sqrt-alibi", _CAUSAL, pse.SqrtALiBi(4)),
        Case("matrix", _CAUSAL, matrix=(4, 24, 24)),
        Case("matrix-before-scale", _CAUSAL, matrix=(4, 24, 24), before_scale=True),
        Case("matrix-per-batch", matrix=(2, 4, 24, 24)),
        Case("sink", _CAUSAL, sink=True),
        Case("sink-packed", _CAUSAL, layout="TND", seqlens=_EVEN, sink=True),
    ),
    "layouts and heads": (
        *(Case(name.lower(), _CAUSAL, layout=name, kv_heads=2) for name in ("BSH", "SBH", "BNSD")),
        Case("bsnd", _CAUSAL, kv_heads=2),
        Case("tnd", _CAUSAL, layout="TND", seqlens=_EVEN, kv_heads=2),
        Case("tnd-full", layout="TND", seqlens=_EVEN),
        Case("tnd-window", _CAUSAL & masks.SlidingWindow(3), layout="TND", seqlens=_UNEVEN),
        Case("tnd-prefix", masks.PrefixLM(3), layout="TND", seqlens=_EVEN),
        Case("one-key-head", _CAUSAL, kv_heads=1),
        Case("smaller-values", _CAUSAL, value_dim=8),
        Case("scale", _CAUSAL, scale=0.37),
    ),
    "dropout": (
        Case("dropout-full", **_DROP),
        Case("dropout-causal", _CAUSAL, **_DROP),
        Case("dropout-heads", _CAUSAL, layout="BNSD", kv_heads=2, **_DROP),
        Case("dropout-sbh", _CAUSAL, layout="SBH", **_DROP),
        Case("dropout-packed", _CAUSAL, layout="TND", seqlens=_LONGER, **_DROP),
        Case("dropout-merge", _WINDOW_AND_START, merges=True, **_DROP),
    ),
}

# Sizes that no tile divides, with heads as models have them.
_ODD: dict[str, Any] = {"batch": 1, "q_len": 200, "kv_len": 333, "heads": 4, "kv_heads": 2}
_ODD |= {"dim": 64, "value_dim": 64}
_LONG = SeqLens([130, 1, 257])

_OTHER_CASES = {
    "other kernels": (
        Case("softcap", _CAUSAL, softcap=2.0),
        Case("softcap-alibi", _WINDOW, pse.ALiBi(4), softcap=2.0),
        Case("softcap-sink", _CAUSAL, softcap=2.0, sink=True, kv_heads=2),
        Case("score-function", _WINDOW, score_fn=leaning),
        Case("score-function-packed", _CAUSAL, score_fn=leaning, layout="TND", seqlens=_EVEN),
        Case("learned-matrix", _CAUSAL, matrix=(4, 24, 24), learned=True),
        Case("learned-matrix-shared", matrix=(1, 4, 24, 24), learned=True, before_scale=True),
        Case("odd-full", **_ODD),
        Case("odd-causal", masks.Causal(align="top_left"), **_ODD),
        Case("odd-window", _CAUSAL & masks.SlidingWindow(150), **_ODD),
        Case("odd-sink", _CAUSAL & (masks.SlidingWindow(70) | masks.Prefix(4)), sink=True, **_ODD),
        Case("odd-alibi", _CAUSAL, pse.ALiBi(4), **_ODD),
        Case("odd-packed", _CAUSAL, layout="TND", seqlens=_LONG, kv_heads=2, dim=64, value_dim=64),
        Case("heads-of-128", _CAUSAL, kv_heads=1, dim=128, value_dim=128),
        Case("heads-of-80", _CAUSAL, dim=80, value_dim=80),
    ),
}


def _grouped(groups: Mapping[str, tuple[Case, ...]]) -> tuple[Case, ...]:
    return tuple(replace(case, group=group) for group, cases in groups.items() for case in cases)


CASES = _grouped(_CASES)
"""Every case of the fused kernel's suite, in the order in which it runs."""

OTHER_CASES = _grouped(_OTHER_CASES)
"""What backends without calls of the fused kernel are asked beside it."""


def cases_of(backend: str) -> tuple[Case, ...]:
    """Return the cases of a backend's suite."""
    return CASES if BACKENDS[backend].by_calls else (*CASES, *OTHER_CASES)
