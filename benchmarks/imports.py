"""What ``import attnkit`` adds to ``import torch``: ``python benchmarks/imports.py``.

Each form is a new process, in turns, that says itself how long one import in it took: by the
clock, and in time of a processor, which other processes on the machine disturb less. Writes
benchmarks/results/imports.md.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "imports.md"
CLOCK = """
import time
{before}
clock, processor = time.perf_counter(), time.process_time()
{timed}
print(time.perf_counter() - clock, time.process_time() - processor)
"""
FORMS = {
    "torch": CLOCK.format(before="", timed="import torch"),
    "attnkit, after torch": CLOCK.format(before="import torch", timed="import attnkit"),
    "its configurations, after attnkit": CLOCK.format(
        before="import attnkit", timed="attnkit.config"
    ),
}


def seconds(program: str) -> list[float]:
    """Return what a program in a new process prints: by the clock, and of a processor."""
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [float(taken) for taken in told.stdout.split()]


def main(rounds: int) -> None:
    """Time every form, print the table and write it."""
    for program in FORMS.values():
        seconds(program)  # files come from the disk once
    seen: dict[str, list[list[float]]] = {name: [] for name in FORMS}
    for _ in range(rounds):
        for name, program in FORMS.items():
            seen[name].append(seconds(program))
    lines = [
        "# What an import costs",
        "",
        f"Made by `python benchmarks/imports.py {rounds}`. Seconds, medians of {rounds} processes "
        f"each, in turns; Python {'keeps no' if sys.dont_write_bytecode else 'keeps'} bytecode.",
        "",
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "",
        "| import | by the clock | of a processor |",
        "|---|---:|---:|",
    ]
    for name, taken in seen.items():
        clock, processor = (statistics.median(each) for each in zip(*taken, strict=True))
        lines.append(f"| {name} | {clock:.2f} | {processor:.2f} |")
        print(lines[-1], flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(f"written to {RESULTS.name}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 11)
