"""What ``import attnkit`` adds to ``import torch``: ``python benchmarks/imports.py``.

Each form is a new process, in turns; a process says itself how long its own import took, and
what of it attnkit took after torch. Medians and the least. Writes benchmarks/results/imports.md.
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
CLOCK = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
FORMS = {
    "torch": CLOCK.format("import torch"),
    "attnkit, after torch": "import torch; " + CLOCK.format("import attnkit"),
    "its configurations, after attnkit": "import attnkit; " + CLOCK.format("attnkit.config"),
}


def seconds(program: str) -> float:
    """Return what a program in a new process prints."""
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return float(told.stdout)


def main(rounds: int) -> None:
    """Time every form, print the table and write it."""
    for program in FORMS.values():
        seconds(program)  # files come from the disk once
    seen: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(rounds):
        for name, program in FORMS.items():
            seen[name].append(seconds(program))
    lines = [
        "# What an import costs",
        "",
        f"Made by `python benchmarks/imports.py {rounds}`. Seconds, of {rounds} processes each, "
        "in turns.",
        "",
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "",
        "| import | median | least |",
        "|---|---:|---:|",
    ]
    for name, taken in seen.items():
        lines.append(f"| {name} | {statistics.median(taken):.2f} | {min(taken):.2f} |")
        print(lines[-1], flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(f"written to {RESULTS.name}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 11)
