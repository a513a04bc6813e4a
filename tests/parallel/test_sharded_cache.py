"""Decoding over a sharded cache: every step of every composition that decodes is one process's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import attnkit as ak
from attnkit import masks, pse
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.parallel import ContextParallel
from attnkit.parallel.sharding import Sharding
from attnkit.parallel.wires import Alone, Wires
from tests.parallel.processes import Pool
from tests.parallel.threads import run_ranks

DIM, DEPTH = 16, 4
PROMPT, STEPS = 13, (1, 3, 1, 2, 1)
TOTAL = PROMPT + sum(STEPS)

Make = Callable[[], dict[str, Any]]


def table() -> Tensor:
    return torch.randn(1, 4, TOTAL, TOTAL, dtype=torch.float64)


def noise_like(b: Any, h: Any, i: Any, j: Any) -> Any:
    return ((i * 7 + j * 3) % 5 > 0) & (j <= i)


COMPOSITIONS: dict[str, Make] = {
    "causal": lambda: {"mask": masks.Causal()},
    "window": lambda: {"mask": masks.SlidingWindow(5), "rotary": True},
    "sinks and window": lambda: {
        "mask": masks.Causal() & (masks.Columns(0, 2) | masks.SlidingWindow(3)),
        "sink": True,
    },
    "chunks": lambda: {"mask": masks.Causal() & masks.Chunked(4)},
    "documents": lambda: {"mask": masks.Causal() & masks.Documents((6, 10, TOTAL - 16))},
    "prefix": lambda: {"mask": masks.Causal() | masks.Prefix(4)},
    "cells": lambda: {"mask": masks.Causal() & masks.Dilated(2)},
    "function": lambda: {"mask": masks.Causal() & masks.Predicate(noise_like)},
    "heads": lambda: {"mask": masks.PerHead([masks.Causal(), masks.SlidingWindow(2)] * 2)},
    "nobody": lambda: {"mask": masks.Causal() - masks.Rows(14, 17)},
    "alibi": lambda: {"mask": masks.Causal(), "pse": pse.ALiBi(4)},
    "sqrt alibi": lambda: {"mask": masks.Causal(), "pse": pse.SqrtALiBi(4)},
    "t5": lambda: {"mask": masks.Causal(), "pse": pse.T5Relative(4, bidirectional=False)},
    "table": lambda: {"mask": masks.Causal(), "pse": pse.Dense(table())},
    "softcap": lambda: {"mask": masks.Causal(), "softcap": 2.0, "num_kv_heads": 1},
    "gqa": lambda: {"mask": masks.Causal(), "num_kv_heads": 2, "rotary": True},
    "layout": lambda: {"mask": masks.Causal(), "layout": "BNSD"},
    "everything": lambda: {"mask": masks.Full()},
    "definition": lambda: {"mask": masks.Causal(), "backend": "reference"},
}


def layer_of(name: str) -> ak.MultiHeadAttention:
    torch.manual_seed(3)
    layer = ak.MultiHeadAttention(DIM, 4, **COMPOSITIONS[name]()).double().eval()
    with torch.no_grad():
        for one in layer.parameters():
            one.copy_(torch.randn_like(one) * 0.4)
    return layer


def shardings(size: int) -> dict[str, Sharding | str]:
    few = Sharding.of(PROMPT, [[(0, PROMPT)], *([[]] * (size - 1))])
    return {"even": "even", "contiguous": "contiguous", "with one": few}


def decoded(
    wires: Wires, layer: ak.MultiHeadAttention, x: Tensor, balance: str | Sharding, block: int
) -> tuple[list[Tensor], list[int], list[int]]:
    """Return what this rank gets, the prompt's part first; which tokens it holds, and bytes."""
    mask = layer.attention.mask
    mask = mask if mask.extent == (None, None) else None
    prompt = ContextParallel(wires, balance=balance).shards(mask, tokens=PROMPT)
    cache, layer = ak.ShardedCache(prompt, block=block), copy.deepcopy(layer)
    got = [layer(prompt.take(x[:, :PROMPT]), cache=cache)]
    before, at = sum(wires.received), PROMPT
    for count in STEPS:
        got.append(layer(x[:, at : at + count], cache=cache))
        at += count
    held = [p for one in cache.held(wires.rank) for p in one]
    return got, held, [sum(wires.received) - before]


@pytest.mark.parametrize("name", [name for name in COMPOSITIONS if name != "everything"])
@pytest.mark.parametrize("size", [2, 3])
def test_every_step_is_that_of_one_process(name: str, size: int) -> None:
    layer, x = layer_of(name), torch.randn(2, TOTAL, DIM, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x)
    kinds = shardings(size)
    balance, block = list(kinds.values())[len(name) % len(kinds)], 1 + len(name) % 3

    def work(wires: Wires) -> Any:
        with torch.no_grad():
            return decoded(wires, layer, x, balance, block)

    found = run_ranks(size, work)
    starts = [PROMPT + sum(STEPS[:k]) for k in range(len(STEPS))]
    for got, _, _ in found:
        for start, step, same in zip(starts, got[1:], found[0][0][1:], strict=True):
            assert torch.equal(step, same), "all ranks have the same bits"
            assert (step - whole[:, start : start + step.shape[1]]).abs().max() < 1e-12
    parts = Sharding.of(PROMPT, _prompt(found))
    prompt = parts.restore([got[0] for got, _, _ in found])
    assert (prompt - whole[:, :PROMPT]).abs().max() < 1e-12
    assert sorted(p for _, held, _ in found for p in held) == list(range(TOTAL))


def _prompt(found: Any) -> list[list[tuple[int, int]]]:
    return [[(p, p + 1) for p in held if p < PROMPT] for _, held, _ in found]


def steps(layer: ak.MultiHeadAttention, cache: ak.ShardedCache, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [layer(token, cache=cache) for token in x.split(1, dim=1)]


@pytest.mark.parametrize("block", [1, 3, 64])
def test_without_a_prompt_and_with_ranks_that_hold_nothing(block: int) -> None:
    """Each step moves (P - 1) b n s (d_v + 1) numbers to each rank, less what nobody has."""
    layer, x = layer_of("t5"), torch.randn(2, 7, DIM, dtype=torch.float64)

    def work(wires: Wires) -> Any:
        cache, own = ak.ShardedCache(ContextParallel(wires).shards(tokens=0), block=block), []
        for token in x.split(1, dim=1):
            before = sum(wires.received)
            own.append((steps(layer, cache, token)[0], sum(wires.received) - before))
        return own

    with torch.no_grad():
        whole = layer(x)
    message = 2 * 4 * 1 * (DEPTH + 1) * 8
    for rank, own in enumerate(run_ranks(3, work)):
        for k, (step, received) in enumerate(own):
            assert (step - whole[:, k : k + 1]).abs().max() < 1e-12
            others = {p // block % 3 for p in range(k + 1)} - {rank}
            assert received == message * len(others)


def test_a_rejected_draft_and_a_step_that_failed_have_not_happened() -> None:
    layer, x = layer_of("gqa"), torch.randn(1, 12, DIM, dtype=torch.float64)

    def work(wires: Wires) -> Any:
        prompt = ContextParallel(wires).shards(tokens=4)
        cache = ak.ShardedCache(prompt, block=2)
        with torch.no_grad():
            layer(prompt.take(x[:, :4]), cache=cache)
            layer(-x[:, 4:9], cache=cache)
            cache.truncate(6 - 2)
            kept = cache.length
            with pytest.raises(CompositionError, match="was made for 3 heads"):
                layer(x[:, 4:6], cache=cache, pse=pse.ALiBi(3))
            assert cache.length == kept
            return layer(x[:, 4:12], cache=cache)

    with torch.no_grad():
        whole = layer(x)[:, 4:]
    for found in run_ranks(2, work):
        assert (found - whole).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_answers_of_ranks_are_merged_unrounded(dtype: torch.dtype) -> None:
    layer, x = layer_of("causal"), torch.randn(4, TOTAL, DIM, dtype=torch.float64)
    narrow = copy.deepcopy(layer).to(dtype)
    with torch.no_grad():
        whole, alone, own = layer(x), [], ak.KVCache()
        for token in x.to(dtype).split(1, dim=1):
            alone.append(narrow(token, cache=own))

    def work(wires: Wires) -> Any:
        cache = ak.ShardedCache(ContextParallel(wires).shards(tokens=0), block=1)
        return torch.cat(steps(narrow, cache, x.to(dtype)), 1)

    found = run_ranks(4, work)[0]
    error, least = ((one.double() - whole).norm() for one in (found, torch.cat(alone, 1)))
    assert error <= 1.1 * least


def step_in_processes(group: dist.ProcessGroup) -> list[Tensor]:
    layer, x = layer_of("alibi"), torch.ones(1, 9, DIM, dtype=torch.float64).cumsum(1).sin()
    prompt = ContextParallel(group).shards(layer.attention.mask, tokens=5)
    cache = ak.ShardedCache(prompt, block=1)
    with torch.no_grad():
        layer(prompt.take(x[:, :5]), cache=cache)
    return [*steps(layer, cache, x[:, 5:]), layer(x).detach()[:, 5:]]


def one_step_more(group: dist.ProcessGroup) -> str:
    layer, x = layer_of("causal"), torch.ones(1, 6, DIM, dtype=torch.float64)
    alone = dist.new_group([0, 1])  # it will be broken
    if group.rank() > 1:
        return ""
    cache = ak.ShardedCache(ContextParallel(alone, timeout=20.0).shards(tokens=0), block=1)
    steps(layer, cache, x[:, :3])
    cache.truncate(3 - alone.rank())  # one of them takes back a token
    with pytest.raises(CompositionError) as told:
        steps(layer, cache, x[:, :1])
    return str(told.value)


def test_processes_take_the_same_steps_or_are_told(processes: Pool) -> None:
    for *found, whole in processes.run(step_in_processes):
        assert (torch.cat(found, 1) - whole).abs().max() < 1e-12
    for told in processes.run(one_step_more)[:2]:
        assert "rank 0: tokens so far 4" in told
        assert "rank 1: tokens so far 3" in told


@pytest.mark.filterwarnings("ignore:.*")  # what the compiler says of a graph that it leaves
def test_a_compiled_layer_takes_its_steps_between_graphs() -> None:
    torch.manual_seed(0)
    layer = ak.MultiHeadAttention(8, 2, mask=masks.Causal()).double().eval()
    x, here = torch.randn(1, 6, 8).double(), ContextParallel(Alone()).shards(tokens=4)
    torch._dynamo.reset()
    step, cache = torch.compile(layer, backend="eager"), ak.ShardedCache(here)
    with torch.no_grad():
        layer(x[:, :4], cache=cache)
        found = [step(token, cache=cache) for token in x[:, 4:].split(1, 1)]
        assert torch.allclose(torch.cat(found, 1), layer(x)[:, 4:], rtol=0, atol=1e-12)


def test_what_cannot_be_decoded_is_an_error_of_ours() -> None:
    cp, x = ContextParallel(Alone()), torch.zeros(1, 4, DIM, dtype=torch.float64)
    prompt, layer = cp.shards(tokens=4), layer_of("causal")
    heads = [torch.zeros(1, 3, 4, DEPTH)] * 2

    def refused(told: str, act: Callable[[], object]) -> None:
        with pytest.raises(CompositionError, match=told):
            act()

    fresh = ak.ShardedCache(prompt)
    for wrong in (None, cp, 4):
        refused(r"give those of (the prompt|this process)", partial(ak.ShardedCache, wrong))
    packed = cp.shards(seqlens=ak.SeqLens([2, 2]))
    refused("of a packed batch or of two texts", lambda: ak.ShardedCache(packed))
    refused("of two texts", lambda: ak.ShardedCache(cp.shards(tokens=4, keys=6)))
    refused("block=0 is too small", lambda: ak.ShardedCache(prompt, block=0))
    refused(
        "an ak.ShardedCache.* holds those of this",
        lambda: layer(x, shards=prompt, cache=ak.KVCache()),
    )
    with torch.no_grad():
        refused("has 3 tokens, and rank 0 of 1 has 4", lambda: layer(x[:, :3], cache=fresh))
        refused("rank 0 has 4 tokens, and got 3", lambda: fresh.append(*heads))
        refused("its prompt has others", lambda: layer(x, cache=fresh, shards=cp.shards(tokens=5)))
        assert fresh.length == 0
        layer(x, cache=fresh, shards=prompt)
        refused("it has its prompt already", lambda: layer(x, cache=fresh, shards=prompt))
        refused("packed tokens and contexts", lambda: layer(x[0], cache=fresh))
        refused("cannot be truncated to 2 tokens, inside of its prompt", lambda: fresh.truncate(2))
        sees_all, last = layer_of("everything"), ak.ShardedCache(prompt)
        sees_all(x, cache=last)
        refused("the first 4 tokens see keys that came after", lambda: sees_all(x, cache=last))
        refused("batch 1, the new key has 2", lambda: layer(torch.cat([x, x]), cache=fresh))
    refused("records no gradient", lambda: layer(x, cache=fresh))
    drops = ak.MultiHeadAttention(DIM, 4, mask=masks.Causal(), dropout=0.1).double()
    with torch.no_grad():
        again = ak.ShardedCache(cp.shards(tokens=0))
        refused("call eval", lambda: drops(x, cache=again))
    with pytest.raises(CompositionTypeError, match="stays with them"):
        pickle.dumps(fresh)
    fresh.reset()
    assert (fresh.length, fresh.nbytes, fresh.awaits_prompt) == (0, 0, True)
