"""``python -m tests.bad_use``: run every wrong use, and say which does not get its due."""

from __future__ import annotations

import argparse
import time
import tracemalloc
import warnings

import torch

from tests.bad_use.table import CASES, verdict


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bad_use", description=__doc__)
    parser.add_argument("--times", action="store_true", help="print the slowest, in seconds")
    parser.add_argument("--memory", action="store_true", help="print the largest, in megabytes")
    parser.add_argument("--only", default="", help="the cases whose name holds this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wrong, figures = 0, []
    for case in CASES:
        if arguments.only not in case.name:
            continue
        if arguments.memory:
            tracemalloc.start()
        start = time.perf_counter()
        told = verdict(case)
        seconds = time.perf_counter() - start
        if arguments.memory:
            figures.append((tracemalloc.get_traced_memory()[1] / 1e6, case.name))
            tracemalloc.stop()
        else:
            figures.append((seconds, case.name))
        if told:
            wrong += 1
            print(f"{case.name!r}\t{told}", flush=True)
    print(f"{len(figures)} wrong uses, {wrong} without their due")
    if arguments.times or arguments.memory:
        for figure, name in sorted(figures, reverse=True)[:20]:
            print(f"{figure:10.3f}  {name!r}")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
