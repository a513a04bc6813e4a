"""The report of a plan: what was understood, what runs, what it costs, what was refused."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from attnkit.display import Text
from attnkit.errors import Refusal
from attnkit.geometry import Region
from attnkit.kernel import KernelCall
from attnkit.layouts import Sizes
from attnkit.layouts.names import doubt
from attnkit.masks import naming
from attnkit.masks.predicate import function_name
from attnkit.planner.backward import backward_time
from attnkit.planner.bias_pass import BiasPass
from attnkit.planner.biases import COMPRESSED_ROWS, is_compressed
from attnkit.planner.calls import Launch, Solution, Tokens, diagonal_blocks
from attnkit.planner.lower import MOST_MASK_CELLS, lower
from attnkit.planner.orders import how_moved
from attnkit.planner.parted import Parted
from attnkit.planner.plan import Plan, disprove_plan
from attnkit.planner.price import Price, dearer
from attnkit.planner.request import Request, Share
from attnkit.planner.routes import Route
from attnkit.planner.sequences import Block
from attnkit.ranges import Ranges, total

__all__ = ["as_data", "bytes_told", "entry", "explain", "listed", "proven", "request_lines", "said"]

WIDTH = 80
_LABEL = 12
_MOST_REASONS = 8
_MOST_RANGES = 3
_NAMED_SLICES = 2  # regions of more are searched for a name too long


def explain(plan: Plan) -> Text:
    """Return the report that `Plan.explain` documents, 80 columns wide."""
    request = plan.request
    count = len(plan.steps)
    calls_made = f"{count} fused call" + "s" * (count > 1)
    runs = calls_made if count else "the composition itself, no fused call"
    lines = [f"attention on backend '{plan.backend}': {runs}"]
    calls = plan if plan.steps else lower(request)
    for label, text in request_lines(request, calls.in_order):
        lines += entry(label, text)
    lines += listed("passed over", plan.passed_over)
    if not plan.steps:
        lines.append("on Ascend, the same composition is:")
    if calls.steps:
        lines += _solution_lines(calls)
        if plan.savings:
            told = "; ".join(map(str, plan.savings))
            lines += entry("cheaper", f"for each allowed cell: {told}")
    if plan.steps or not calls.steps:
        lines += listed("refused", calls.refusals)
    return Text("\n".join(lines))


def _block(block: Block) -> dict[str, Any]:
    """Return a block as plain data: ranges as ``[first, stop, step]``."""
    rows, keys = ([[r.start, r.stop, r.step] for r in some] for some in (block.rows, block.keys))
    return {"batch": block.batch, "rows": rows, "keys": keys}


def _call(launch: Launch) -> dict[str, Any]:
    given = launch.call.non_default_arguments()
    return {
        "label": launch.label,
        "arguments": {name: _as_json(value) for name, value in given.items()},
        "blocks": [_block(k) for k in launch.blocks],
        "heads": None if launch.heads is None else list(launch.heads),
    }


def as_data(plan: Plan) -> dict[str, Any]:
    """Return the dictionary that `Plan.to_dict` documents."""
    request = plan.request

    def solution(found: Solution) -> dict[str, Any]:
        return {
            "calls": list(map(_call, found.launches)),
            "price": found.price.to_dict(),
            "bias_pass": None if found.bias_pass is None else found.bias_pass.to_dict(),
        }

    def refusal(found: Refusal) -> dict[str, str]:
        return {"subject": found.subject, "code": found.code, "reason": found.reason}

    return {
        "backend": plan.backend,
        "request": dict(request_lines(request, plan.in_order)),
        "moved": None if plan.in_order is None else how_moved(request, plan.in_order),
        "plan": solution(plan.solution) if plan.steps else None,
        "backward": list(map(_call, plan.back)),
        "route": None if plan.route is None else str(plan.route),
        "alternatives": [
            {"label": other.label, "price": other.price.to_dict()} for other in plan.alternatives
        ],
        "cheaper": [{"change": s.change, "share": s.share} for s in plan.savings],
        "refusals": [refusal(r) for r in plan.refusals],
        "passed_over": [refusal(r) for r in plan.passed_over],
    }


def _as_json(value: object) -> object:
    if isinstance(value, tuple):
        return [_as_json(item) for item in value]
    return value if isinstance(value, int | float | str | bool | type(None)) else str(value)


def request_lines(request: Request, in_order: Request | None = None) -> Iterator[tuple[str, str]]:
    """Yield what is asked for, as labels and sentences."""
    yield "mask", f"{request.mask!r}: {_understood(request, in_order)}"
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
    query = Sizes(request.batch, request.q_len, request.num_heads, request.head_dim)
    key = Sizes(request.batch, request.kv_len, request.num_kv_heads, request.head_dim)
    doubted = doubt(request.layout_of, query, key)
    if doubted is not None:
        yield "layout?", doubted
    extras = [str(request.dtype).removeprefix("torch."), f"scale {request.scale:.6g}"]
    extras += [f"dropout {request.dropout:g}"] if request.dropout else []
    extras += [f"softcap {request.softcap:g}"] if request.softcap else []
    if request.score_fn is not None:
        extras.append(f"score_fn {function_name(request.score_fn)}")
    extras += ["a learnable sink per head"] if request.sink else []
    yield "numbers", ", ".join(extras)
    if request.share is not None:
        yield "share", _shared(request, request.share)
    if request.deterministic:
        here = "by operators that add in a fixed order"
        switch = "by torch.use_deterministic_algorithms, which its kernels follow"
        by = here if request.device in ("cpu", "meta") else switch
        yield "repeats", f"the same bits in every run, {by}"


def _shared(request: Request, share: Share) -> str:
    """Say what of a larger attention a request has, and how exact its results are."""
    own = (("rows", share.rows), ("keys", share.keys))
    said = " and ".join(
        f"{total(some):,} {name}" + f" in {len(some):,} ranges" * (len(some) > 1)
        for name, some in own
    )
    text = f"{said} of {share.q_len:,} x {share.kv_len:,}; its results are merged with others'"
    if request.dtype.itemsize <= 2:
        text += ", unrounded but for what a fused call rounds itself: its output and gradients"
    return text


def _understood(request: Request, in_order: Request | None) -> str:
    """Say the mask's region in words, its density and its empty rows."""
    known, sequences, where = request.matrices, request.sequences, ""
    if in_order is not None and isinstance(in_order.mask, Parted):
        cells = sum(region.area for region in in_order.matrices.regions())
        whole = sum(q * kv for q, kv in request.sequences)
        return (
            f"two regions, of tokens as they stand and of sorted ones; {cells:,} of {whole:,} "
            f"cells ({100 * cells / whole:.1f} %)"
        )
    if not known.exact and in_order is not None:
        # Heads that are folded into the batch have a score matrix each there.
        known, sequences = in_order.matrices, in_order.sequences
        where = "a region once positions are sorted; "
    if not known.exact:
        if request.mask.comes_with_call:
            return "which cells they are comes with each call, and no plan depends on it"
        return "not a union of slices, so its cells are passed one by one"
    if known.per_head:
        return f"{len(known.planes)} heads with different regions"
    regions = list(zip(known.regions(), sequences, strict=True))
    kinds: Counter[str] = Counter()
    for (region, sizes), count in Counter(pair for pair in regions if all(pair[1])).items():
        kinds[_named(region, *sizes)] += count
    names = " or ".join(kind for kind, _ in kinds.most_common(3)) + " or more" * (len(kinds) > 3)
    names = where or ("" if names == str(request.mask) else f"{names}; ")
    cells = sum(region.area for region, _ in regions)
    whole = sum(q * kv for q, kv in sequences)
    empty = sum(b - a for r, (q_len, _) in regions for a, b in r.empty_rows(q_len))
    share = f"{100 * cells / whole:.1f} %" if whole else "none"
    rows = f"{empty:,} rows see no key and give 0" if empty else "every row sees a key"
    return f"{names}{cells:,} of {whole:,} cells ({share}); {rows}"


def _named(region: Region, q_len: int, kv_len: int) -> str:
    """Say what a region is: by its name if that is soon found, or by its diagonal blocks."""
    if len(region.slices) <= _NAMED_SLICES:
        found = naming.name((region,), q_len, kv_len)
        if found is not None:
            return str(found)
    cells = [k for k in diagonal_blocks(region, q_len, kv_len, 0) if all(k.sizes)]
    if len(cells) < 2:
        return f"{len(region.slices)} slices"
    kinds: dict[str, None] = {}
    for part in {(region.cut(k.ends[:2], k.ends[2:]), k.sizes): None for k in cells}:
        kinds[_named(part[0], *part[1])] = None
        if len(kinds) > 2:
            return f"{len(cells)} diagonal blocks"
    return f"{len(cells)} diagonal blocks, each {' or '.join(kinds)}"


def _solution_lines(plan: Plan) -> list[str]:
    lines: list[str] = []
    request, best, others = plan.request, plan.solution, plan.alternatives
    several = len(best.launches) > 1
    for k, launch in enumerate(best.launches, start=1):
        given = launch.call.non_default_arguments()
        tensors = ", ".join(f"{name} {given.pop(name)}" for name in ("query", "key", "value"))
        count = len(launch.blocks)
        sequences = f", {count} sequence{'s' * (count > 1)}" if launch.call.is_packed else ""
        name = f"{launch.call.op}, {launch.label}{sequences}"
        lines += entry(f"call {k}" if several else "call", name)
        lines += entry("", tensors)
        lines += entry("", ", ".join(f"{name}={said(v)}" for name, v in given.items()))
        lines += entry("gathers", _gathered(launch, plan.in_order or request))
    lines += entry("merge", _merge(plan))
    lines += entry("backward", _backward(plan))
    if plan.in_order is not None:
        lines += entry("moved", how_moved(request, plan.in_order))
    lines += _price_lines(Solution(best.launches).price, request)
    if plan.bias_pass is not None:
        lines += entry("bias pass", _pass(plan.bias_pass, request))
    if request.bias:
        lines += entry("bias bytes", _bias(best, request, plan.route))
    lines += entry("empty rows", _rows(best))
    lines += entry("proof", proven(plan))
    if others:
        told = ", ".join(f"{o.label}{_merged(o)} ({_than(best, o)})" for o in others[:6])
        more = f", and {len(others) - 6} more" if len(others) > 6 else ""
        lines += entry("also right", told + more)
    return lines


def _gathered(launch: Launch, request: Request) -> str:
    """Say which rows and keys the sequences of a call are copied from; nothing where none are."""
    scattered = [block for block in launch.blocks if not block.is_rectangle]
    if not scattered:
        return ""
    times = len(launch.keys) / sum(kv_len for _, kv_len in request.sequences)
    first, some = scattered[0], "sequences have" if len(scattered) > 1 else "sequence has"
    return (
        f"{len(scattered)} {some} rows or keys from several places; all have "
        f"{_between(block.sizes[0] for block in launch.blocks)} rows and "
        f"{_between(block.sizes[1] for block in launch.blocks)} keys each, "
        f"{len(launch.keys):,} keys in all ({times:.3g} times K and V); the first has rows "
        f"{_ranges(first.rows)} and keys {_ranges(first.keys)}"
    )


def _between(counts: Iterable[int]) -> str:
    some = set(counts)
    return f"{min(some):,}" if len(some) == 1 else f"{min(some):,} to {max(some):,}"


def _ranges(ranges: Ranges) -> str:
    """List ranges by their first and last position, the first few of them."""
    told = ", ".join(_range(one) for one in ranges[:_MOST_RANGES])
    more = len(ranges) - _MOST_RANGES
    return f"{told} and {more} more" if more > 0 else told


def _range(one: range) -> str:
    return f"{one[0]}-{one[-1]}" if len(one) > 1 else f"{one[0]}"


def _merge(plan: Plan) -> str:
    """Say how often rows are answered, where calls answer parts of the rows."""
    if not plan.steps[0].partial:
        return ""
    if all(parts.once for parts in plan.by_heads):
        return "none: every row is answered once"
    most = max(
        len(Tokens(tuple(one for k in parts.launches for one in k.queries.ranges)).layers)
        for parts in plan.by_heads
    )
    times = f"up to {most} times" if most > 1 else "once"
    return f"rows are answered {times}, and merged by their statistics"


def _backward(plan: Plan) -> str:
    """Say by which calls the gradients come, where these are not the plan's own."""
    if not plan.back:
        return ""
    times = (backward_time(launches) / 1e3 for launches in (plan.back, plan.steps))
    found, own = (f"{time:,.0f} us" for time in times)
    return (
        f"gradients come from {Solution(plan.back).label}, where every key is in one sequence and "
        f"its rows are gathered: about {found}, and {own} by the calls above"
    )


def _price_lines(price: Price, request: Request) -> list[str]:
    heads, size = request.num_heads, 2 * (request.head_dim + request.value_dim)
    whole = sum(q * kv for q, kv in request.sequences)
    lines = entry(
        "compute",
        f"{_flops(size * price.cells)} on allowed cells, {_flops(price.flops)} in whole tiles; "
        f"{_flops(size * whole * heads)} if dense",
    )
    mask = f"{bytes_told(price.mask_bytes)}; a dense mask would be {bytes_told(whole)}"
    if whole > MOST_MASK_CELLS:
        mask += f", above the {bytes_told(MOST_MASK_CELLS)} up to which one is weighed"
    lines += entry("mask bytes", mask)
    lines += entry("memory", f"{bytes_told(price.peak_bytes)} beyond the inputs")
    if price.copy_bytes:
        lines += entry("copies", f"{bytes_told(price.copy_bytes)} to gather, pack and merge")
    return lines


def _pass(found: BiasPass, request: Request) -> str:
    """Say what the pass for the gradient of the bias does, for which addends, and what it costs."""
    terms, price = " + ".join(request.bias[k].text for k in found.terms), found.price
    return (
        f"the kernel reads {terms} and writes no gradient of it: the backward makes that one in "
        f"torch, tile by tile from the calls' statistics, in {_flops(price.flops)} and "
        f"{bytes_told(price.copy_bytes)} moved, {bytes_told(price.peak_bytes)} at a time, about "
        f"{price.nanoseconds / 1e3:,.0f} us"
    )


def _bias(best: Solution, request: Request, route: Route | None) -> str:
    """Say how the bias reaches the calls, and what a matrix of it would be."""
    ways = [str(route)] if route is not None else []
    ways += dict.fromkeys(_way(launch.call) for launch in best.launches if launch.call.pse)
    batch = next((term.batch for term in request.bias if term.batch is not None), 1)
    cells = batch * max((q * kv for q, kv in request.sequences), default=0)
    whole = cells * request.num_heads * request.dtype.itemsize
    told = f"{bytes_told(best.price.bias_bytes)}, {' and '.join(ways)}"
    return f"{told}; a matrix of all cells would be {bytes_told(whole)}"


def _way(call: KernelCall) -> str:
    if call.pse_type in (2, 3):
        return "slopes"
    if is_compressed(call):
        return f"its last {COMPRESSED_ROWS:,} rows"
    return "a matrix"


def proven(plan: Plan) -> str:
    """Say what has been proven, now that it has been."""
    wrong = disprove_plan(plan)
    if wrong is not None:
        return f"NONE: {wrong.reason} [{wrong.code}]"
    if any(launch.is_opaque for launch in plan.steps):
        return "the mask passed is the mask asked for, and the rest of the call what it asks for"
    if plan.request.mask.comes_with_call:
        return (
            "every query block is in one call; whatever different blocks come, its call's set is "
            "their keys and its own ones, cell for cell"
        )
    if len(plan.steps) == 1:
        return "the call's set equals the mask's, cell for cell"
    return "the calls' sets are disjoint, and their union equals the mask's, cell for cell"


def _rows(best: Solution) -> str:
    if any(launch.is_opaque for launch in best.launches):
        return "inner_precise=2, since rows may turn out to see no key"
    if best.launches[0].partial:
        return "no call sees one; rows that none answers are 0"
    if not best.launches[0].has_empty_rows:
        return "none, so inner_precise stays 0 (the faster path)"
    return "inner_precise=2 makes them 0 instead of the mean of V"


def _merged(other: Solution) -> str:
    """Say that a solution merges parts of rows, where its one label does not show it."""
    launches = other.launches
    if len(launches) > 1 or not launches[0].partial or launches[0].queries.are_distinct:
        return ""
    return ", merged"


def _than(best: Solution, other: Solution) -> str:
    return dearer(other.price.nanoseconds, best.price.nanoseconds)


def said(value: object) -> str:
    """Return an argument of a call as text; of a long tuple the beginning."""
    if isinstance(value, tuple) and len(value) > 6:
        return f"({', '.join(map(str, value[:5]))}, ... {len(value)} in all)"
    return str(value)


def listed(label: str, refusals: Sequence[Refusal]) -> list[str]:
    """List refusals, those for one reason together, as far as a reader will follow."""
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for refusal in refusals:
        reasons.setdefault((refusal.reason, refusal.code), {})[refusal.subject] = None
    lines: list[str] = []
    for (reason, code), subjects in list(reasons.items())[:_MOST_REASONS]:
        told = "; ".join(filter(None, subjects))  # none: it holds for whatever calls there are
        lines += entry("" if lines else label, f"{told}{': ' if told else ''}{reason} [{code}]")
    if len(reasons) > _MOST_REASONS:
        lines += entry("", f"and for {len(reasons) - _MOST_REASONS} more reasons")
    return lines


def entry(label: str, text: str, indent: int = 0) -> list[str]:
    """Return the lines of a sentence after a label; none where it says nothing."""
    first = f"  {label:<{_LABEL}}" + " " * indent
    rest = " " * (len(first) + 2)
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
    )


def bytes_told(count: float) -> str:
    """Say how many bytes in three digits."""
    return f"{count:.0f} B" if count < 1000 else _amount(count, "B", "kMG")


def _flops(count: float) -> str:
    return _amount(count, "FLOP", "kMGT")


def _amount(count: float, unit: str, prefixes: str) -> str:
    power = max(n for n in range(len(prefixes) + 1) if n == 0 or count >= 1000**n)
    return f"{count / 1000**power:.3g} {('', *prefixes)[power]}{unit}"
