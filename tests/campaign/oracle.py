"""What every composition means, in plain numpy and torch; written from the documents alone.

Nothing here imports attnkit. Masks are boolean arrays, biases are matrices, attention is a dense
softmax in float64 whose gradients of any order are autograd's. `Bounds` follows the rounding
errors of a low-precision evaluation through the same formulas, cell by cell, so that what a
backend may differ by is derived for each number and nothing is tuned.

    score  = cap(scale * q.k) + bias + scale * bias before the scale;  cap(x) = c * tanh(x / c)
    weight = exp(score) / (sum over allowed keys of exp(score) + exp(sink));  output = weight @ v
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.campaign import case as data
from tests.campaign.case import DTYPES, FEATURES, GARBAGE, IDS, Case, Plane, Spec, numbers

# -- masks --------------------------------------------------------------------------------


def plane(spec: Spec, q: int, k: int, b: int = 0, h: int = 0) -> Plane:
    """The allowed cells [q, k] of one score matrix."""
    found = _cells(spec, q, k, b, h)
    return np.broadcast_to(found, (q, k))


def _first(align: str, q: int, k: int) -> int:
    return 0 if align == "top_left" else k - q


def _cells(spec: Spec, q: int, k: int, b: int, h: int) -> Plane:
    name, *args = spec
    i, j = np.arange(q)[:, None], np.arange(k)[None, :]
    every = np.ones((q, k), bool)
    match name:
        case "&":
            return plane(args[0], q, k, b, h) & plane(args[1], q, k, b, h)
        case "|":
            return plane(args[0], q, k, b, h) | plane(args[1], q, k, b, h)
        case "-":
            return plane(args[0], q, k, b, h) & ~plane(args[1], q, k, b, h)
        case "~":
            return ~plane(args[0], q, k, b, h)
        case "Full":
            return every
        case "Columns":
            return every & (j >= args[0]) & (j < (k if args[1] is None else args[1]))
        case "Rows":
            return every & (i >= args[0]) & (i < (q if args[1] is None else args[1]))
        case "Prefix":
            return every & (j < (args[0][b] if isinstance(args[0], tuple) else args[0]))
        case "PrefixLM":
            rest = plane(("Prefix", args[0]), q, k, b, h)
            return rest | plane(("Causal", args[1]), q, k, b, h)
        case "Padding":
            lengths, side = args
            return every & (j < lengths[b] if side == "right" else j >= k - lengths[b])
        case "Documents":
            rows = args[0][b] if isinstance(args[0][0], tuple) else args[0]
            keys = args[1] if args[1] is not None else args[0]
            keys = keys[b] if isinstance(keys[0], tuple) else keys
            numbered = [np.repeat(np.arange(len(n)), n) for n in (rows, keys)]
            return numbered[0][:, None] == numbered[1][None, :]
        case "Slices":
            pieces = args[0]
            if data.tells(spec)[0]:
                pieces = pieces[b]
            made = ~every
            for i0, i1, j0, j1, lo, hi in pieces:
                inside = (i >= i0) & (i < i1) & (j >= j0) & (j < j1)
                inside = inside & ((lo is None) | (j - i >= (lo or 0)))
                made = made | (inside & ((hi is None) | (j - i <= (hi or 0))))
            return made
        case "Dense":
            seed, shape, share, how, kind = args
            four = (1,) * (4 - len(shape)) + tuple(shape)
            held = data.cells(seed, shape, share, kind).numpy().reshape(four)
            held = held[b if four[0] > 1 else 0, h if four[1] > 1 else 0]
            return held if how == "keep" else ~held
        case "Predicate":
            return _function(args[0], i, j, b if args[1] is not None else 0, h) & every
        case "PerHead":
            return plane(args[0][h], q, k, b, 0)
        case "Cut":
            part, (i0, _), (j0, _), (rows, keys), _ = args
            whole = (i0 + q if rows is None else rows, j0 + k if keys is None else keys)
            return plane(part, *whole, b, h)[i0 : i0 + q, j0 : j0 + k]
    p = i + _first(args[-1], q, k)
    match name:
        case "Causal":
            return j <= p
        case "SlidingWindow":
            return (p - args[0] < j) & (j <= p)
        case "Band":
            left, right = args[:2]
            made = every if left is None else every & (p - left <= j)
            return made if right is None else made & (j <= p + right)
        case "Chunked":
            return j // args[0] == p // args[0]
        case "BlockCausal":
            return j // args[0] <= p // args[0]
        case "Dilated":
            return (p - j) % args[0] == 0
    raise ValueError(name)


def _function(name: str, i: Any, j: Any, b: int, h: int) -> Any:
    ids, features = IDS.numpy(), FEATURES.numpy()
    match name:
        case "even":
            return (i + j) % 2 == 0
        case "thirds":
            return (i + 2 * j) % 3 != 0
        case "told_apart":
            return (2 * i + j + b + 2 * h) % 3 != 0
        case "looks_back":
            return j <= i
        case "same_id":
            return ids[i] == ids[j]
        case "by_keys_only":
            return ids[j] > 0
    return np.einsum("ic,jc->ij", features[i[:, 0]], features[j[0]]) > 0


def allowed(case: Case) -> Tensor:
    """The allowed cells [b n q k], packed sequences padded with cells that are not."""
    apart_b, apart_h = data.tells(case.mask)
    lengths = case.sequences
    q, k = _longest(case)
    made = torch.zeros(len(lengths), case.heads, q, k, dtype=torch.bool)
    known: dict[Any, Tensor] = {}
    for b, (rows, keys) in enumerate(lengths):
        for h in range(case.heads):
            key = (rows, keys, b if apart_b else 0, h if apart_h else 0)
            if key not in known:
                cells = np.array(plane(case.mask, rows, keys, b, h))
                known[key] = torch.from_numpy(cells)
            made[b, h, :rows, :keys] = known[key]
    return made


def _longest(case: Case) -> tuple[int, int]:
    if case.q_lens is None or case.kv_lens is None:
        return case.q_len, case.kv_len
    return max(case.q_lens), max(case.kv_lens)


# -- biases -------------------------------------------------------------------------------


def press_slopes(n: int) -> list[float]:
    """The slopes of the authors of ALiBi, as they published them."""

    def power_of_two(n: int) -> list[float]:
        start = 2.0 ** (-(2.0 ** -(math.log2(n) - 3)))
        return [start * start**k for k in range(n)]

    if math.log2(n).is_integer():
        return power_of_two(n)
    closest = 2 ** math.floor(math.log2(n))
    return power_of_two(closest) + press_slopes(2 * closest)[0::2][: n - closest]


def buckets(distance: Tensor, count: int, far: int, both: bool) -> Tensor:
    """T5's `_relative_position_bucket`, of ``key - query``."""
    found = torch.zeros_like(distance)
    if both:
        count //= 2
        found = found + (distance > 0).long() * count
        distance = distance.abs()
    else:
        distance = -torch.minimum(distance, torch.zeros_like(distance))
    exact = count // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(far / exact)
    large = (exact + (ratio * (count - exact)).long()).clamp(max=count - 1)
    return found + torch.where(distance < exact, distance, large)


@dataclass(frozen=True)
class Addend:
    """One addend of a bias: the tensor it is linear in, if it has one."""

    spec: Spec
    tensor: Tensor | None
    trains: bool

    @property
    def before(self) -> bool:
        spec = self.spec
        while spec[0] == "Cut":
            spec = spec[1]
        return spec[0] == "Dense" and bool(spec[5])


def addend(spec: Spec) -> Addend:
    """The tensor of an addend, rounded as the composition's is, then widened."""
    name, *args = spec
    match name:
        case "ALiBi" | "SqrtALiBi":
            return Addend(spec, None, False)
        case "LearnableALiBi":
            weight = (numbers(args[2], (args[0],)).abs() * 0.3).float()
            return Addend(spec, weight, True)
        case "T5Relative":
            heads, count, _, _, _, seed, dtype, grad = args
            return Addend(spec, numbers(seed, (count, heads), dtype), grad)
        case "KeyBias":
            shape, seed, dtype, grad = args
            return Addend(spec, numbers(seed, shape, dtype), grad)
        case "Dense":
            shape, seed, dtype, grad, _, made = args
            return Addend(spec, getattr(data, made)(seed, shape, dtype), grad)
    inner = addend(args[0])
    return Addend(spec, inner.tensor, inner.trains)


def matrix(spec: Spec, tensor: Tensor | None, b: int, q: int, k: int, size: bool = False) -> Tensor:
    """An addend as a matrix [n or 1, q, k] of one batch element; `size`: without its sign."""
    name, *args = spec
    sign = 1.0 if size else -1.0
    if name == "Cut":
        part, (i0, i1), (j0, j1), whole = args
        return matrix(part, tensor, b, *whole, size)[:, i0:i1, j0:j1]
    if name == "KeyBias":
        assert tensor is not None
        per_key = tensor.reshape((1,) * (3 - tensor.ndim) + tuple(tensor.shape))
        per_key = per_key[b if per_key.shape[0] > 1 else 0]
        return per_key[:, None, :].expand(-1, q, -1)
    if name == "Dense":
        assert tensor is not None
        four = tensor.reshape((1,) * (4 - tensor.ndim) + tuple(tensor.shape))
        return four[b if four.shape[0] > 1 else 0]
    align = args[4] if name == "T5Relative" else args[1]
    query = torch.arange(q)[:, None] + _first(align, q, k)
    distance = torch.arange(k)[None, :] - query
    if name == "T5Relative":
        assert tensor is not None
        return tensor[buckets(distance, args[1], args[2], args[3])].permute(2, 0, 1)
    away = distance.abs().to(torch.float64)
    if name == "LearnableALiBi":
        assert tensor is not None
        return sign * tensor[:, None, None] * away
    slopes = press_slopes(args[0]) if isinstance(args[0], int) else list(args[0])
    curve = away if name == "ALiBi" else away.sqrt()
    return sign * torch.tensor(slopes, dtype=torch.float64)[:, None, None] * curve


def bias_of(case: Case, tensors: Sequence[Tensor | None], before: bool, size: bool = False) -> Any:
    """The addends of one side of the scale as [b n q k]; 0.0 where there are none."""
    specs = [s for s in case.bias if addend_before(s) == before]
    if not specs or not case.sequences:
        return 0.0
    q, k = _longest(case)
    rows = []
    for b, (rows_b, keys_b) in enumerate(case.sequences):
        whole: Any = 0.0
        for spec, tensor in zip(case.bias, tensors, strict=True):
            if addend_before(spec) == before:
                whole = whole + matrix(spec, tensor, b, rows_b, keys_b, size)
        whole = whole.expand(case.heads, rows_b, keys_b)
        rows.append(torch.nn.functional.pad(whole, (0, k - keys_b, 0, q - rows_b)))
    return torch.stack(rows)


def addend_before(spec: Spec) -> bool:
    """Whether it is added before the scale."""
    while spec[0] == "Cut":
        spec = spec[1]
    return spec[0] == "Dense" and bool(spec[5])


# -- operands and layouts --------------------------------------------------------------------


@dataclass
class Operands:
    """Query, key, value [b n s d] and the rest, with the values that the composition gets."""

    query: Tensor
    key: Tensor
    value: Tensor
    sink: Tensor | None
    dy: Tensor
    dlse: Tensor
    cells: Tensor
    seen: Tensor  # [b n_kv k]: the keys that some query may see


def operands(case: Case) -> Operands:
    """Draw a case's numbers: rounded to its dtype, garbage where no query looks."""
    q_len, k_len = _longest(case)
    batch, dtype = len(case.sequences), case.torch_dtype
    query = numbers(case.seed, (batch, case.heads, q_len, case.dim), dtype)
    key = numbers(case.seed + 1, (batch, case.kv_heads, k_len, case.dim), dtype)
    value = numbers(case.seed + 2, (batch, case.kv_heads, k_len, case.value_dim), dtype)
    sink = numbers(case.seed + 3, (case.heads,), case.wide) if case.sink else None
    dy = numbers(case.seed + 4, (batch, case.heads, q_len, case.value_dim), dtype)
    dlse = numbers(case.seed + 5, (batch, case.heads, q_len), case.wide)
    mask = allowed(case)
    group = case.heads // case.kv_heads
    seen = mask.any(2).reshape(batch, case.kv_heads, group, k_len).any(2)
    if case.garbage:
        bad = GARBAGE[case.garbage]
        if case.garbage == "big":
            bad = min(bad, torch.finfo(dtype).max)
        key = key.masked_fill(~seen[..., None], bad)
        value = value.masked_fill(~seen[..., None], bad)
    for b, (rows, _) in enumerate(case.sequences):
        dy[b, :, rows:] = 0
        dlse[b, :, rows:] = 0
    return Operands(query, key, value, sink, dy, dlse, mask, seen)


def into_layout(case: Case, tensor: Tensor, keys: bool) -> Tensor:
    """A [b n s d] tensor in the case's layout; a statistic [b n s] alike, packed as [t n]."""
    if case.packed:
        lengths = case.kv_lens if keys else case.q_lens
        parts = [tensor[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths or ())]
        return torch.cat(parts)
    if tensor.ndim == 3 or case.layout == "BNSD":
        return tensor
    if case.layout == "BSND":
        return tensor.transpose(1, 2)
    first = "bnsd->bsnd" if case.layout == "BSH" else "bnsd->sbnd"
    turned = torch.einsum(first, tensor) if tensor.numel() else tensor.permute(
        (0, 2, 1, 3) if case.layout == "BSH" else (2, 0, 1, 3)
    )  # fmt: skip
    return turned.reshape(*turned.shape[:2], turned.shape[2] * turned.shape[3])


# -- attention ------------------------------------------------------------------------------


@dataclass
class Attended:
    """One evaluation of the definition, [b n q ...]."""

    output: Tensor
    lse: Tensor
    peak: Tensor
    weights: Tensor
    scores: Tensor
    sink_weight: Tensor | None


def attend(
    case: Case, query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None,
    tensors: Sequence[Tensor | None], cells: Tensor,
) -> Attended:  # fmt: skip
    """The definition, in the dtype of its tensors, differentiable as often as one likes."""
    group = case.heads // case.kv_heads
    keys, values = (t.repeat_interleave(group, 1) for t in (key, value))
    dtype = query.dtype
    scores = case.factor * (query @ keys.transpose(-1, -2))
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores + case.factor * _as(bias_of(case, tensors, before=True), dtype)
    scores = scores + _as(bias_of(case, tensors, before=False), dtype)
    scores = scores.masked_fill(~cells, -math.inf)
    logits = scores
    if sink is not None:
        logits = torch.cat([scores, sink[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    if not logits.shape[-1]:
        nothing = scores.sum(-1)
        output = scores @ values
        return Attended(output, nothing - math.inf, nothing - math.inf, scores, scores, None)
    peak = logits.detach().amax(-1)
    safe = peak.masked_fill(peak == -math.inf, 0.0)[..., None]
    powers = torch.exp(logits - safe)
    total = powers.sum(-1, keepdim=True)
    empty = total == 0
    shares = powers / total.masked_fill(empty, 1.0)
    lse = (safe + torch.log(total.masked_fill(empty, 1.0))).masked_fill(empty, -math.inf)[..., 0]
    weights = shares[..., : scores.shape[-1]]
    to_sink = shares[..., -1] if sink is not None else None
    return Attended(weights @ values, lse, peak, weights, scores, to_sink)


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) else value


@dataclass
class Problem:
    """A case with its numbers in float64, cleaned of what nobody may see."""

    case: Case
    given: Operands
    addends: list[Addend]

    @classmethod
    def of(cls, case: Case) -> Problem:
        return cls(case, operands(case), [addend(spec) for spec in case.bias])

    def leaves(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Every tensor that trains, as a leaf, by the name of its gradient."""
        unseen = ~self.given.seen[..., None]
        made = {
            "dq": self.given.query,
            "dk": self.given.key.masked_fill(unseen, 0.0),
            "dv": self.given.value.masked_fill(unseen, 0.0),
        }
        if self.given.sink is not None:
            made["dsink"] = self.given.sink
        for n, part in enumerate(self.addends):
            if part.trains and part.tensor is not None:
                made[f"dbias{n}"] = part.tensor
        return {name: t.detach().to(dtype).requires_grad_() for name, t in made.items()}

    def run(self, leaves: dict[str, Tensor]) -> Attended:
        """Evaluate the definition on leaves (or on what was computed from them)."""
        dtype = leaves["dq"].dtype
        tensors = [
            leaves.get(f"dbias{n}", None if p.tensor is None else p.tensor.detach().to(dtype))
            for n, p in enumerate(self.addends)
        ]
        return attend(
            self.case, leaves["dq"], leaves["dk"], leaves["dv"], leaves.get("dsink"),
            tensors, self.given.cells,
        )  # fmt: skip

    def loss(self, found: Attended) -> Tensor:
        """The scalar whose gradients are compared."""
        dtype = found.output.dtype
        loss = (found.output * self.given.dy.to(dtype)).sum()
        if self.case.lse:
            finite = found.lse.masked_fill(found.lse == -math.inf, 0.0)
            loss = loss + (finite * self.given.dlse.to(dtype)).sum()
        return loss


# -- answers and what they may differ by -------------------------------------------------------


@dataclass
class Answer:
    """What a case is, in its layout, float64; and how far a number may lie away, cell by cell."""

    values: dict[str, Tensor]
    bounds: dict[str, Tensor]


def answer(problem: Problem) -> Answer:
    """Output, statistics and all gradients of a case, with bounds."""
    case = problem.case
    leaves = problem.leaves()
    found = problem.run(leaves)
    grads = torch.autograd.grad(problem.loss(found), list(leaves.values()), allow_unused=True)
    values = {"output": found.output.detach(), "lse": found.lse.detach(), "max": found.peak}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        values[name] = torch.zeros_like(leaf) if grad is None else grad
    with torch.no_grad():
        bounds = _bounds(problem, leaves, found, values)
    for name in values:
        if name in ("output", "lse", "max", "dq", "dk", "dv"):
            keys = name in ("dk", "dv")
            values[name] = into_layout(case, values[name], keys)
            bounds[name] = into_layout(case, bounds[name], keys)
    for name in ("lse", "max"):
        # Biases of finfo.min are cut off above it, where sums of a few stay finite.
        beyond = values[name].abs() > 1e36
        bounds[name] = torch.where(beyond, 0.95 * values[name].abs(), bounds[name])
    return Answer(values, bounds)


SPARE = 4.0
"""Roundings allowed at each step; plain code makes one or two, fused code another."""


def _bounds(
    problem: Problem, leaves: dict[str, Tensor], found: Attended, values: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Follow the errors of one evaluation in the case's dtype through the formulas.

    `unit` is the spacing of the numbers that tensors are stored in. Products are bounded by
    the products of sizes, so cancellation and conditioning are part of the bound.
    """
    case, given = problem.case, problem.given
    info, kept = torch.finfo(case.torch_dtype), torch.finfo(case.wide)
    unit, stat = SPARE * info.eps, SPARE * kept.eps
    # The fused kernel divides rows without keys by FLT_MAX, which leaves some 1e-38.
    least = max(info.tiny * info.eps, 1e-30 * max(1.0, abs(case.factor)))
    group = case.heads // case.kv_heads
    query = leaves["dq"].abs()
    keys, values_ = (leaves[n].abs().repeat_interleave(group, 1) for n in ("dk", "dv"))
    sized = [
        None if p.tensor is None else leaves.get(f"dbias{n}", p.tensor).detach().double().abs()
        for n, p in enumerate(problem.addends)
    ]
    factor = abs(case.factor)
    inside = factor * (query @ keys.transpose(-1, -2))
    outside = _as(bias_of(case, sized, False, True), torch.float64)
    outside = abs(outside + factor * _as(bias_of(case, sized, True, True), torch.float64))
    cells, weights = given.cells, found.weights
    scores = found.scores.masked_fill(~cells, 0.0)
    off = unit * (inside + outside + scores.abs()) + least
    slope, slope_off = 1.0, 0.0
    counted = 0.0
    if any("ALiBi" in repr(part.spec) for part in problem.addends) and inside.numel():
        # A distance may be computed as two positions, in float16 down to its smallest number.
        sizes = (outside + torch.zeros_like(inside)).amax((-2, -1), keepdim=True)
        counted = 4 * stat * sizes
        counted = counted + (2**-16 * max(1.0, factor) if case.dtype == "float16" else 0.0)
    if case.softcap is not None:
        cap = case.softcap
        off = (unit * inside).clamp(max=2 * cap) + unit * (outside + cap + scores.abs()) + least
        dots = leaves["dq"] @ leaves["dk"].repeat_interleave(group, 1).transpose(-1, -2)
        bent = torch.tanh(case.factor * dots / cap)
        slope = (1 - bent * bent).clamp(min=0.0)
        slope_off = (2 * unit * inside / cap + unit).clamp(max=1.0)
    off = (off + counted).masked_fill(~cells, 0.0)
    row = off.amax(-1) if off.shape[-1] else off.sum(-1)
    if given.sink is not None:
        row = torch.maximum(row, unit * leaves["dsink"].detach().abs()[:, None])
    lse = values["lse"]
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    # A backward makes the weights again from the denominator's log, as it was stored.
    change = off + row[..., None] + unit + stat * finite.abs()[..., None]
    # weight * (exp(change) - 1), and never above 1
    raised = torch.exp((scores - finite[..., None] + change).clamp(max=0.0))
    weight_off = (raised * -torch.expm1(-change) + unit * weights + least).masked_fill(~cells, 0.0)
    bounds = {
        "output": weight_off @ values_ + unit * (weights @ values_) + least,
        # In 16 bits torch's own kernel takes exponentials to about 2**-14.
        "lse": row + stat * (finite.abs() + 1) + (2**-13 if info.bits == 16 else 0.0),
        "max": row + stat * finite.abs() + stat,
    }
    dy = given.dy.double()
    value = leaves["dv"].detach().repeat_interleave(group, 1)
    up = dy @ value.transpose(-1, -2)
    up_off = unit * (dy.abs() @ values_.transpose(-1, -2))
    mean = (weights * up).sum(-1, keepdim=True)
    mean_off = (dy.abs() * bounds["output"]).sum(-1, keepdim=True)
    mean_off = mean_off + unit * (weights * up.abs()).sum(-1, keepdim=True)
    extra = given.dlse.double()[..., None] if case.lse else torch.zeros_like(mean)
    pull = up - mean + extra
    pull_off = up_off + mean_off + unit * (up.abs() + mean.abs() + extra.abs())
    slopes = (weights * pull).abs()
    slopes_off = weight_off * pull.abs() + (weights + weight_off) * pull_off + unit * slopes + least
    slopes_off = slopes_off.masked_fill(~cells, 0.0)
    inner_off = slopes_off * slope + (slopes + slopes_off) * slope_off
    inner = slopes * slope
    both = inner_off + unit * inner
    bounds["dq"] = factor * (both @ keys) + unit * values["dq"].abs() + least
    bounds["dk"] = _grouped(factor * (both.transpose(-1, -2) @ query), group)
    bounds["dk"] = bounds["dk"] + unit * values["dk"].abs() + least
    to_value = (weight_off + unit * weights).transpose(-1, -2) @ dy.abs()
    bounds["dv"] = _grouped(to_value, group) + unit * values["dv"].abs() + least
    if given.sink is not None and found.sink_weight is not None:
        share = found.sink_weight.detach()
        # One minus the weight of the keys, where the sink is merged in afterwards.
        share_off = unit + share * torch.expm1((2 * row + unit).clamp(max=60.0))
        share_off = share_off.clamp(max=1.0)
        size = (mean.abs() + extra.abs())[..., 0]
        one = share_off * size + (share + share_off) * (mean_off[..., 0] + unit * size)
        bounds["dsink"] = one.sum((0, 2)) + stat * values["dsink"].abs() + least
    for n, part in enumerate(problem.addends):
        if f"dbias{n}" not in values:
            continue
        before = part.before
        eps = SPARE * max(info.eps, torch.finfo(part.tensor.dtype).eps)  # type: ignore[union-attr]
        # Parts of a sum over sequences are rounded to the tensor's dtype one by one.
        cell = ((factor if before else 1.0) * (slopes_off + eps * slopes)).clamp(max=1e300)
        name = f"dbias{n}"
        bounds[name] = _to_tensor(case, part, cell) + eps * values[name].abs() + least
        if part.tensor is not None and "LearnableALiBi" in repr(part.spec):
            # A distance may be computed as two positions, whose parts are rounded apart.
            far = sum(_longest(case))
            bounds[name] = bounds[name] + unit * far * slopes.sum((0, 2, 3))
    return bounds


def _grouped(tensor: Tensor, group: int) -> Tensor:
    batch, heads, *rest = tensor.shape
    return tensor.reshape(batch, heads // group, group, *rest).sum(2)


def _to_tensor(case: Case, part: Addend, cell: Tensor) -> Tensor:
    """Sum what the cells of an addend may be off by into its tensor."""
    assert part.tensor is not None
    leaf = part.tensor.detach().double().abs().requires_grad_()
    with torch.enable_grad():
        whole = leaf.sum() * 0
        for b, (rows, keys) in enumerate(case.sequences):
            made = matrix(part.spec, leaf, b, rows, keys, size=True)
            made = made.expand(case.heads, rows, keys)
            whole = whole + (made * cell[b, :, :rows, :keys]).sum()
    return torch.autograd.grad(whole, leaf)[0]


# -- second derivatives ------------------------------------------------------------------------


def second(problem: Problem, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Gradients of a scalar of the first gradients, by all tensors and by a factor of each.

    Every operand is ``factor * leaf``, so that a backend which treats its first gradients as
    constants gives a number that is wrong, and not only one that is missing.
    """
    leaves = problem.leaves(dtype)
    factors = {f"{name}*": torch.ones((), dtype=dtype, requires_grad=True) for name in leaves}
    scaled = {name: leaf * factors[f"{name}*"] for name, leaf in leaves.items()}
    loss = problem.loss(problem.run(scaled))
    first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
    wanted = {**leaves, **factors}
    whole = torch.zeros((), dtype=dtype)
    for n, grad in enumerate(first):
        if grad is not None:
            whole = whole + (grad * cotangent(n, tuple(grad.shape)).to(dtype)).sum()
    if not whole.requires_grad:
        return {name: torch.zeros_like(t) for name, t in wanted.items()}
    found = torch.autograd.grad(whole, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(t) if g is None else g
        for (name, t), g in zip(wanted.items(), found, strict=True)
    }


def cotangent(n: int, shape: tuple[int, ...]) -> Tensor:
    """What the n-th first gradient is weighed with: float32 numbers, exact in every dtype used."""
    return numbers(7 + n, shape, torch.float32).double()


def second_answer(problem: Problem) -> Answer:
    """Second derivatives; bounds from the error of the same evaluation in float32."""
    exact, low = second(problem), second(problem, torch.float32)
    trained = [p.tensor.dtype for p in problem.addends if p.trains and p.tensor is not None]
    eps = max(torch.finfo(dtype).eps for dtype in (problem.case.torch_dtype, *trained))
    ratio = eps / torch.finfo(torch.float32).eps
    bounds, values = {}, {}
    top = max((float(t.abs().max()) for t in exact.values() if t.numel()), default=0.0)
    steep = max(1.0, abs(problem.case.factor))  # what rounding of a product is in a score
    for name, value in exact.items():
        apart = (low[name].double() - value).abs().nan_to_num(nan=math.inf)
        most = apart.max() if apart.numel() else apart.sum()
        # The factor covers another order of summation; the rest, a float32 that was lucky.
        bounds[name] = (16 * ratio * most + 64 * eps * steep * max(top, 1.0)).expand(value.shape)
        values[name] = value
    return Answer(values, bounds)


__all__ = ["DTYPES", "Answer", "Problem", "allowed", "answer", "plane", "second_answer"]
