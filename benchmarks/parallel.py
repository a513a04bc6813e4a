"""Who has which tokens of a long text, and what then travels: ``python benchmarks/parallel.py``.

Counted, not run: on 8, 64 and 512 ranks, for texts of 128k and 1M tokens. How even the cells of
each sharding are, how many keys ranks receive where only those travel that their rows see, and
what it takes to plan. Writes benchmarks/results/parallel.md and its pictures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from _long_masks import Travel, heap, masks_of
from attention import machine, written

from attnkit.masks import Mask
from attnkit.parallel import Load, ParallelPlan, Sharding, even, load_of, plan
from attnkit.parallel.price import price_of
from attnkit.ranges import total

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap

RESULTS = Path(__file__).parent / "results" / "parallel.md"
TEXTS = {"1M": 1 << 20, "128k": 1 << 17}
RANKS = (8, 64, 512)
SOME = (
    "causal",
    "window of 4,096",
    "1,000 documents, causal",
    "prefix-LM, a quarter",
    "block diffusion, blocks of 4,096",
    "window and 256 global rows",
)
METHODS = ("needed", "ring", "gather", "ulysses", "hybrid")


@dataclass(frozen=True)
class Row:
    """A mask on some ranks: each sharding's cells over the mean, and the keys that are received."""

    name: str
    ranks: int
    tokens: int
    over: dict[str, float]
    even: Travel
    heap: Travel
    ring: int

    @classmethod
    def of(cls, name: str, mask: Mask, load: Load, ranks: int) -> Row:
        """Count them."""
        region = mask.region(load.length, load.length)
        dealt = {
            "contiguous": Sharding.contiguous(load.length, ranks),
            "zigzag": Sharding.zigzag(load.length, ranks),
            "heap": heap(load, ranks),
            "even": even(load, ranks),
        }
        sizes = dealt["even"].sizes
        return cls(
            name,
            ranks,
            max(sizes) - min(sizes),
            {how: load.imbalance(sharding) for how, sharding in dealt.items()},
            Travel.of(region, dealt["even"]),
            Travel.of(region, dealt["heap"]),
            load.length - min(sizes),
        )

    @property
    def line(self) -> str:
        """The row of the table."""
        even, heap, over = self.even, self.heap, self.over
        ratio = even.mean / heap.mean if heap.mean else 1.0
        cells = " | ".join(f"{100 * over[how]:,.2f} %" for how in over)
        return (
            f"| {self.name} | {self.ranks} | {self.tokens} | {cells} | {even.mean:,.0f} "
            f"| {even.worst:,} | {heap.mean:,.0f} | {heap.worst:,} | {ratio:.2f} "
            f"| {100 * even.mean / self.ring:.2f} % |"
        )


def counted(tokens: int) -> list[Row]:
    """Return the rows of a text's length."""
    loads = {name: (mask, load_of([mask], tokens)) for name, mask in masks_of(tokens).items()}
    return [
        Row.of(name, mask, load, ranks) for name, (mask, load) in loads.items() for ranks in RANKS
    ]


def milliseconds(run: Callable[[], object], rounds: int = 3) -> float:
    """Return the median of a few rounds, in processor time."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


def planned(name: str, tokens: int, ranks: int) -> str:
    """Return what it takes to plan for a mask that nobody has seen, step by step."""
    x = torch.empty(1, tokens, 64, 128, dtype=torch.bfloat16, device="meta")
    few = x[:, :, :8]

    def fresh() -> Mask:
        return masks_of(tokens)[name]

    def make() -> ParallelPlan:
        return plan(
            x, few, few, ranks=ranks, mask=fresh(), method="needed", balance=sharding, stages=1,
            keep=True, backend="tiled",
        )  # fmt: skip

    def once(step: Callable[[ParallelPlan], object]) -> float:
        # What a plan was asked is kept on it, so that each step has its own.
        one = make()
        return milliseconds(lambda: step(one), 1)

    region, own = fresh().region(tokens, tokens), ranks // 2
    load = load_of([fresh()], tokens)
    sharding, new = even(load, ranks), iter([fresh() for _ in range(3)])
    rows = sharding.ranks[own]
    several = [
        milliseconds(lambda: load_of([next(new)], tokens)),
        milliseconds(lambda: even(load, ranks)),
        milliseconds(make),
        milliseconds(lambda: region.take(rows, region.seen(rows))),
        once(lambda one: one.stages(own)),
        once(lambda one: one.transfers),
        once(lambda one: one.verify()),
    ]
    cells = " | ".join(f"{each:,.1f}" if each < 10 else f"{each:,.0f}" for each in several)
    return f"| {name} | {ranks} | {cells} |"


def methods(name: str, tokens: int, ranks: int) -> Iterator[str]:
    """Yield what each method would cost a training step of a layer, one row each."""
    shape = (1, tokens, 64, 128)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
    few = x[:, :, :8]
    mask = masks_of(tokens)[name]
    for method in METHODS:
        found = plan(
            x, few, few, ranks=ranks, mask=mask, method=method, balance="even", backend="tiled"
        )
        ways = f", {found.heads_ways} x {ranks // found.heads_ways}" * (method == "hybrid")
        each = [table.sum(0).double() / 1e9 for table in found.transfers]
        moved = " | ".join(f"{one.mean():,.3f} | {one.max():,.3f}" for one in each)
        price, turned = price_of(found), 0
        if found.heads_ways > 1:  # the tokens of its neighbours, for its heads of keys
            turned = total(found.rows(0)) * len(found.kv_heads(0)) * 2 * 128 * x.itemsize
        times = (price.compute, price.exchange, price.total)
        took = " | ".join(f"{nanoseconds / 1e6:,.0f}" for nanoseconds in times)
        yield f"| {name} | {method}{ways} | {moved} | {(price.held + turned) / 1e9:,.3f} | {took} |"


def bars(rows: list[Row], target: Path) -> str:
    """Draw cells over the mean and keys received, mask by mask, on the most ranks."""
    rows = [row for row in rows if row.ranks == max(RANKS)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.5 * len(rows) + 1.2), sharey=True)
    for k, how in enumerate(rows[0].over):
        shares = [max(100 * row.over[how], 1e-2) for row in rows]
        left.barh([p + 0.2 * k for p in range(len(rows))], shares, height=0.2, label=how)
    left.set_xlabel("cells of the rank with the most, % over the mean (0.01: none)")
    for k, (how, counts) in enumerate(
        {"heap": [r.heap.mean for r in rows], "even": [r.even.mean for r in rows]}.items(), 2
    ):
        shares = [100 * n / row.ring for n, row in zip(counts, rows, strict=True)]
        places = [p + 0.2 * k for p in range(len(rows))]
        right.barh(places, shares, height=0.2, label=how, color=f"C{k}")
    right.set_xlabel("keys that a rank receives in the mean, % of a ring's")
    left.set_yticks([p + 0.3 for p in range(len(rows))], [row.name for row in rows])
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_ylim(len(rows) - 0.1, -1.4)  # from the top, with room for the legend
        axes.legend(ncols=4, loc="upper center")
    figure.suptitle(f"1,048,576 tokens on {max(RANKS)} ranks")
    figure.tight_layout()
    figure.savefig(target, dpi=100)
    plt.close(figure)
    return f"![cells over the mean and keys received]({target.name})"


def tokens_of(tokens: int, target: Path, ranks: int = 8) -> str:
    """Draw which rank has which tokens, by `even`."""
    known = masks_of(tokens)
    figure, every = plt.subplots(len(known), 1, figsize=(12, 0.45 * len(known) + 0.6))
    colors = ListedColormap(plt.get_cmap("tab10").colors[:ranks])
    for axes, (name, mask) in zip(every, known.items(), strict=True):
        sharding = even(load_of([mask], tokens), ranks)
        owners = torch.empty(tokens, dtype=torch.int8)
        for rank in range(ranks):
            owners[sharding.positions(rank)] = rank
        picture = owners[:: tokens // 2048][None]
        axes.imshow(picture, aspect="auto", cmap=colors, interpolation="none")
        axes.set_yticks([0], [name])
        axes.set_xticks([])
    figure.suptitle(f"who has which of {tokens:,} tokens, {ranks} ranks in {ranks} colors")
    figure.tight_layout(h_pad=0.1)
    figure.savefig(target, dpi=100)
    plt.close(figure)
    return f"![which rank has which tokens]({target.name})"


HEAD = (
    "| mask | ranks | tokens | contiguous | zigzag | heap | **even** | keys | worst "
    "| heap's keys | worst | even / heap | of a ring |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
)
ABOUT = """\
- *tokens*: by how many tokens ranks differ under `even`.
- *contiguous*, *zigzag*, *heap*, *even*: the cells of the rank with the most, over the mean. *heap*
  is the rule of MagiAttention: 8 chunks for each rank, the heaviest first, to the lightest rank.
- *keys*: how many keys a rank receives in the mean under `even`, and the one with the most; then
  the same under the heap. A ring moves all keys but the rank's own. With 8 heads of 128 in two
  bytes, a key and its value are 4,096 bytes.
- Where few rows see everything, no sharding is even in cells below half a row: on 512 ranks one of
  the 256 global rows is 12 % of a rank's cells. The heap leaves such rows together, in chunks: few
  ranks receive all keys then, and have up to 30 times the cells of the others.
- Lengths of documents are log-normal."""
COSTS = (
    "| mask | method | forward, mean | worst | backward, mean | worst | held | computes "
    "| exchanges | takes |",
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
)
STEPS = (
    "| mask | ranks | load | sharding | plan | a rank's cells | its stages | all transfers "
    "| proof |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
)


def page() -> Iterator[str]:
    """Yield the lines of the page."""
    yield from ("# Tokens of long texts, spread over ranks", "")
    yield from ("Made by `python benchmarks/parallel.py`. Counted on one machine; nothing ran.", "")
    counts = {name: counted(tokens) for name, tokens in TEXTS.items()}
    folder = RESULTS.parent
    yield from (bars(counts["1M"], folder / "parallel.png"), "")
    yield from (tokens_of(TEXTS["128k"], folder / "parallel_tokens.png"), "", ABOUT, "")
    for name, tokens in TEXTS.items():
        yield from (f"## {tokens:,} tokens ({name})", "", *HEAD)
        yield from (row.line for row in counts[name])
        yield ""
    yield from costs()
    yield from times()


def costs() -> Iterator[str]:
    """Yield what the methods cost."""
    yield from (f"## What each method costs, {TEXTS['1M']:,} tokens on {RANKS[1]} ranks", "")
    yield (
        "A training step of one layer, 64 heads and 8 of keys, of 128 channels, bfloat16; all "
        "under `even`. GB that a rank receives; GB of keys and values that it holds at a time "
        "beside those of its own tokens; and the milliseconds of the slowest rank, by estimate: of "
        "a chip and of links that nobody has measured (`planner/chips.json`, "
        "`parallel/links.json`)."
    )
    yield from ("", *COSTS)
    for name in SOME:
        yield from methods(name, TEXTS["1M"], RANKS[1])
    yield ""


def times() -> Iterator[str]:
    """Yield what planning takes."""
    yield from ("## What planning takes at 1,048,576 tokens", "")
    yield f"{machine(1)}. Milliseconds of processor time, of masks that are new."
    yield from ("", *STEPS)
    for name in masks_of(TEXTS["1M"]):
        yield from (planned(name, TEXTS["1M"], ranks) for ranks in RANKS[1:])
    yield from (
        "",
        "*load*: the region and the cells of each row. *plan*: reading the request, for one stage "
        "and keys that are kept. *a rank's cells*: its rows and the keys that they see, as a "
        "region. *its stages*: which keys it gets from whom and sends to whom. *all transfers*: "
        "the bytes of every pair. *proof*: that the stages of all ranks are the mask, cell for "
        "cell, and that every message has two ends. On 512 ranks of which each sends to each these "
        "two go through a quarter of a million messages, once for all ranks; a rank that runs "
        "needs its own stages only.",
        "",
    )


def main() -> None:
    """Write the page."""
    torch.set_num_threads(1)
    written(RESULTS, list(page()))


if __name__ == "__main__":
    main()
