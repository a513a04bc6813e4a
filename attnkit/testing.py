"""Checks for masks, biases and backends of your own; each raises and says where it is wrong.

What you write is compared with a definition that you state cell by cell, and with what planners
and backends make of it, for all small sizes. They are functions, to be called in a test of yours.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import product
from typing import Any

import torch
from torch import Tensor

from attnkit import masks, pse
from attnkit.attention import Attention
from attnkit.errors import BackendRefused, CompositionError, shown
from attnkit.layouts import SeqLens
from attnkit.masks import Mask
from attnkit.pse import Pse

__all__ = ["check_backend", "check_bias", "check_mask"]

_WORSE = 4
"""Two computations of one formula err alike; a worse order of sums costs a few times as much."""


def check_mask(
    mask: Mask, allowed: Callable[[int, int, int, int], bool] | None = None, *, longest: int = 5
) -> int:
    """Raise where a mask is not what it says; return how many cells were compared.

    `allowed` is its definition for the first batch element and head, ``(i, j, q_len, kv_len)``:
    True where query i may see key j. For all lengths up to `longest` (those it is made for, where
    it is made for some) its cells are compared with it, with its region (or, of a mask that is
    none, with the regions that it lies between), with parts of it, and where it is not `anchored`
    with those of other lengths. Its text, its pickle and its hash give it back.

    >>> from attnkit import masks
    >>> check_mask(masks.SlidingWindow(2), lambda i, j, q, kv: 0 <= i + kv - q - j < 2)
    225
    >>> check_mask(masks.Causal(), lambda i, j, q, kv: j <= i)
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionError: Causal() at 1 x 2 (queries x keys): cell (0, 1) is allowed, \
and its definition says masked
    """
    _check_value(mask, None if mask.tensors else masks.parse)
    count = 0
    for q_len, kv_len in _lengths(mask, longest):
        cells = _cells(mask, q_len, kv_len)
        told = f"{mask!r} at {q_len} x {kv_len} (queries x keys)"
        for i, j in product(range(q_len), range(kv_len)):
            if allowed is not None and bool(cells[i, j]) != bool(allowed(i, j, q_len, kv_len)):
                is_, said = ("allowed", "masked") if cells[i, j] else ("masked", "allowed")
                raise CompositionError(
                    f"{told}: cell {i, j} is {is_}, and its definition says {said}"
                )
        _check_regions(mask, cells, told)
        if not mask.anchored and mask.extent == (None, None):
            whole = _cells(mask, longest, longest)[:q_len, :kv_len]
            _same(cells, whole, f"{told}, which says that it is not anchored, and {longest} keys")
        count += cells.numel()
    return count


def _cells(mask: Mask, q_len: int, kv_len: int) -> Tensor:
    return mask.materialize(q_len, kv_len, _batch(mask), mask.heads or 1)[0, 0]


def _check_regions(mask: Mask, cells: Tensor, told: str) -> None:
    (q_len, kv_len), bounds = cells.shape, mask.enclosure(*cells.shape)
    inner, outer = (
        masks.Slices.of(region, q_len, kv_len).materialize(q_len, kv_len)[0, 0]
        for region in (bounds.inner, bounds.outer)
    )
    wrong = (inner & ~cells) | (cells & ~outer)
    _same(wrong, torch.zeros_like(wrong), f"{told}: its cells and the regions it lies between")
    if mask.is_region(q_len, kv_len) and mask.region(q_len, kv_len).area != int(cells.sum()):
        raise CompositionError(f"{told}: its region has another number of cells than it allows")
    rows, keys = slice(q_len // 2, q_len), slice(0, kv_len - kv_len // 3)
    if q_len and kv_len:
        ends = (rows.start, rows.stop), (keys.start, keys.stop)
        part = masks.Cut(mask, *ends, q_len, kv_len)
        size = rows.stop - rows.start, keys.stop
        found = part.materialize(*size, _batch(mask), mask.heads or 1)[0, 0]
        _same(found, cells[rows, keys], f"{told}: a part of it")


def check_bias(
    bias: Pse,
    value: Callable[[int, int, int, int, int], float] | None = None,
    *,
    num_heads: int = 2,
    longest: int = 5,
) -> int:
    """Raise where a bias is not what it says; return how many numbers were compared.

    `value` is its definition, ``(head, i, j, q_len, kv_len)``. For all lengths up to `longest`
    (those it is made for, where it is made for some) its numbers are compared with it and with
    those of its rectangles, and along diagonals where its `structure` says so. Attention with it
    is compared with attention with its matrix, on fused calls and on tiles. Its text and its
    pickle give it back.

    >>> from attnkit import pse
    >>> slopes = 0.0625, 0.00390625
    >>> check_bias(pse.ALiBi(2), lambda n, i, j, q, kv: -slopes[n] * abs(i + kv - q - j))
    450
    """
    _check_value(bias, None if bias.tensors else pse.parse)
    count, heads = 0, bias.heads or num_heads
    for k, (q_len, kv_len) in enumerate(reversed(_lengths(bias, longest))):
        whole = bias.materialize(q_len, kv_len, heads=heads, dtype=torch.float64).detach()
        told = f"{bias!r} at {q_len} x {kv_len} (queries x keys)"
        if value is not None:
            each = product(range(heads), range(q_len), range(kv_len))
            said = torch.tensor([value(*at, q_len, kv_len) for at in each], dtype=torch.float64)
            said = said.view(heads, q_len, kv_len)
            _same(whole[0].expand_as(said), said, f"{told} and its definition")
        if bias.toeplitz:
            along = f"{told}, which says that only distances matter: neighbours on a diagonal"
            _same(whole[..., 1:, 1:], whole[..., :-1, :-1], along)
        if q_len and kv_len and k % 5 == 0:  # wide, high and square ones, and the largest
            _check_use(bias, whole, (q_len, kv_len), heads, told)
        count += whole.shape[1] * q_len * kv_len
    return count


def _check_use(bias: Pse, whole: Tensor, sizes: tuple[int, int], heads: int, told: str) -> None:
    q_len, kv_len = sizes
    part = bias.cut((q_len // 2, q_len), (0, kv_len), q_len=q_len, kv_len=kv_len)
    found = part.materialize(q_len - q_len // 2, kv_len, heads=heads, dtype=torch.float64)
    _same(found.detach(), whole[..., q_len // 2 :, :], f"{told}: a part of it")
    matrix = pse.Dense(whole, before_scale=bias.before_scale)
    tensors = _tensors(_batch(bias), q_len, kv_len, heads, torch.float64)
    right = Attention(heads, 8, mask=masks.Causal(), pse=matrix, backend="reference")(*tensors)
    for backend in ("reference", "tiled", "emulated"):
        try:
            ours = Attention(heads, 8, mask=masks.Causal(), pse=bias, backend=backend)(*tensors)
        except BackendRefused:
            continue
        _same(ours.detach(), right, f"{told}: attention on {backend!r} and with its matrix")


_MASKS: dict[str, Mask] = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "window": masks.Causal() & masks.SlidingWindow(3),
    "rows without a key": masks.Rows(2, 5),
    "keys of some batch elements": masks.Padding((7, 4)),
    "two documents": masks.Documents((3, 4)) & masks.Causal(),
    "no union of slices": masks.Dilated(2),
}
_TERMS: dict[str, dict[str, Any]] = {
    "a bias": {"pse": pse.ALiBi(4)},
    "a sink": {"sink": True},
    "a soft-cap": {"softcap": 3.0},
    "a scale": {"scale": 0.7},
    "key heads that are shared": {"num_kv_heads": 2},
    "heads first": {"layout": "BNSD"},
    "packed sequences": {"layout": "TND"},
}


def check_backend(name: str) -> dict[str, tuple[str, ...]]:
    """Raise where a backend differs from the definition; return what it refused, by composition.

    It runs masks and terms of a composition, in float64 where it takes that, in float32 else.
    Output, log-sum-exp, largest score and the gradients of query, key and value are compared with
    `reference`. What it refuses is returned with the codes of its reasons; empty where it ran and
    agrees. A backend that refuses everything raises, too.

    >>> found = check_backend("emulated")
    >>> [what for what, codes in found.items() if codes]
    ['a soft-cap']
    """
    cases = {what: {"mask": mask} for what, mask in _MASKS.items()}
    cases |= {what: {"mask": masks.Causal(), **terms} for what, terms in _TERMS.items()}
    told = {what: _refused_or_right(name, what, how) for what, how in cases.items()}
    if all(told.values()):
        raise CompositionError(f"backend {name!r} refuses all of {', '.join(told)}")
    return told


def _refused_or_right(name: str, what: str, how: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        dtype, ours = torch.float64, _results(name, torch.float64, how)
    except BackendRefused:
        try:
            dtype, ours = torch.float32, _results(name, torch.float32, how)
        except BackendRefused as refused:
            return tuple(dict.fromkeys(refusal.code for refusal in refused.refusals))
    exact, rough = (_results("reference", t, how) for t in (torch.float64, torch.float32))
    for (part, found), right, near in zip(
        ours.items(), exact.values(), rough.values(), strict=True
    ):
        known = right.isfinite()
        off = (near.double() - right)[known].abs().max() * torch.finfo(dtype).eps
        most = _WORSE * float(off / torch.finfo(torch.float32).eps)
        most += 64 * torch.finfo(dtype).eps * float(right[known].abs().max())
        error = (found.double() - right)[known].abs().max()
        if not bool(torch.equal(found.double()[~known], right[~known]) and error <= most):
            raise CompositionError(
                f"backend {name!r} differs from the definition in {part} of {what!r} ({dtype}): by "
                f"{float(error):.3g}, where rounding explains {most:.3g}"
            )
    return ()


def _results(name: str, dtype: torch.dtype, how: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what a backend answers, and the gradients."""
    layer = Attention(4, 8, backend=name, **how)
    lens = SeqLens([4, 1, 9]) if layer.layout == "TND" else None
    tensors = _tensors(2, 7, 7, 4, dtype, layer.num_kv_heads)
    if lens is not None:
        tensors = [tensor.flatten(0, 1) for tensor in tensors]
    elif layer.layout == "BNSD":
        tensors = [tensor.transpose(1, 2) for tensor in tensors]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    output, stats = layer(*tensors, seqlens=lens, return_stats=True)
    weights = torch.arange(output.numel(), dtype=torch.float64).sin().view(output.shape)
    grads = torch.autograd.grad((output * weights.to(dtype)).sum(), tensors)
    found = {"the output": output, "the log-sum-exp": stats.lse, "the maximum": stats.max}
    for what, grad in zip(("query", "key", "value"), grads, strict=True):
        found[f"the gradient of the {what}"] = grad
    return {part: tensor.detach() for part, tensor in found.items()}


def _tensors(
    batch: int, q_len: int, kv_len: int, heads: int, dtype: torch.dtype, kv_heads: int | None = None
) -> list[Tensor]:
    """Return query, key and value, BSND, the same numbers in every call."""
    made = torch.Generator().manual_seed(0)
    sizes = ((q_len, heads), (kv_len, kv_heads or heads), (kv_len, kv_heads or heads))
    shapes = [(batch, *size, 8) for size in sizes]
    return [torch.randn(s, generator=made, dtype=torch.float64).to(dtype) for s in shapes]


def _lengths(of: Mask | Pse, longest: int) -> list[tuple[int, int]]:
    """Return the lengths that something is made for; one that raises for a pair is not."""
    found = []
    for q_len, kv_len in product(*(range(longest + 1) if n is None else (n,) for n in of.extent)):
        with suppress(CompositionError):
            of.check(q_len, kv_len, _batch(of), of.heads or 1)
            found.append((q_len, kv_len))
    if not any(q_len and kv_len for q_len, kv_len in found):
        raise CompositionError(f"{of!r} fits no lengths up to {longest}; give a larger longest=")
    return found


def _batch(of: Mask | Pse) -> int:
    return (of.batches if isinstance(of, Mask) else of.batch) or 1


def _check_value(one: Any, read: Callable[[str], Any] | None) -> None:
    with suppress(pickle.PicklingError, AttributeError):  # a class of a notebook, a lambda
        again = pickle.loads(pickle.dumps(one))
        if again != one or hash(again) != hash(one):
            raise CompositionError(f"{one!r} is another value after a pickle: give it equality")
    if read is not None and read(str(one)) != one:
        raise CompositionError(f"{one!r} is another value when its text {shown(str(one))} is read")


def _same(found: Tensor, right: Tensor, told: str) -> None:
    wrong = ~torch.isclose(found.double(), right.double(), rtol=1e-9, atol=1e-9)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise CompositionError(
            f"{told} differ at {at}: {found[at].item():g} and {right[at].item():g}"
        )
