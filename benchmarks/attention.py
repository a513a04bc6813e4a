"""Attention side by side: attnkit's tiled backend and torch's own ways to run the same mask.

Everything runs in one process, competitors alternate, and what counts are ratios of medians:
the machine's mood is the same for all. `python benchmarks/attention.py --help` lists the options;
tables go to benchmarks/results/attention.md, rows as data to attention.json beside it, of which
`_report.py` makes RESULTS.md. On a busy machine use ``--threads 1``, which measures processor
time instead of wall time.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import attnkit as ak
import attnkit.backends.tiled
from attnkit import masks, pse
from attnkit.backends.flex import block_mask, mask_mod

sys.path.insert(0, str(Path(__file__).parents[1]))
from docs.make.variants import block_diffusion

RESULT = Path(__file__).parent / "results" / "attention.md"
HEADS = 8
NAIVE = 2048
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One composition, and the cells that it needs at a length."""

    name: str
    mask: Callable[[int], masks.Mask]
    alibi: bool = False
    dropout: float = 0.0


CASES = (
    Case("full", lambda s: masks.Full()),
    Case("causal", lambda s: masks.Causal()),
    Case("window 256", lambda s: masks.SlidingWindow(256)),
    Case("window 1024", lambda s: masks.SlidingWindow(1024)),
    Case("prefix 512 + causal", lambda s: masks.Prefix(512) | masks.Causal()),
    Case("8 documents, causal", lambda s: masks.Documents([s // 8] * 8) & masks.Causal()),
    Case("uneven documents, causal", lambda s: uneven(s) & masks.Causal()),
    Case(
        "sink 4 + window 256",
        lambda s: masks.Causal() & (masks.SlidingWindow(256) | masks.Columns(0, 4)),
    ),
    Case(
        "sink 4 + window 1024",
        lambda s: masks.Causal() & (masks.SlidingWindow(1024) | masks.Columns(0, 4)),
    ),
    Case("padding", lambda s: masks.Padding([s * 3 // 4])),
    Case("block diffusion, blocks of 64", lambda s: block_diffusion(s, 64)),
    Case("causal, ALiBi", lambda s: masks.Causal(), alibi=True),
    Case("window 256, dropout 0.1", lambda s: masks.SlidingWindow(256), dropout=0.1),
)


def uneven(length: int) -> masks.Mask:
    """Documents of very different lengths."""
    shares = (1, 16, 4, 2, 1, 8)
    return masks.Documents([length * share // 32 for share in shares])


def competitors(case: Case, length: int, tensors: list[Tensor]) -> dict[str, Run]:
    """Return the ways to run a case; all compute the same numbers, dropout aside."""
    mask = case.mask(length)
    bias = pse.ALiBi(HEADS) if case.alibi else None
    layer = ak.Attention(
        HEADS,
        tensors[0].shape[-1],
        mask=mask,
        pse=bias,
        dropout=case.dropout,
        layout="BNSD",
        backend="tiled",
    )
    dense = mask.materialize(length, length)
    if bias is not None:
        added = bias.materialize(length, length, dtype=tensors[0].dtype)
        dense = added.masked_fill_(~dense, -torch.inf)
    ways: dict[str, Run] = {
        "tiled": lambda: layer(*tensors),
        "dense mask": lambda: sdpa(*tensors, attn_mask=dense, dropout_p=case.dropout),
        "unmasked": lambda: sdpa(*tensors),
    }
    if case.name == "causal":
        ways["is_causal"] = lambda: sdpa(*tensors, is_causal=True)
    return ways


def naive(case: Case, length: int, tensors: list[Tensor]) -> Run | None:
    """Return softmax as a textbook has it, where its matrices are small enough to be met."""
    if length > NAIVE or case.alibi or case.dropout:
        return None
    hidden = ~case.mask(length).materialize(length, length)
    scale = tensors[0].shape[-1] ** -0.5

    def run() -> Tensor:
        query, key, value = tensors
        scores = (scale * query @ key.transpose(-2, -1)).masked_fill(hidden, -torch.inf)
        return torch.softmax(scores, -1) @ value

    return run


def compiled_flex(case: Case, length: int, tensors: list[Tensor]) -> Run | None:
    """Return compiled FlexAttention for a case; forward only, since it has no CPU backward.

    Its block mask is made from the region, so that its figure is that of the attention alone.
    """
    if case.dropout or case.alibi or case.name == "full":
        return None
    from torch.nn.attention.flex_attention import flex_attention

    mask = case.mask(length)
    blocks = block_mask(mask, length, length)
    blocks.mask_mod = BY_HAND.get(case.name, mask_mod(mask, length, length))
    torch.compiler.reset()
    flex = torch.compile(flex_attention, dynamic=False)
    inputs = [t.detach() for t in tensors]
    return lambda: flex(*inputs, block_mask=blocks)


# What an author would write for FlexAttention; other masks are read from tables.
BY_HAND: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "causal": lambda b, h, i, j: i >= j,
    "window 256": lambda b, h, i, j: (i >= j) & (i - j < 256),
    "window 1024": lambda b, h, i, j: (i >= j) & (i - j < 1024),
    "prefix 512 + causal": lambda b, h, i, j: (i >= j) | (j < 512),
    "sink 4 + window 256": lambda b, h, i, j: (i >= j) & ((i - j < 256) | (j < 4)),
    "sink 4 + window 1024": lambda b, h, i, j: (i >= j) & ((i - j < 1024) | (j < 4)),
}


def alternate(ways: dict[str, Run], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return the median time of each way, measured in turns.

    Their order is drawn anew: who comes after the release of much memory pays for page faults.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    names, draw = list(ways), Random(0)
    for turn in range(repeats + 1):
        draw.shuffle(names)
        for name in names:
            run = ways[name]
            start = clock()
            run()
            if turn:
                times[name].append(clock() - start)
    return {name: median(taken) for name, taken in times.items()}


def forward_only(run: Run) -> Run:
    def timed() -> Tensor:
        with torch.no_grad():
            return run()

    return timed


def with_backward(run: Run, tensors: list[Tensor], slope: Tensor) -> Run:
    def timed() -> Tensor:
        return torch.autograd.grad(run(), tensors, slope)[0]

    return timed


def measure(
    case: Case, length: int, dim: int, dtype: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return the rows of one case at one size, and print them as those of a table."""
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    shape = (1, HEADS, length, dim)
    tensors = [torch.randn(shape, dtype=DTYPES[dtype], requires_grad=True) for _ in range(3)]
    slope = torch.randn(shape, dtype=DTYPES[dtype])
    cells = HEADS * case.mask(length).region(length, length).area
    ways = competitors(case, length, tensors)
    rows = []
    for what, products in (("forward", 4), ("forward + backward", 14)):

        def timing(run: Run, products: int = products) -> Run:
            return forward_only(run) if products == 4 else with_backward(run, tensors, slope)

        timed = {name: timing(run) for name, run in ways.items()}
        slow = naive(case, length, tensors)
        if slow is not None:
            timed["naive"] = timing(slow)
        if products == 4 and options.flex and length <= options.flex_longest:
            flex = compiled_flex(case, length, tensors)
            if flex is not None:
                timed["flex"] = timing(flex)
        taken = alternate(timed, options.repeats * max(1, 8192 // length), clock)
        mine = taken["tiled"]
        row = {
            "mask": case.name,
            "length": length,
            "dim": dim,
            "dtype": dtype,
            "pass": what,
            "ms": mine * 1e3,
            "gflops": products * cells * dim / mine / 1e9,
            "share": cells / HEADS / length**2 * taken["unmasked"] / mine,
            **{name: taken[name] / mine for name in COLUMNS if name in taken},
        }
        rows.append(row)
        print(table_row(row), flush=True)
    return rows


COLUMNS = ("dense mask", "unmasked", "is_causal", "flex", "naive")


def table_row(row: dict[str, Any]) -> str:
    """Return a row as text."""
    ratios = " | ".join(f"{row[name]:.2f}" if name in row else "" for name in COLUMNS)
    said = " | ".join(str(row[name]) for name in ("mask", "length", "dim", "dtype", "pass"))
    return f"| {said} | {row['ms']:.1f} | {ratios} | {row['gflops']:.0f} | {row['share']:.2f} |"


def peak_memory(name: str, way: str, length: int) -> None:
    """Print the peak of resident memory that one forward and backward adds, in MB."""
    (case,) = (case for case in CASES if case.name == name)
    shape = (1, HEADS, length, 64)
    tensors = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    slope = torch.randn(shape)
    warm = [t[:, :, :512].detach().requires_grad_() for t in tensors]
    torch.autograd.grad(competitors(case, 512, warm)[way](), warm, slope[:, :, :512])
    # Gradients and output are the price of any method.
    results = [torch.ones_like(t) for t in (*tensors, slope)]
    before = resident_peak()
    del results
    gc.collect()
    torch.autograd.grad(competitors(case, length, tensors)[way](), tensors, slope)
    print((resident_peak() - before) / 1024)


def resident_peak() -> int:
    """Return the largest resident size so far in kB (Linux); `ru_maxrss` counts the parent's."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def memory_rows(lengths: list[int]) -> Iterator[str]:
    """Measure peak memory, each in a process of its own."""
    for name in ("window 256", "causal", "8 documents, causal"):
        for length in lengths:
            for way in ("tiled", "dense mask"):
                if way == "dense mask" and length > 16384:
                    continue
                command = [sys.executable, __file__, "--peak", name, way, str(length)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                row = f"| {name} | {length} | {way} | {max(0.0, float(done.stdout)):.0f} |"
                print(row, flush=True)
                yield row


def growth_rows(options: argparse.Namespace) -> Iterator[tuple[int, float, float]]:
    """Yield lengths, the milliseconds of a window's forward there, and those of its plan."""
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    length = 4096
    while length <= options.longest:
        tensors = [torch.randn(1, HEADS, length, 64) for _ in range(3)]
        layer = ak.Attention(
            HEADS, 64, mask=masks.SlidingWindow(256), layout="BNSD", backend="tiled"
        )
        start = time.perf_counter()
        layer.plan(*tensors)
        planned = time.perf_counter() - start
        run = forward_only(lambda layer=layer, tensors=tensors: layer(*tensors))
        taken = alternate({"tiled": run}, options.repeats, clock)["tiled"]
        print(
            f"{length} tokens: {taken * 1e3:.1f} ms, planned in {planned * 1e3:.2f} ms", flush=True
        )
        yield length, taken * 1e3, planned * 1e3
        length *= 2


def written(results: Path, lines: list[str]) -> None:
    """Write a page of results."""
    results.parent.mkdir(exist_ok=True)
    results.write_text("\n".join(lines), encoding="utf-8")
    print(f"written to {results.name}")


def machine(threads: int) -> str:
    """Say what ran where."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    clock = "processor time" if threads == 1 else "wall time"
    return (
        f"{model}, {torch.backends.cpu.get_cpu_capability()}, threads: {threads}, {clock}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"attnkit {ak.__version__ if hasattr(ak, '__version__') else 'from source'}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--repeats", type=int, default=5, help="at 8,192 tokens; more below")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--longest", type=int, default=131072, help="of the growth table; 0: none")
    parser.add_argument("--flex", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--flex-longest", type=int, default=8192)
    parser.add_argument("--memory-lengths", type=int, nargs="*", default=[4096, 8192])
    parser.add_argument("--add", action="store_true", help="keep the rows of earlier runs")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.peak:
        name, way, length = options.peak
        peak_memory(name, way, int(length))
        return
    torch.set_num_threads(options.threads)
    store = RESULT.with_suffix(".json")
    data: dict[str, Any] = {"machine": "", "commands": [], "rows": [], "growth": [], "memory": []}
    if options.add and store.exists():
        data = json.loads(store.read_text(encoding="utf-8"))
    data["machine"] = machine(options.threads)
    data["commands"].append(f"python {shlex.join(['benchmarks/attention.py', *sys.argv[1:]])}")
    rows = {tuple(row[name] for name in KEYS): row for row in data["rows"]}
    for dtype in options.dtypes:
        for dim in options.dims:
            for length in options.lengths:
                for case in CASES:
                    if case.name in options.cases:
                        found = measure(case, length, dim, dtype, options)
                        rows.update({tuple(row[name] for name in KEYS): row for row in found})
    data["rows"] = sorted(rows.values(), key=lambda row: [row[name] for name in ORDER])
    if options.longest:
        data["growth"] = list(growth_rows(options))
    if options.memory_lengths:
        data["memory"] = list(memory_rows(options.memory_lengths))
    RESULT.parent.mkdir(exist_ok=True)
    store.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    RESULT.write_text("\n".join(page(data)) + "\n", encoding="utf-8")
    print(f"written: {RESULT.name}")


KEYS = ("mask", "length", "dim", "dtype", "pass")
ORDER = ("dtype", "dim", "length")


def page(data: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the tables."""
    yield from ("# Attention on the CPU", "", data["machine"] + ".", "")
    yield f"Batch 1, {HEADS} heads, layout BNSD; medians of turns, as these say:"
    yield from ("", *(f"    {command}" for command in data["commands"]), "")
    yield (
        "Columns after the milliseconds say how many times longer the others took: torch's SDPA "
        "with a dense mask; without a mask, which computes every cell (the right answer for the "
        "full mask only); with `is_causal`; compiled FlexAttention, on a block mask that was made "
        "beforehand; the textbook's softmax. The rate counts the cells that the mask needs; the "
        "share is that of SDPA's rate without a mask, in the same turns."
    )
    yield ""
    yield (
        "| mask | length | head size | dtype | pass | tiled, ms | dense mask | unmasked "
        "| is_causal | flex | naive | GFLOP/s | share |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    yield from (table_row(row) for row in data["rows"])
    if data["growth"]:
        yield from ("", "## Growth of a window of 256 keys, forward, float32", "")
        yield "| length | ms | microseconds per token | first plan, ms |"
        yield "|---|---|---|---|"
        for length, ms, planned in data["growth"]:
            yield f"| {length} | {ms:.1f} | {ms / length * 1e3:.2f} | {planned:.2f} |"
    if data["memory"]:
        yield from ("", "## Peak memory beyond inputs, output and gradients", "")
        yield from ("| mask | length | way | forward + backward, MB |", "|---|---|---|---|")
        yield from data["memory"]


if __name__ == "__main__":
    main()
