"""`Request`: everything a plan depends on, as one frozen record; and how it is read off tensors.

The record holds no tensors: two calls with equal records share a plan.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from attnkit import layouts
from attnkit.arguments import FLOATS, Anchor, check_bool, check_int, check_number, check_tensor
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.layouts import Layout, SeqLens, Sizes, as_seqlens
from attnkit.masks import Full, Mask
from attnkit.masks.base import anchor
from attnkit.masks.parse import as_mask
from attnkit.planner.matrices import Matrices
from attnkit.planner.repeats import is_repeatable
from attnkit.planner.scoring import ScoreFunction, check_score_fn, trains
from attnkit.pse import Align, Linear, PerCell, PerKey, Pse, Root, Stepped, Structure, Toeplitz
from attnkit.pse.parse import as_pse
from attnkit.pse.structure import OfDistance
from attnkit.ranges import Ranges
from attnkit.strips import seen_spans

__all__ = [
    "BiasTerm",
    "Composition",
    "Request",
    "Share",
    "check_fits",
    "read_request",
    "read_sizes",
    "state_of",
]


_ALIGNS: tuple[Align, ...] = ("bottom_right", "top_left")


class DistanceHulls(dict[Anchor, tuple[int, int]]):
    """The smallest and the largest distance of some cells, by where distances are counted from.

    >>> found = DistanceHulls(top_left=(-3, 0))
    >>> found[2]
    (-5, -2)
    """

    def __missing__(self, key: Anchor) -> tuple[int, int]:
        """Count from the key that query 0 stands at: it is 0 from the upper left corner."""
        if not isinstance(key, int):
            raise KeyError(key)
        lo, hi = self["top_left"]
        return lo - key, hi - key


@dataclass(frozen=True)
class BiasTerm:
    """What a plan may know of one addend of the bias; values are bound when the plan runs.

    `structure` is what its cells follow from, where that is less than a matrix.
    """

    text: str
    key: Hashable
    before_scale: bool = False
    requires_grad: bool = False
    structure: Structure | None = None
    dtype: torch.dtype | None = None
    batch: int | None = None
    extent: tuple[int | None, int | None] = (None, None)

    @classmethod
    def of(cls, part: Pse) -> BiasTerm:
        """Describe one addend. A gradient that is not recorded now is none that is asked for."""
        known = part.structure
        if part.before_scale and not isinstance(known, Toeplitz | PerCell):
            known = None  # the others are added after the scale
        return cls(
            repr(part),
            part.key(),
            part.before_scale,
            part.requires_grad and torch.is_grad_enabled(),
            known,
            dtype=next((tensor.dtype for tensor in part.tensors), None),
            batch=part.batch,
            extent=part.extent,
        )

    @property
    def align(self) -> Anchor:
        """From which end the distances are counted, where it is one of distances."""
        return self.structure.align if isinstance(self.structure, OfDistance) else "bottom_right"

    @property
    def by_distance(self) -> bool:
        """Whether ``j - i`` and the head are all that its cells depend on."""
        return isinstance(self.structure, OfDistance)

    @property
    def slopes(self) -> tuple[float, ...] | None:
        """The slopes of distances, or of their roots, where these are constants."""
        return self.structure.slopes if isinstance(self.structure, Linear | Root) else None

    @property
    def sloped(self) -> bool:
        """Whether the kernel can compute it from one number per head, which must not train."""
        return isinstance(self.structure, Linear | Root) and not self.requires_grad

    @property
    def low_rank(self) -> bool:
        """Whether channels of query and key can hold it, or levels can."""
        return isinstance(self.structure, Linear | PerKey | Stepped)


@dataclass(frozen=True)
class Composition:
    """What the author asks for, without shapes: the arguments that `Attention` is built from.

    Everything is checked here, as far as it can be without tensors, so that a module with an
    impossible composition fails when it is built.
    """

    mask: Mask = Full()  # noqa: RUF009 -- a frozen value
    pse: Pse | None = None
    layout: str = "BSND"
    scale: float | None = None
    dropout: float = 0.0
    softcap: float | None = None
    score_fn: ScoreFunction | None = None
    deterministic: bool = False
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", as_mask(self.mask))
        object.__setattr__(self, "pse", as_pse(self.pse))
        object.__setattr__(self, "layout", layouts.get(self.layout).name)  # an alias is another
        if self.scale is not None:
            rule = "finite, or None for 1/sqrt(head_dim)"
            check_number("scale", self.scale, math.isfinite, rule)
        if self.softcap is not None:
            rule = "above 0 and finite, or None for none"
            check_number("softcap", self.softcap, lambda c: 0 < c < math.inf, rule)
        rule = "at least 0 and below 1: the share that is dropped"
        check_number("dropout", self.dropout, lambda p: 0 <= p < 1, rule)
        check_score_fn(self.score_fn)
        check_bool("deterministic", self.deterministic, "True for the same bits in every run")
        if self.memory_limit is not None:
            check_int("memory_limit", self.memory_limit, 1)


def state_of(record: Any) -> dict[str, Any]:
    """Return the fields of a record: what it keeps beside them stays in this process."""
    return {item.name: getattr(record, item.name) for item in fields(record)}


@dataclass(frozen=True)
class Share:
    """Which rows, keys and heads of a larger attention a request has: its results are merged.

    So its output and its gradients are handed on in the dtype of the statistics, unrounded, and
    its gradients take the statistics of whole rows. Positions are those of the whole's axes of
    queries and of keys (of a packed batch: of its tokens), in the order in which the request has
    them. Dropout decides by them, so that the shares drop what the whole would; `local_dropout`
    leaves that to each share, as a kernel must that counts cells by its own calls.
    """

    q_len: int
    kv_len: int
    rows: Ranges
    keys: Ranges
    num_heads: int
    first_head: int = 0
    local_dropout: bool = False


@dataclass(frozen=True)
class Request:
    """A composition with the shapes, dtype and device it is wanted for.

    Dense layouts: `batch` score matrices per head, each ``q_len x kv_len``. Packed: `seqlens`
    says what each is, `batch` counts the sequences, and `q_len` and `kv_len` count all tokens.
    """

    mask: Mask
    bias: tuple[BiasTerm, ...]
    layout: str
    batch: int
    q_len: int
    kv_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: str
    scale: float
    dropout: float = 0.0
    sink: bool = False
    softcap: float | None = None
    seqlens: SeqLens | None = None
    needs_grad: bool = False
    transformed: bool = False
    """Whether a transform of `torch.func` (grad, vmap, jvp) is at work on the tensors."""
    score_fn: ScoreFunction | None = None
    score_trains: bool = False
    """Whether a tensor that the score function reads asks for a gradient."""
    deterministic: bool = False
    memory_limit: int | None = None
    share: Share | None = None
    """What of a larger attention it is, where its results are merged with those of others."""

    __getstate__ = state_of

    @property
    def layout_of(self) -> Layout:
        """The layout as an object."""
        return layouts.get(self.layout)

    @cached_property
    def sequences(self) -> tuple[tuple[int, int], ...]:
        """``(q_len, kv_len)`` of every score matrix: per batch element or packed sequence."""
        if self.seqlens is None:
            return ((self.q_len, self.kv_len),) * self.batch
        return tuple(zip(self.seqlens.q, self.seqlens.kv, strict=True))

    @cached_property
    def token_starts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where each score matrix's queries and keys start when packed, the totals last."""
        lengths = zip(*self.sequences, strict=True) if self.sequences else ((), ())
        queries, keys = (tuple(accumulate(one, initial=0)) for one in lengths)
        return queries, keys

    @cached_property
    def matrices(self) -> Matrices:
        """The score matrices as regions: what the mask allows of each."""
        return Matrices.of(self.mask, self.sequences)

    @cached_property
    def distances(self) -> DistanceHulls:
        """The smallest and largest distance ``j - i'`` of an allowed cell; (0, 0) for none."""
        planes = self.matrices.planes
        pairs = {p for plane in planes for p in zip(plane, self.sequences, strict=True)}
        boxes = [(e.outer.bounds, sizes) for e, sizes in pairs]
        found = DistanceHulls()
        for align in _ALIGNS:
            ends = [(b.lo - at, b.hi - at) for b, s in boxes if b for at in (anchor(align, *s),)]
            lows, highs = zip(*ends, strict=True) if ends else ((0,), (0,))
            found[align] = min(lows), max(highs)
        return found

    def like(self, changed: Request) -> Request:
        """Return a request for the same mask and lengths, with what is known of these.

        Another head size or bias changes neither.
        """
        same = (self.mask, self.batch, self.q_len, self.kv_len, self.seqlens)
        if same == (changed.mask, changed.batch, changed.q_len, changed.kv_len, changed.seqlens):
            kept = ("sequences", "token_starts", "matrices", "distances")
            vars(changed).update({name: vars(self)[name] for name in kept if name in vars(self)})
        return changed

    @cached_property
    def sees_all_keys(self) -> bool:
        """Whether regions alone tell that some query sees each key, in every score matrix."""
        lengths = [kv_len for _, kv_len in self.sequences]
        pairs = {p for plane in self.matrices.planes for p in zip(plane, lengths, strict=True)}
        return all(
            known.exact and seen_spans(known.outer.strips) == [(0, kv_len)]
            for known, kv_len in pairs
            if kv_len or not known.exact
        )

    def shapes(self, layout: str | None = None) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of query, key and value in a layout: by default the request's."""
        packed = self.seqlens is not None
        batch = 1 if packed else self.batch
        form = layouts.get(layout or self.layout)
        return (
            form.shape(Sizes(batch, self.q_len, self.num_heads, self.head_dim)),
            form.shape(Sizes(batch, self.kv_len, self.num_kv_heads, self.head_dim)),
            form.shape(Sizes(batch, self.kv_len, self.num_kv_heads, self.value_dim)),
        )


def is_transformed() -> bool:
    """Return whether a transform of `torch.func` is at work, which kernels cannot follow."""
    return bool(torch._C._are_functorch_transforms_active())


def bias_terms(pse: Pse | None) -> tuple[BiasTerm, ...]:
    """Describe every addend of a bias."""
    return () if pse is None else tuple(BiasTerm.of(part) for part in pse.parts)


def read_request(
    composition: Composition,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    seqlens: SeqLens | None = None,
    sink: Tensor | None = None,
    training: bool = False,
) -> Request:
    """Return the request that a composition and tensors make, after checking all of it.

    Nothing is computed and no tensor content is read. Raises `CompositionError` (or its
    TypeError form) that names the tensors, the rule and the remedy.
    """
    layout = layouts.get(composition.layout)
    q, k, v = read_sizes(layout, (query, key, value), num_heads, num_kv_heads, head_dim)
    _check_seqlens(layout, seqlens, q, k)
    batch = len(seqlens) if seqlens is not None else q.batch
    each = (query, key, value, *_check_carried(composition.pse, sink, query, q.heads))
    scale = composition.scale if composition.scale is not None else q.dim**-0.5
    pse, score_fn = composition.pse, composition.score_fn
    score_trains = trains(score_fn, query)
    request = Request(
        mask=composition.mask.form,
        bias=bias_terms(pse),
        layout=layout.name,
        batch=batch,
        q_len=q.length,
        kv_len=k.length,
        num_heads=q.heads,
        num_kv_heads=k.heads,
        head_dim=q.dim,
        value_dim=v.dim,
        dtype=query.dtype,
        device=query.device.type,
        scale=float(scale),
        dropout=composition.dropout if training else 0.0,
        sink=sink is not None,
        softcap=composition.softcap,
        seqlens=seqlens,
        needs_grad=score_trains or (torch.is_grad_enabled() and any(t.requires_grad for t in each)),
        transformed=is_transformed(),
        score_fn=score_fn,
        score_trains=score_trains,
        deterministic=is_repeatable(composition.deterministic, query.device.type, score_trains),
        memory_limit=composition.memory_limit,
    )
    check_fits(request, composition.mask, pse)
    return request


def check_fits(request: Request, mask: Mask, pse: Pse | None) -> None:
    """Check that a mask and a bias fit the score matrices of a request."""
    for sizes in sorted(set(request.sequences)):
        mask.check(*sizes, request.batch, request.num_heads)
        if pse is not None:
            pse.check(*sizes, request.batch, request.num_heads)


def read_sizes(
    layout: Layout,
    tensors: tuple[Tensor, Tensor, Tensor],
    num_heads: int | None,
    num_kv_heads: int | None,
    head_dim: int | None,
) -> tuple[Sizes, Sizes, Sizes]:
    """Return the sizes of query, key and value, after checking all that follows from these."""
    _check_tensors(*tensors)
    found = _read_sizes(layout, tensors, num_heads, num_kv_heads, head_dim)
    _check_sizes(layout, *found)
    return found


def _read_sizes(
    layout: Layout,
    tensors: tuple[Tensor, Tensor, Tensor],
    num_heads: int | None,
    num_kv_heads: int | None,
    head_dim: int | None,
) -> tuple[Sizes, Sizes, Sizes]:
    """Return the sizes of query, key and value, and check them against what is said of heads."""
    counts = (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim))
    for name, count in counts:
        if count is not None:
            check_int(name, count, 1)
    query, key, value = (tensor.shape for tensor in tensors)
    q = layout.sizes(query, num_heads, what="query")
    merged_dim = q.dim if layout.merges_heads and num_kv_heads is None else None
    k = layout.sizes(key, num_kv_heads, head_dim=merged_dim, what="key")
    v = layout.sizes(value, k.heads if layout.merges_heads else None, what="value")
    if head_dim is not None and q.dim != head_dim:
        raise CompositionError(
            f"query {list(query)} has heads of {q.dim} dimensions; this module was built "
            f"with head_dim={head_dim}"
        )
    return q, k, v


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    named = (("query", query), ("key", key), ("value", value))
    for name, tensor in named:
        check_tensor(name, tensor)
    if query.dtype not in FLOATS:
        raise CompositionTypeError(
            f"query has dtype {query.dtype}; attention computes in "
            f"{', '.join(str(d).removeprefix('torch.') for d in FLOATS)}: cast the inputs"
        )
    same_dtype = query.dtype == key.dtype == value.dtype
    if same_dtype and query.device == key.device == value.device:
        return
    told = ", ".join(f"{name} {t.dtype} on {t.device}" for name, t in named)
    if not same_dtype:
        raise CompositionTypeError(f"{told}: the dtypes differ; cast them to one dtype first")
    raise CompositionError(f"{told}: the devices differ; move them to one device first")


def _check_carried(
    pse: Pse | None, sink: Tensor | None, query: Tensor, heads: int
) -> tuple[Tensor, ...]:
    """Check the tensors that are not query, key or value, and return them.

    A query on the meta device is only planned for, so the others may stay where they are.
    """
    if sink is not None:
        if cast(object, sink) is True:
            raise CompositionTypeError(
                f"sink=True; here it is the logits themselves, a tensor [{heads}] (a module learns "
                "its own: ak.Attention(..., sink=True))"
            )
        check_tensor("sink", sink)
        if not sink.is_floating_point():
            raise CompositionTypeError(
                f"sink is of type {sink.dtype}; it must be a floating tensor [{heads}], one logit "
                "per query head"
            )
        if tuple(sink.shape) != (heads,):
            raise CompositionError(
                f"sink {list(sink.shape)}: a sink is one logit per query head, [{heads}] here"
            )
    named = [(f"the bias {pse!r}", tensor) for tensor in (pse.tensors if pse is not None else ())]
    named += [("sink", sink)] if sink is not None else []
    for name, tensor in named:
        if tensor.device != query.device and not query.is_meta:
            raise CompositionError(
                f"{name} is on {tensor.device}, the query on {query.device}; move it there once, "
                "when it is made"
            )
    return tuple(tensor for _, tensor in named)


def _check_sizes(layout: Layout, q: Sizes, k: Sizes, v: Sizes) -> None:
    wrong = None
    if q.dim != k.dim:
        wrong = f"query and key have heads of {q.dim} and {k.dim} dimensions; q.k needs them equal"
    elif k.heads != v.heads:
        wrong = f"key has {k.heads} heads and value {v.heads}; give both the same"
    elif q.heads % k.heads:
        wrong = (
            f"{q.heads} query heads do not divide into groups over {k.heads} key heads; the number "
            "of query heads must be a multiple of it"
        )
    elif k.length != v.length:
        wrong = f"key has {k.length} positions and value {v.length}; each key needs a value"
    elif not q.batch == k.batch == v.batch:
        wrong = (
            f"the batch sizes are {q.batch}, {k.batch}, {v.batch}; nothing is broadcast, expand "
            "the tensors first"
        )
    if wrong is not None:
        named = (("query", q), ("key", k), ("value", v))
        shapes = ", ".join(f"{name} {list(layout.shape(sizes))}" for name, sizes in named)
        raise CompositionError(f"{shapes} in layout {layout}: {wrong}")


def _check_seqlens(layout: Layout, seqlens: SeqLens | None, q: Sizes, k: Sizes) -> None:
    seqlens = as_seqlens(seqlens)
    if layout.packed and seqlens is None:
        raise CompositionError(
            f"layout {layout} packs sequences into one token axis; say where they end: "
            "seqlens=ak.SeqLens([...])"
        )
    if not layout.packed and seqlens is not None:
        raise CompositionError(
            f"layout {layout} has a batch axis and takes no seqlens; use layout='TND' for packed "
            "sequences, or a mask (masks.Documents, masks.Padding) for lengths inside a row"
        )
    if seqlens is not None:
        seqlens.check_totals(q.length, k.length)
