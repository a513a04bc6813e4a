"""A parallel plan as the data of its page: `attnkit.explorer` shows it in a browser.

Who computes a cell follows from the row's owner, the head, and the key's owner, as in `stages`:
so the page has what each rank owns, and no cells of ranks by stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from attnkit.explorer import plain
from attnkit.parallel.choose import label
from attnkit.parallel.plan import ParallelPlan
from attnkit.parallel.price import ParallelPrice
from attnkit.planner.explain import request_lines
from attnkit.planner.placed import Places
from attnkit.planner.price import dearer
from attnkit.planner.sheet import Sheet, command_of, refusals, time_told, unsaid
from attnkit.ranges import total

__all__ = ["as_page"]

_MOST_RANKS = 32  # in a row of the table of transfers; of more, neighbours are added up
_MOST_STAGES = 2_048  # of all ranks together
_MOST_WANTED = 50_000  # ranges of keys that ranks receive


def as_page(plan: ParallelPlan, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Return what the page of a plan shows; `command` makes such a page, but for the mask."""
    request = plan.request
    views = [_view(label(plan), plan.price, plan.price)]
    views += [_view(other.label, other.price, plan.price) for other in plan.alternatives]
    views[0]["title"] = f"{plan.size} ranks: {label(plan)}, balance {plan.balance}"
    data = Sheet(request, Places(request, None)).data(views, [[] for _ in views])
    given = list(_command(plan)) if command is None else list(command)
    return data | {
        "kind": "ranks",
        "note": "",
        "facts": list(request_lines(request)),
        "refusals": refusals(plan.refusals),
        "report": str(plan.explain()),
        "command": given,
        "unsaid": unsaid(request) if command is None else [],
        "ranks": _ranks(plan),
    }


def _view(name: str, price: ParallelPrice | None, best: ParallelPrice | None) -> dict[str, Any]:
    told, items = "", []
    if price is not None:
        told = time_told(price.total)
        items = [
            ["estimated time", told],
            ["computing", time_told(price.compute)],
            ["exchange", time_told(price.exchange)],
            ["of rank", f"{price.rank}, the slowest looked at"],
        ]
        if best is not None and best is not price:
            told += f" ({dearer(price.total, best.total)})"
    return {"label": name, "title": name, "price": told, "items": items, "calls": []}


def _ranks(plan: ParallelPlan) -> dict[str, Any]:
    """Return who owns what, and what goes from whom to whom."""
    wanted = plan.exchange.wanted
    names, (forward, backward) = _table(plan)
    return {
        "size": plan.size,
        "ways": plan.heads_ways,
        "rows": [plain(own) for own in plan.queries.ranks],
        "keys": [plain(own) for own in plan.keys.ranks],
        "heads": [[h.start, h.stop] for h in map(plan.heads, range(plan.heads_ways))],
        "distances": [plain([one]) for one in plan.exchange.distances],
        "wanted": [plain(own) for own in wanted] if sum(map(len, wanted)) <= _MOST_WANTED else None,
        "stages": _stages(plan),
        "names": names,
        "forward": forward,
        "backward": backward,
    }


def _stages(plan: ParallelPlan) -> list[Any]:
    """Return the stages of ranks: number, keys, and what is received and sent, by rank."""
    each = len(plan.exchange.numbers) * (1 if plan.exchange.method == "ring" else 4)
    ranks = range(min(plan.size, max(1, _MOST_STAGES // each)))
    return [
        [
            [
                stage.number,
                total(stage.keys),
                *(
                    [[m.rank, total(m.keys)] for m in some]
                    for some in (stage.receives, stage.sends)
                ),
            ]
            for stage in plan.table(rank)
        ]
        for rank in ranks
    ]


def _table(plan: ParallelPlan) -> tuple[list[str], list[list[list[int]]]]:
    """Return the bytes from each rank to each, of many ranks from each few to each few."""
    each = -(-plan.size // _MOST_RANKS)
    firsts = range(0, plan.size, each)
    names = [f"{k} to {min(k + each, plan.size) - 1}" if each > 1 else str(k) for k in firsts]

    def folded(moved: Tensor) -> list[list[int]]:
        rows = [moved[k : k + each].sum(0) for k in firsts]
        return [[int(row[k : k + each].sum()) for k in firsts] for row in rows]

    return names, [folded(moved) for moved in plan.transfers]


def _command(plan: ParallelPlan) -> Iterator[str]:
    yield from command_of(plan.request, plan.backend)
    said = {"--ranks": plan.size, "--method": plan.method}
    if plan.method == "hybrid":
        said["--heads-ways"] = plan.heads_ways
    if plan.exchange.method == "needed" and plan.exchange.distances and plan.method != "hybrid":
        said["--stages"] = len(plan.exchange.distances)
    if plan.balance != "given":
        said["--balance"] = plan.balance
    for name, value in said.items():
        yield from (name, str(value))
