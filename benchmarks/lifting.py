"""How long masks of others take to be read as sets: ``python benchmarks/lifting.py``.

CPU time on one thread, medians of seven. With the path of another tree the same is measured with
that tree's attnkit, in turns in one process. Writes benchmarks/results/lifting.md.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "lifting.md"
ROUNDS = 7


def load(root: Path) -> ModuleType:
    """Import the attnkit of a tree, beside others that are imported already."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if ours(name)}
    sys.path.insert(0, str(root))
    try:
        return importlib.import_module("attnkit.masks")
    finally:
        sys.path.remove(str(root))
        for name in [name for name in sys.modules if ours(name)]:
            del sys.modules[name]
        sys.modules.update(kept)


def ours(name: str) -> bool:
    """Whether a module is attnkit's."""
    return name == "attnkit" or name.startswith("attnkit.")


Case = tuple[str, Callable[[Any], object]]


def cases(n: int) -> Iterator[Case]:
    """Yield what is measured: a name, and a function of the module `masks`."""
    causal = torch.ones(n, n, dtype=torch.bool).tril_()
    yield "recover(bool), causal", lambda masks: masks.recover(causal)
    window = causal.clone().triu_(-255)
    yield "recover(bool), window", lambda masks: masks.recover(window)
    ids = torch.arange(n) * 64 // n
    packed = (ids[:, None] == ids) & causal
    yield "recover(bool), 64 documents", lambda masks: masks.recover(packed)
    odd = torch.zeros(n, n + 1, dtype=torch.bool)[:, :-1].copy_(causal)
    yield "recover(bool), causal, a row is no whole words", lambda masks: masks.recover(odd)
    yield "Dense.keep(bool).region, causal", lambda masks: masks.Dense.keep(causal).region(n, n)
    yield (
        "recover(mask_mod), window",
        lambda masks: masks.recover(lambda b, h, i, j: (i >= j) & (i - j < 256), n, n),
    )
    yield (
        "recover(mask_mod), 64 documents",
        lambda masks: masks.recover(lambda b, h, i, j: (i >= j) & (ids[i] == ids[j]), n, n),
    )


def forms(n: int) -> Iterator[Case]:
    """Yield what reads masks of others."""
    cuts = torch.randperm(n - 1, generator=torch.Generator().manual_seed(0))[:63] + 1
    ids = torch.bucketize(torch.arange(n), cuts.sort().values, right=True)
    functions: dict[str, Any] = {
        "causal": lambda b, h, i, j: i >= j,
        "window": lambda b, h, i, j: (i >= j) & (i - j < 256),
        "64 documents": lambda b, h, i, j: (i >= j) & (ids[i] == ids[j]),
        "window, not understood": lambda b, h, i, j: (i >= j) & (i - j + 0 * (i * j) < 256),
    }
    for name, fn in functions.items():
        blocks = create_block_mask(fn, None, None, n, n, device="cpu")
        yield f"from_flex(BlockMask), {name}", lambda masks, given=blocks: masks.from_flex(given)
    ends = torch.searchsorted(ids, ids, right=True)[None, None, :, None]
    yield (
        "from_flashmask, 64 documents",
        lambda masks: masks.from_flashmask(ends, causal=True),
    )
    lengths = torch.cat((torch.zeros(1, dtype=torch.int64), ids.bincount().cumsum(0)))
    ranges = torch.stack((lengths[:-1], lengths[1:]), 1)
    yield "from_magi, 64 slices", lambda masks: masks.from_magi(ranges, ranges, [1] * 64)
    yield "from_cu_seqlens, 64", lambda masks: masks.from_cu_seqlens(lengths, causal=True)
    exists = torch.arange(n) < torch.arange(32)[:, None] * (n // 32) + 1
    yield (
        "from_torch [32, 1, 1, n], padding",
        lambda masks: masks.from_torch(exists[:, None, None], keep=True),
    )


def measure(run: Callable[[], object]) -> float:
    """Return the CPU time of one call in milliseconds."""
    start = time.thread_time()
    run()
    return 1e3 * (time.thread_time() - start)


def main() -> None:
    """Write a table."""
    parser = argparse.ArgumentParser(description="masks of others as sets")
    parser.add_argument("other", nargs="?", type=Path)
    parser.add_argument("--length", type=int, default=16384)
    given = parser.parse_args()
    torch.set_num_threads(1)
    trees = [load(ROOT)]
    trees += [load(given.other)] if given.other else []
    told = ["ms"] + ["ms, the other tree"] * (len(trees) - 1)
    lines = [f"# Masks of others as sets, {given.length} x {given.length}", ""]
    lines += [__doc__.partition("\n\n")[2].partition(" Writes")[0].replace("\n", " "), ""]
    lines += [f"| what is read | {' | '.join(told)} |", "|---|" + "---|" * len(told)]
    for name, case in (*cases(given.length), *forms(given.length)):
        times: list[list[float]] = [[] for _ in trees]
        for _ in range(ROUNDS):
            for tree, own in zip(trees, times, strict=True):
                try:
                    own.append(measure(partial(case, tree)))
                except AttributeError:  # what the other tree does not have yet
                    own.append(float("nan"))
        medians = [f"{statistics.median(own):.2f}".replace("nan", "-") for own in times]
        lines.append(f"| {name} | {' | '.join(medians)} |")
        print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
