"""`plan`: from whole tensors, or a request of all of their tokens, to a plan for ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from attnkit.arguments import check_choice, check_int
from attnkit.layouts import SeqLens
from attnkit.masks import Full, Mask
from attnkit.parallel.balance import LAYER_CELLS, balanced, candidates
from attnkit.parallel.choices import DROPOUTS, Choices
from attnkit.parallel.choose import cheapest, choose, label
from attnkit.parallel.plan import ParallelPlan
from attnkit.parallel.price import BACKWARD, price_of
from attnkit.parallel.sharding import Sharding
from attnkit.planner import Composition, Request, read_request
from attnkit.planner.price import chip
from attnkit.planner.scoring import ScoreFunction
from attnkit.pse import Pse

__all__ = ["plan", "spread"]


def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    ranks: int,
    mask: Mask | None = None,
    pse: Pse | None = None,
    layout: str = "BSND",
    seqlens: SeqLens | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    sink: Tensor | None = None,
    softcap: float | None = None,
    score_fn: ScoreFunction | None = None,
    deterministic: bool = False,
    memory_limit: int | None = None,
    backend: str = "auto",
    method: str = "auto",
    balance: str | Sharding = "auto",
    heads_ways: int | Literal["auto"] = "auto",
    stages: int | Literal["auto"] = "auto",
    keep: bool | Literal["auto"] = "auto",
    drops: str = "global",
) -> ParallelPlan:
    """Return how attention over whole tensors would run on some ranks; meta tensors will do.

    No process group is needed, and nothing is launched. The first arguments are those of
    `attnkit.attention`. What is "auto" is what costs the slowest rank the least, by estimate, and
    the prices of the others are kept.

    - `method`: "needed": a rank receives the keys that its rows see; "ring": all keys, a rank's at
      a time; "gather": all keys at once; "ulysses": tokens are exchanged for heads; "hybrid":
      tokens for heads among `heads_ways` neighbours, and the keys that rows see between these.
    - `balance`: who has which tokens. "even" in tokens and cells, "contiguous", "zigzag", "line",
      or a `Sharding` of the queries.
    - `stages`: in how many parts needed keys arrive, each while the one before is computed.
    - `keep`: whether received keys stay for the backward pass, or are fetched again. "auto": where
      no rank receives more keys than ranks have on average.
    - `drops`: which cells dropout drops: "global", those that one process drops, or "local".

    Raises `CompositionError` for what does not fit together, `BackendRefused` for a composition
    that no backend runs in shares.

    >>> import torch
    >>> from attnkit import masks, parallel
    >>> x = torch.empty(1, 4096, 8, 64, device="meta")
    >>> found = parallel.plan(x, x, x, ranks=8, mask=masks.SlidingWindow(64), method="needed")
    >>> found.received(3)
    Received(keys=63, forward=258048, backward=516096)
    >>> found.verify()
    """
    check_choice("drops", drops, DROPOUTS)  # `dropout` is how many, here
    request = read_request(
        Composition(
            Full() if mask is None else mask,
            pse,
            layout,
            scale,
            dropout,
            softcap,
            score_fn,
            deterministic,
            memory_limit,
        ),
        query,
        key,
        value,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        seqlens=seqlens,
        sink=sink,
        training=True,
    )
    choices = Choices(method, heads_ways, stages, keep, drops)
    return spread(request, pse, ranks, balance, choices, backend)


def spread(
    request: Request,
    bias: Pse | None,
    ranks: int,
    balance: str | Sharding,
    choices: Choices,
    backend: str,
) -> ParallelPlan:
    """Return how a request of all tokens runs on some ranks; see `plan`."""
    check_int("ranks", ranks, 1)
    found = []
    for name, (queries, keys) in _shardings(request, ranks, balance).items():
        bare = ParallelPlan.bare(request, bias, queries, keys, backend, choices.dropout)
        found.append(choose(replace(bare, balance=name), choices))
    priced = [one if one.price else replace(one, price=price_of(one)) for one in found]
    best = cheapest(priced, _time_of_layer, lambda one: f"{one.balance}: {label(one)}")
    best.check_backend()
    return best


def _shardings(
    request: Request, ranks: int, balance: str | Sharding
) -> dict[str, tuple[Sharding, Sharding]]:
    """Return who may have which queries and keys, by the name of each way."""
    seqlens = request.seqlens
    tokens = None if seqlens is not None else request.q_len
    crosses = seqlens is None and request.q_len != request.kv_len
    texts = ([request.mask], tokens, request.kv_len if crosses else None, seqlens, ranks)
    if balance == "auto":
        return candidates(*texts)
    name = "given" if isinstance(balance, Sharding) else balance
    return {name: balanced(*texts, balance)}


def _time_of_layer(plan: ParallelPlan) -> float:
    """Return what a layer takes by estimate.

    The rest of a layer counts, too, which costs as much per token as so many cells: else it were
    best to have few cells on a rank with many tokens.
    """
    request, price = plan.request, plan.price
    if price is None:
        return 0.0
    flops = 2 * (request.head_dim + request.value_dim) / chip().flops_per_ns
    flops *= 1 + BACKWARD * request.needs_grad
    a_token = LAYER_CELLS * request.num_heads * plan.copies
    busiest = max(
        cells + a_token * tokens
        for cells, tokens in zip(plan.cells, plan.queries.sizes, strict=True)
    )
    return flops * busiest + max(0.0, price.total - price.compute)
