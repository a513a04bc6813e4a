"""Make RESULTS.md and its pictures of what the benchmarks left in results/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
TABLES = {
    "attention": "tiled against torch's ways to run the same mask: times, rates, growth, memory",
    "models": "attention in the shapes of models beside the best call of torch; decoding",
    "opaque": "masks that are no region beside their bounds: time, first calls, memory",
    "kernel_in_cpp": "the compiled kernel beside tiled, forward and backward",
    "sixteen_bits": "bfloat16 beside float32, in turns",
    "training": "steps per second of the example, on the reference and on tiled",
    "gpu": "on a GPU: compiled FlexAttention, SDPA's kernels by name, flash-attn",
    "changing": "lengths that are new in every step: the share of planning, and memory",
    "flex": "FlexAttention's block masks from regions and from cells",
    "overhead": "a call beside its operators",
    "imports": "what importing attnkit adds to importing torch",
    "lifting": "masks of other libraries read as sets",
    "switching": "the adapter of transformers: a layer's call, a new padding, a step",
    "compiled": "steps that are all different in one compiled graph",
    "parallel": "tokens of long texts on many ranks: cells, keys that travel, planning",
    "planner": "first plans and cached calls; sparse masks with and without gathered keys",
    "emulator": "the fused kernel's emulator: time and memory",
    "regions": "geometry at a million tokens",
}
BARS = ("dense mask", "flex", "naive")


def speedups(rows: list[dict[str, Any]], target: Path) -> str:
    """Draw how many times longer the others take, mask by mask, at the longest length."""
    dim = min(r["dim"] for r in rows)
    length = max(r["length"] for r in rows if r["dim"] == dim)
    chosen = [r for r in rows if (r["dim"], r["length"]) == (dim, length)]
    chosen = [r for r in chosen if (r["dtype"], r["pass"]) == ("float32", "forward")]
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(chosen) + 1))
    for k, name in enumerate(BARS):
        seen = [(place, r[name]) for place, r in enumerate(chosen) if name in r]
        if seen:
            places, ratios = zip(*seen, strict=True)
            axes.barh([p + 0.25 * k for p in places], ratios, height=0.25, label=name)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks([p + 0.25 for p in range(len(chosen))], [r["mask"] for r in chosen])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(
        f"times as long as tiled; forward, float32, {length:,} tokens, 8 heads of {dim}"
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=100)
    plt.close(figure)
    return f"![how many times longer the others take](results/{target.name})"


def growth(points: list[tuple[int, float, float]], target: Path) -> str:
    """Draw the time of a window's forward against the length."""
    lengths, times, plans = zip(*points, strict=True)
    figure, axes = plt.subplots(figsize=(6, 3.5))
    axes.loglog(lengths, times, "o-", label="forward")
    axes.loglog(lengths, plans, "s-", label="first plan")
    first = times[0] / lengths[0]
    axes.loglog(lengths, [first * n for n in lengths], "k:", label="linear")
    axes.set_xlabel("tokens, window of 256, 8 heads of 64, float32")
    axes.set_ylabel("ms")
    axes.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=100)
    plt.close(figure)
    return f"![time of a window against the length](results/{target.name})"


def main() -> None:
    """Write RESULTS.md."""
    data = json.loads((HERE / "results" / "attention.json").read_text(encoding="utf-8"))
    lines = ["# Results", "", f"Made by `make bench`. {data['machine']}.", ""]
    lines += ["Ratios are of medians in one process, competitors in turns.", ""]
    lines += [speedups(data["rows"], HERE / "results" / "speedups.png"), ""]
    lines += [growth(data["growth"], HERE / "results" / "growth.png"), "", "## Tables", ""]
    # A table of a device that this machine has not is there once it was made elsewhere.
    there = {n: told for n, told in TABLES.items() if (HERE / "results" / f"{n}.md").exists()}
    for name, told in there.items():
        lines.append(f"- [{name}](results/{name}.md): {told}. `python benchmarks/{name}.py`")
    (HERE / "RESULTS.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print("written to RESULTS.md")


if __name__ == "__main__":
    main()
