"""The report of a plan: what was understood, what runs, what it costs, what was refused."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from itertools import groupby

from attnkit.errors import Refusal
from attnkit.planner.lower import lower
from attnkit.planner.matrices import matrices
from attnkit.planner.plan import Launch, Plan
from attnkit.planner.request import Request
from attnkit.planner.words import in_words

__all__ = ["explain"]

WIDTH = 80
_LABEL = 11


def explain(plan: Plan) -> str:
    """Return the report that `Plan.explain` documents, 80 columns wide."""
    request = plan.request
    lines = [f"attention on backend '{plan.backend}': {_what_runs(plan)}"]
    for label, text in _request_lines(request):
        lines += _entry(label, text)
    lines += _list("passed over", list(plan.passed_over))
    if plan.steps:
        lines += _launch_lines(plan.steps[0], request, plan.alternatives)
        lines += _list("refused", list(plan.refusals))
        return "\n".join(lines)
    lowering = lower(request)
    lines.append("on Ascend, the same composition is:")
    if lowering.best is None:
        lines += _list("refused", list(lowering.refusals))
    else:
        lines += _launch_lines(lowering.best, request, lowering.alternatives)
    return "\n".join(lines)


def _what_runs(plan: Plan) -> str:
    if not plan.steps:
        return "the composition itself, no fused call"
    return f"{len(plan.steps)} fused call" + "s" * (len(plan.steps) > 1)


def _request_lines(request: Request) -> Iterator[tuple[str, str]]:
    yield "mask", f"{request.mask!r}: {_understood(request)}"
    if request.bias:
        yield "bias", " + ".join(term.text for term in request.bias)
    groups = "" if request.num_heads == request.num_kv_heads else f" on {request.num_kv_heads}"
    dims = f"{request.head_dim}"
    if request.value_dim != request.head_dim:
        dims += f" (values {request.value_dim})"
    count = f"batch {request.batch}" if request.seqlens is None else f"{request.batch} sequences"
    yield (
        "shape",
        f"{request.layout}, {count}, {request.q_len:,} queries x {request.kv_len:,} keys"
        f"{' in all' if request.seqlens is not None else ''}, "
        f"{request.num_heads}{groups} heads of {dims}",
    )
    extras = [str(request.dtype).removeprefix("torch."), f"scale {request.scale:.6g}"]
    extras += [f"dropout {request.dropout:g}"] if request.dropout else []
    extras += [f"softcap {request.softcap:g}"] if request.softcap else []
    extras += ["a learnable sink per head"] if request.sink else []
    yield "numbers", ", ".join(extras)


def _understood(request: Request) -> str:
    """Say the mask's region in words, its density and its empty rows."""
    known = matrices(request)
    if not known.exact:
        return "not a union of slices, so its cells are passed one by one"
    if known.per_head:
        return f"{len(known.planes)} heads with regions of their own"
    regions = list(zip(known.regions(), request.sequences, strict=True))
    kinds = Counter(in_words(r, *sizes) for r, sizes in regions if sizes[0] and sizes[1])
    names = " or ".join(kind for kind, _ in kinds.most_common(3)) + " or more" * (len(kinds) > 3)
    cells = sum(region.area for region, _ in regions)
    whole = sum(q * kv for q, kv in request.sequences)
    empty = sum(b - a for r, (q_len, _) in regions for a, b in r.empty_rows(q_len))
    share = f"{100 * cells / whole:.1f} %" if whole else "none"
    rows = f"{empty:,} rows see no key and give 0" if empty else "every row sees a key"
    return f"{names}; {cells:,} of {whole:,} cells ({share}); {rows}"


def _launch_lines(launch: Launch, request: Request, others: tuple[Launch, ...]) -> list[str]:
    call, price = launch.call, launch.price
    lines = _entry("call", f"npu_fusion_attention, {launch.label}")
    given = call.non_default_arguments()
    tensors = ", ".join(f"{name} {given.pop(name)}" for name in ("query", "key", "value"))
    lines += _entry("tensors", tensors)
    lines += _entry("arguments", ", ".join(f"{k}={_value(v)}" for k, v in given.items()))
    heads = request.num_heads
    whole = sum(q * kv for q, kv in request.sequences) * heads
    dense = 2 * whole * (request.head_dim + request.value_dim)
    needed = 2 * price.cells * (request.head_dim + request.value_dim)
    lines += _entry(
        "compute",
        f"{_flops(needed)} on allowed cells, {_flops(price.flops)} in whole tiles; "
        f"{_flops(dense)} if dense",
    )
    lines += _entry(
        "mask bytes",
        f"{_bytes(price.mask_bytes)}; a dense mask would be {_bytes(whole // heads)}",
    )
    lines += _entry("memory", f"{_bytes(price.peak_bytes)} beyond the inputs")
    if price.copy_bytes:
        lines += _entry("copies", f"{_bytes(price.copy_bytes)} to change the layout and back")
    lines += _entry("rows", _rows(launch))
    lines += _entry("proof", "the call's set equals the mask's, cell for cell")
    if others:
        told = ", ".join(f"{o.label} ({_dearer(o, launch)})" for o in others)
        lines += _entry("also right", told)
    return lines


def _rows(launch: Launch) -> str:
    if launch.call.atten_mask is not None and launch.call.atten_mask.is_opaque:
        return "inner_precise=2, since rows may turn out to see no key"
    if not launch.form.has_empty_rows:
        return "no row is empty, so inner_precise stays 0 (the faster path)"
    return "some rows are empty: inner_precise=2 makes them 0 instead of the mean of V"


def _dearer(other: Launch, best: Launch) -> str:
    more = other.price.nanoseconds / best.price.nanoseconds - 1
    return "same price" if more < 0.0005 else f"+{100 * more:.3g} %"


def _value(value: object) -> str:
    if isinstance(value, tuple) and len(value) > 6:
        return f"({', '.join(map(str, value[:5]))}, ... {len(value)} in all)"
    return str(value)


def _list(label: str, refusals: list[Refusal]) -> list[str]:
    lines: list[str] = []
    for reason, group in groupby(refusals, key=lambda r: (r.reason, r.code)):
        subjects = ", ".join(dict.fromkeys(r.subject for r in group))
        lines += _entry("" if lines else label, f"{subjects}: {reason[0]} [{reason[1]}]")
    return lines


def _entry(label: str, text: str, indent: int = 0) -> list[str]:
    first = f"  {label:<{_LABEL}}" + " " * indent
    rest = " " * (len(first) + 2)
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
    )


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return ""


def _flops(count: float) -> str:
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"):
        if count < 1000 or unit == "TFLOP":
            return f"{count:.3g} {unit}"
        count /= 1000
    return ""
