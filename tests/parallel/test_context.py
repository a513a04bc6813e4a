"""What `ContextParallel` and shards are given by mistake, and what they say then."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import attnkit as ak
from attnkit import masks
from attnkit.errors import CompositionError, ExchangeError
from attnkit.parallel import ContextParallel, Sharding, Shards
from attnkit.parallel.wires import Alone
from attnkit.rotary import Dynamic, Rotary
from tests.parallel.processes import Pool

CP = ContextParallel(Alone())
X = torch.randn(1, 6, 16)
LAYER = ak.MultiHeadAttention(16, 4, mask=masks.Causal())
PACKED = ak.SeqLens([2, 4])
DYNAMIC = Rotary(scaling=Dynamic(2.0, original_max_position_embeddings=4))


def here(**given: Any) -> Shards:
    return CP.shards(**(given or {"tokens": 6}))


WRONG: dict[str, tuple[Callable[[], object], list[str]]] = {
    "a number of ranks": (lambda: ContextParallel(8), ["group=8", "parallel.plan", "ranks="]),
    "a name": (lambda: ContextParallel("cp"), ["group='cp'", "mesh['cp']"]),
    "no group": (lambda: ContextParallel(None), ["group=None", "DeviceMesh"]),
    "method": (lambda: ContextParallel(Alone(), method="rings"), ["'rings'", "needed", "ulysses"]),
    "stages": (lambda: ContextParallel(Alone(), stages=0), ["stages=0"]),
    "keep": (lambda: ContextParallel(Alone(), keep=1), ["keep=1", "auto"]),
    "dropout": (lambda: ContextParallel(Alone(), dropout=0.1), ["0.1", "global", "local"]),
    "timeout": (lambda: ContextParallel(Alone(), timeout=0), ["timeout=0", "above 0"]),
    "balance": (
        lambda: ContextParallel(Alone(), balance="zag").shards(tokens=4),
        ["'zag'", "zigzag"],
    ),
    "sharding of others": (
        lambda: ContextParallel(Alone(), balance=Sharding.zigzag(8, 2)).shards(tokens=8),
        ["2 ranks", "1"],
    ),
    "no lengths": (lambda: CP.shards(masks.Causal()), ["tokens=None", "seqlens="]),
    "both lengths": (lambda: CP.shards(tokens=6, seqlens=PACKED), ["one of them"]),
    "negative": (lambda: CP.shards(tokens=-1), ["tokens=-1"]),
    "a list of lengths": (lambda: CP.shards(seqlens=[2, 4]), ["SeqLens(lengths)"]),
    "keys of packed": (lambda: CP.shards(seqlens=PACKED, keys=4), ["keys=4", "leave it out"]),
    "no mask": (lambda: CP.shards(torch.ones(6, 6), tokens=6), ["masks.Dense"]),
    "not shards": (lambda: LAYER(X, shards=CP), ["ContextParallel", ".shards("]),
    "a sharding": (
        lambda: ak.attention(X, X, X, layout="BSH", num_heads=4, shards=here().sharding),
        ["shards=Sharding", ".shards("],
    ),
    "a length too few": (
        lambda: LAYER(X[:, :5], shards=here()),
        ["x [1, 5, 16] has 5 tokens", "rank 0 of 1 has 6 of 6", "here.take(tokens)"],
    ),
    "keys too few": (
        lambda: ak.attention(X, X[:, :5], X, layout="BSH", num_heads=4, shards=here()),
        ["key [1, 5, 16] has 5 tokens", "rank 0 of 1 has 6 of 6"],
    ),
    "other lengths": (
        lambda: LAYER(X[0], seqlens=ak.SeqLens([3, 3]), shards=here(seqlens=PACKED)),
        ["SeqLens(q=(3, 3))", "SeqLens(q=(2, 4))", "leave seqlens= out"],
    ),
    "packed tokens without lengths": (lambda: LAYER(X[0], shards=here()), ["is packed"]),
    "lengths of dense tokens": (lambda: LAYER(X, shards=here(seqlens=PACKED)), ["batch axis"]),
    "a cache": (lambda: LAYER(X, shards=here(), cache=ak.KVCache()), ["cache=", "shards"]),
    "a mask of another length": (
        lambda: LAYER(X, mask=masks.Dense.keep(torch.ones(4, 4) > 0), shards=here()),
        ["4", "6"],
    ),
    "positions of a part": (
        lambda: ak.MultiHeadAttention(16, 4, rotary=DYNAMIC)(
            X, positions=torch.arange(6), shards=here()
        ),
        ["whole text", "positions="],
    ),
    "pickled": (lambda: pickle.dumps(here()), ["sharding"]),
    "copied": (lambda: copy.deepcopy(here()), ["sharding"]),
    "the ways pickled": (lambda: pickle.dumps(CP), ["in each process"]),
    "parts of another size": (lambda: here().gather(X[:, :4]), ["4 positions", "6 tokens"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_sentence_that_says_what_to_do(name: str) -> None:
    call, words = WRONG[name]
    with pytest.raises(CompositionError) as caught:
        call()
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def one_is_wrong(group: dist.ProcessGroup) -> str:
    """Return what this rank raises where the tokens of rank 1 are too few."""
    part = ContextParallel(group).shards(tokens=9)
    x = part.take(torch.randn(1, 9, 16))[:, : 3 if part.rank == 1 else None]
    try:
        LAYER(x, shards=part)
    except (CompositionError, ExchangeError) as error:
        return str(error)
    return ""


def test_what_is_wrong_on_one_rank_is_told_to_the_others() -> None:
    pool = Pool(2)
    try:
        for told in pool.run(one_is_wrong):
            assert "x [1, 3, 16] has 3 tokens" in told
    finally:
        pool.close()


def on_meshes(group: dist.ProcessGroup) -> list[str]:
    """Return what is said of meshes that are not one dimension."""
    mesh, told = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp")), []
    assert ContextParallel(mesh["cp"]).size == 2
    assert ContextParallel(mesh["dp", "cp"]._flatten("both")).rank == dist.get_rank()
    own = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    of_others = own[dist.get_rank() < 2]
    for make in (lambda: mesh, lambda: mesh["tp"], lambda: of_others):
        try:
            ContextParallel(make())
        except (CompositionError, KeyError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def test_meshes_of_several_dimensions_and_groups_of_others(processes: Pool) -> None:
    for several, missing, others in processes.run(on_meshes):
        assert "2 dimensions" in several
        assert "mesh['dp']" in several
        assert "tp" in missing  # torch says it: there is no such mesh to hand on
        assert "give a dimension" in others or "not in this" in others
