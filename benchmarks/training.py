"""Steps of the example's training run on the reference and on tiled: ``benchmarks/training.py``.

One process, the same weights and the same batches for both, steps in turns, the thread that the
example's config asks for. Writes benchmarks/results/training.md.
"""

from __future__ import annotations

import io
import platform
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import train_lm
from attnkit.progress import progress

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "training.md"
CONFIG = ROOT / "examples" / "configs" / "alibi.yaml"
BACKENDS = ("reference", "tiled")


def prepare(folder: str, backend: str) -> train_lm.Run:
    """Set the example up with one backend asked for by name."""
    text = CONFIG.read_text(encoding="utf-8")
    config = Path(folder) / f"{backend}.yaml"
    config.write_text(text.replace("  layout: TND", f"  layout: TND\n  backend: {backend}"))
    arguments = ["--config", str(config), "--out", str(Path(folder) / backend), "--device", "cpu"]
    return train_lm.prepare(train_lm.parse_arguments(arguments))


def main(steps: int) -> None:
    """Time steps in turns, print the table and write it."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        runs = {name: prepare(folder, name) for name in BACKENDS}
    times: dict[str, list[float]] = {name: [] for name in BACKENDS}
    losses: dict[str, list[float]] = {name: [] for name in BACKENDS}
    tokens = 0
    with progress("training", steps) as bar:
        for batches in islice(zip(*(run.batches() for run in runs.values()), strict=True), steps):
            for (name, run), batch in zip(runs.items(), batches, strict=True):
                start = time.perf_counter()
                losses[name].append(train_lm.take_step(run, batch))
                times[name].append(time.perf_counter() - start)
            tokens += sum(batches[0].lengths)
            bar.step()
    taken = {name: statistics.median(each[2:]) for name, each in times.items()}
    for first, second in zip(*losses.values(), strict=True):
        if abs(first - second) > 1e-3 * first:
            raise SystemExit(f"the backends train apart: losses {first} and {second}")
    lines = [
        "# The example's training run",
        "",
        f"Made by `python benchmarks/training.py {steps}`: {CONFIG.name}, medians of {steps} steps "
        f"in turns, about {tokens // steps:,} tokens each; {torch.get_num_threads()} thread, "
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}. Losses agree.",
        "",
        "| backend | steps per second | ratio |",
        "|---|---:|---:|",
    ]
    for name, seconds in taken.items():
        lines.append(f"| {name} | {1 / seconds:.2f} | {taken['reference'] / seconds:.2f} |")
        print(lines[-1], flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(f"written to {RESULTS.name}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
