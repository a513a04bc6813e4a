"""A few query rows over many keys, as a decoding step has them: one product per run of keys.

What counts here is that keys and values are read once. So the query heads that share a key head
are rows of one product, and of the keys nothing is read but the runs that some row sees.

Nothing here is laid out ahead: which keys the rows see is read off the mask's region when the
plan runs. So a plan of a few rows serves every mask and every number of keys (`TiledPlan.at`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnkit.backends.base import Stats, stats_dtype
from attnkit.backends.numbers import bounded, usable_cap
from attnkit.backends.reference import bias_of
from attnkit.backends.tiled.job import HUGE_SCALE
from attnkit.geometry import Region
from attnkit.planner import Request
from attnkit.pse import Pse
from attnkit.strips import gaps, seen_spans

__all__ = ["Few", "is_few"]

# Rows of a step, and of the product that they become. Beyond, tiles are as fast.
MOST_ROWS, MOST_FOLDED = 32, 128
# Up to so many rows of a product, torch's fused kernel is slower than operators: measured on one
# AVX-512 core. In bfloat16 these need cast copies, and it is faster from as many on.
FUSED_ROWS = 4

# Up to so many stretches are filled one by one.
FEW_FILLS = 4

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

Span = tuple[int, int]


class Sight(NamedTuple):
    """What the rows of some batch elements see.

    `spans` are the keys that some row sees. `hidden` are columns of these, end to end, that a row
    does not see: (row, first, after the last). `blank` rows see nothing.
    """

    batches: Span
    spans: tuple[Span, ...]
    hidden: tuple[tuple[int, int, int], ...]
    blank: tuple[int, ...]


def is_few(request: Request) -> bool:
    """Whether a request is one of a few rows, whatever its mask and however many its keys."""
    group = request.num_heads // request.num_kv_heads
    plain = not (request.dropout or request.needs_grad or request.transformed or request.score_fn)
    some = request.batch > 0 and request.q_len > 0
    few = some and request.q_len <= MOST_ROWS and request.q_len * group <= MOST_FOLDED
    return few and plain and request.seqlens is None


@dataclass(frozen=True, eq=False)
class Few:
    """A request of a few rows."""

    request: Request

    @cached_property
    def sights(self) -> tuple[Sight, ...] | None:
        """What the rows of each batch element see; None where heads differ, or cells are asked."""
        matrices = self.request.matrices
        if matrices.per_head or not matrices.exact:
            return None
        regions, found, start = matrices.regions(), [], 0
        for stop in range(1, len(regions) + 1):
            if stop == len(regions) or regions[stop] != regions[start]:
                found.append(_sight((start, stop), regions[start], self.request.q_len))
                start = stop
        return tuple(found)

    @cached_property
    def sole(self) -> Span | None:
        """The keys that every row of every batch element sees, where that is all there is to say.

        Most steps are of this kind, and those of a small model take less time than what is looked
        at for the others.
        """
        request, group = self.request, self.request.num_heads // self.request.num_kv_heads
        if len(self.sights or ()) != 1 or request.softcap is not None:
            return None
        ((_, spans, hidden, blank),) = self.sights or ()
        exact = request.dtype in (torch.float32, torch.float64)
        small = request.q_len * group <= FUSED_ROWS
        return spans[0] if exact and small and len(spans) == 1 and not (hidden or blank) else None

    def _at_once(
        self, span: Span, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Stats]:
        """Return the same for `sole` keys that lie end to end."""
        rows, dim = query.shape[:3], value.shape[3]
        if span != (0, key.shape[2]):
            key, value = key[:, :, slice(*span)], value[:, :, slice(*span)]
        folded = query.reshape(rows[0] * key.shape[1], -1, query.shape[3])
        scores = torch.bmm(key.flatten(0, 1), folded.mT).mT
        scores.mul_(bounded(self.request.scale, query.dtype))
        output = torch.bmm(torch.softmax(scores, -1), value.flatten(0, 1))
        stats = Stats(
            lambda: torch.logsumexp(scores, -1).reshape(rows),
            lambda: scores.amax(-1).reshape(rows),
        )
        return output.view(*rows, dim), stats

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, pse: Pse | None, sink: Tensor | None
    ) -> tuple[Tensor, Stats]:
        """Return the output ``[b n s d]`` and the statistics; nothing is recorded."""
        plain, sides = pse is None and sink is None, (key, value)
        if self.sole and plain and all(_is_dense(one) and _is_flat(one) for one in sides):
            return self._at_once(self.sole, query, key, value)
        bias = None
        if pse is not None:
            like = query.new_empty(1, dtype=stats_dtype(query.dtype))
            cells = like.expand(*query.shape[:3], key.shape[2])
            bias = bias_of(pse, self.request, None, cells)
        whole = query, key, value, bias
        parts = [
            part
            for sight in self.sights or ()
            for part in _Part(self.request, sight, sink, *_cut(sight.batches, *whole)).apart()
        ]
        outputs = [part.output() for part in parts]
        stats = Stats(
            lambda: _joined([part.lse() for part in parts]),
            lambda: _joined([part.peak() for part in parts]),
        )
        return _joined(outputs), stats


class _Part:
    """The rows of some batch elements that see alike keys."""

    def __init__(
        self,
        request: Request,
        sight: Sight,
        sink: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
    ) -> None:
        self.request, self.sight, self.sink = request, sight, sink
        self.query, self.key, self.value, self.bias = query, key, value, bias
        self.batch, self.heads, self.rows = query.shape[:3]
        self.key_heads, self.wide = key.shape[1], stats_dtype(query.dtype)
        self.group = self.heads // self.key_heads
        self.scores: Tensor | None = None

    def apart(self) -> Iterator[_Part]:
        """Yield this part; or its batch elements, where they and the heads are no single axis."""
        if self.batch == 1 or self._is_fused or (_is_flat(self.key) and _is_flat(self.value)):
            yield self
            return
        for k in range(self.batch):
            own = _cut((k, k + 1), self.query, self.key, self.value, self.bias)
            yield _Part(self.request, self.sight, self.sink, *own)

    def output(self) -> Tensor:
        """Return the output ``[b n s d]``."""
        if self._is_fused:
            return self._fused_output()
        columns = self._columns()
        weights = torch.softmax(columns, -1)
        for row in self.sight.blank:
            self._by_row(weights)[..., row, :] = 0.0
        made, start = None, 0
        for span in self.sight.spans:
            part = weights[..., start : start + span[1] - span[0]]
            values = self._keys(self.value, span)
            made = torch.bmm(part, values) if made is None else made.baddbmm_(part, values)
            start += span[1] - span[0]
        if made is None:
            made = self.query.new_zeros(*columns.shape[:2], self.value.shape[3])
        made = self._unfolded(made, made.shape[2])
        return made if self.request.share is not None else made.to(self.query.dtype)

    def lse(self) -> Tensor:
        """Return the log of the softmax denominators ``[b n s]``."""
        return self._unfolded(torch.logsumexp(self._columns(), -1))

    def peak(self) -> Tensor:
        """Return the largest scores ``[b n s]``."""
        columns = self._columns()
        if not columns.shape[-1]:
            return self.lse()
        return self._unfolded(columns.amax(-1))

    @property
    def _is_fused(self) -> bool:
        """Whether torch's kernel computes this as it is, and faster."""
        request, folded = self.request, self.group * self.rows
        plain = self.bias is None and self.sink is None and request.softcap is None
        even = request.head_dim == request.value_dim and 0 < request.scale <= HUGE_SCALE
        known = plain and even and len(self.sight.spans) == 1 and self.key.device.type == "cpu"
        if self.query.dtype in (torch.float16, torch.bfloat16):
            rounds = request.share is None  # and what a share answers is not rounded
            return known and rounds and request.dtype == torch.bfloat16 and folded >= FUSED_ROWS
        return known and (folded > FUSED_ROWS or not _is_dense(self.key))

    def _fused_output(self) -> Tensor:
        (span,) = self.sight.spans
        query = self.query.reshape(self.batch, self.key_heads, -1, self.query.shape[3])
        # The kernel reads the last axis as if its numbers lay one after the other.
        query, keys, values = (
            one if one.stride(3) == 1 else one.contiguous()
            for one in (query, self.key[:, :, slice(*span)], self.value[:, :, slice(*span)])
        )
        mask = None
        if self.sight.hidden:
            mask = query.new_zeros(1, 1, self.group, self.rows, span[1] - span[0])
            self._hide(mask)
            mask = mask.flatten(2, 3)
        scale = self.request.scale
        made = _fused(query, keys, values, attn_mask=mask, scale=scale)[0]
        return self._unfolded(made, made.shape[3])

    def _columns(self) -> Tensor:
        """Return the scores ``[(b n) (g s) j]`` of the keys that are seen, and of the sink."""
        if self.scores is None:
            self.scores = self._made_columns()
        return self.scores

    def _made_columns(self) -> Tensor:
        query = self.query.reshape(-1, self.group * self.rows, self.query.shape[3]).to(self.wide)
        products = [_product(query, self._keys(self.key, span)) for span in self.sight.spans]
        if not products:
            products = [query.new_empty(*query.shape[:2], 0)]
        scores = products[0] if len(products) == 1 else torch.cat(products, -1)
        scores.mul_(bounded(self.request.scale, self.wide))
        if self.request.softcap is not None:
            cap = usable_cap(self.request.softcap, self.wide)
            scores.div_(cap).tanh_().mul_(cap)
        if self.bias is not None:
            cells = [self.bias[..., slice(*span)] for span in self.sight.spans]
            if cells:
                self._by_row(scores).add_(self._bias_by_row(torch.cat(cells, -1)))
        self._hide(self._by_row(scores))
        if self.sink is None:
            return scores
        logits = self.sink.to(self.wide).view(self.key_heads, self.group, 1, 1)
        shape = (self.batch, self.key_heads, self.group, self.rows, 1)
        logit = logits.expand(shape).reshape(*scores.shape[:2], 1)
        return torch.cat([scores, logit], -1)

    def _hide(self, scores: Tensor) -> None:
        """Mask ``[b n g i j]`` scores where a row does not see what another one sees."""
        hidden = self.sight.hidden
        if len(hidden) <= FEW_FILLS:
            for row, first, last in hidden:
                scores[..., row, first:last] = -torch.inf
            return
        left = min(first for _, first, _ in hidden)
        cells = np.zeros((self.rows, max(last for *_, last in hidden) - left), np.bool_)
        for row, first, last in hidden:
            cells[row, first - left : last - left] = True
        masked = torch.from_numpy(cells).to(scores.device, non_blocking=True)
        scores[..., left : left + cells.shape[1]].masked_fill_(masked, -torch.inf)

    def _keys(self, tensor: Tensor, span: Span) -> Tensor:
        """Return keys or values of a span, ``[(b n) j d]``: a view where they need no cast."""
        if span != (0, tensor.shape[2]):
            tensor = tensor[:, :, slice(*span)]
        return tensor.flatten(0, 1).to(self.wide)

    def _by_row(self, folded: Tensor) -> Tensor:
        """See ``[(b n) (g s) j]`` as ``[b n g s j]``."""
        shape = (self.batch, self.key_heads, self.group, self.rows, folded.shape[2])
        return folded.view(shape)

    def _bias_by_row(self, bias: Tensor) -> Tensor:
        """See ``[1|b 1|n i j]`` as ``[1|b 1|n 1|g s j]``."""
        if bias.shape[1] == 1:
            return bias[:, :, None]
        batch, _, rows, keys = bias.shape
        return bias.reshape(batch, self.key_heads, self.group, rows, keys)

    def _unfolded(self, made: Tensor, *dims: int) -> Tensor:
        """See ``[(b n) (g s) ...]``, or ``[b n (g s) ...]``, as ``[b (n g) s ...]``."""
        return made.reshape(self.batch, self.heads, self.rows, *dims)


def _sight(batches: Span, region: Region, rows: int) -> Sight:
    """Return what the rows of a region see."""
    if len(region.strips) == 1:
        i0, i1, runs = region.strips[0]
        if (i0, i1) == (0, rows) and all(da == db == 0 for _, da, _, db in runs):
            return Sight(batches, tuple((a, b) for a, _, b, _ in runs), (), ())
    spans = tuple(seen_spans(region.strips))
    hidden, blank = [], []
    for row in range(rows):
        own = region.row(row)
        if not own:
            blank.append(row)
        start = 0
        for a, b in spans:
            inside = [(max(a, c), min(b, d)) for c, d in own if c < b and d > a]
            hidden += [(row, start + c - a, start + d - a) for c, d in gaps(inside, a, b)]
            start += b - a
    return Sight(batches, spans, tuple(hidden), tuple(blank))


def _cut(
    batches: Span, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the tensors of some batch elements."""
    a, b = batches
    if b - a == len(query):
        return query, key, value, bias
    own = None if bias is None else bias if bias.shape[0] == 1 else bias[a:b]
    return query[a:b], key[a:b], value[a:b], own


def _is_flat(tensor: Tensor) -> bool:
    """Whether the first two axes are one, as they lie in memory."""
    return tensor.shape[1] == 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the rows of each head lie one after the other."""
    return tensor.stride(2) == tensor.shape[3] and tensor.stride(3) == 1


def _product(query: Tensor, keys: Tensor) -> Tensor:
    """Return ``q k^T``; of keys in a row the other way round, which is faster for a few rows."""
    if keys.stride(1) == keys.shape[2]:
        return torch.bmm(keys, query.mT).mT
    return torch.bmm(query, keys.mT)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
