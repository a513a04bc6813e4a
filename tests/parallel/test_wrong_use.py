"""Unlikely and wrong uses: each equals one process, or is one clear error on every rank."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import attnkit as ak
from attnkit import masks, pse
from attnkit.errors import AttnkitError, BackendRefused, CompositionError
from attnkit.masks import Mask
from attnkit.parallel import ContextParallel, Sharding, Shards
from attnkit.parallel.guard import Guard
from attnkit.parallel.wires import Alone, Wires
from tests.parallel.processes import Pool
from tests.parallel.threads import Listening, run_ranks

CAUSAL = masks.Causal()
METHODS = ("needed", "ring", "gather", "ulysses")


def three(tokens: int, heads: tuple[int, int] = (4, 2), keys: int | None = None) -> list[Tensor]:
    torch.manual_seed(5)
    counts = (tokens, heads[0]), (keys or tokens, heads[1]), (keys or tokens, heads[1])
    return [torch.randn(2, s, n, 8, dtype=torch.float64) for s, n in counts]


def answers(tensors: Sequence[Tensor], slope: Tensor, **how: Any) -> list[Tensor]:
    """Return the output and the gradients of query, key and value."""
    leaves = [one.detach().clone().requires_grad_() for one in tensors]
    output = ak.attention(*leaves, **how)
    return [output.detach(), *torch.autograd.grad(output, leaves, slope)]


def assert_as_one_process(
    size: int,
    shards: Callable[[ContextParallel], Shards],
    tokens: int,
    mask: Mask = CAUSAL,
    heads: tuple[int, int] = (4, 2),
    keys: int | None = None,
    **asked: Any,
) -> None:
    """Compare with one process: the outputs, and the gradients of all inputs."""
    whole = three(tokens, heads, keys)
    slope = torch.randn_like(whole[0])

    def work(wires: Wires) -> tuple[Shards, list[Tensor]]:
        here = shards(ContextParallel(wires, **asked))
        sides = (here, here.keys, here.keys)
        local = [side.take(one) for side, one in zip(sides, whole, strict=True)]
        return here, answers(local, here.take(slope), mask=mask, shards=here)

    found = run_ranks(size, work)
    shardings = [found[0][0].sharding, *[found[0][0].of_keys] * 2]
    for k, one in enumerate(answers(whole, slope, mask=mask)):
        parts = [rank[k] for _, rank in found]
        again = shardings[max(0, k - 1)].restore(parts)
        assert again.shape == one.shape
        assert (again - one).abs().max().nan_to_num() < 1e-12 if one.numel() else True


# -- what works ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_fewer_tokens_than_ranks(method: str, tokens: int) -> None:
    assert_as_one_process(4, lambda cp: cp.shards(CAUSAL, tokens=tokens), tokens, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_without_tokens(method: str) -> None:
    uneven = Sharding.of(9, [[(0, 4), (7, 9)], [], [(4, 7)]])
    whole = lambda cp: cp.shards(tokens=9)  # noqa: E731
    assert_as_one_process(3, whole, 9, method=method, balance=uneven)


@pytest.mark.parametrize("heads", [(3, 3), (3, 1), (5, 5), (6, 2), (1, 1)])
@pytest.mark.parametrize("size", [2, 4])
def test_heads_that_ranks_do_not_divide(heads: tuple[int, int], size: int) -> None:
    ways: dict[str, Any] = {"method": "ulysses"}
    assert_as_one_process(size, lambda cp: cp.shards(tokens=10), 10, heads=heads, **ways)
    if size == 4:
        ways = {"method": "hybrid", "heads_ways": 2}
        assert_as_one_process(size, lambda cp: cp.shards(tokens=10), 10, heads=heads, **ways)


@pytest.mark.parametrize("method", METHODS)
def test_a_group_of_one(method: str) -> None:
    assert_as_one_process(1, lambda cp: cp.shards(CAUSAL, tokens=7), 7, method=method)


def test_shards_that_were_balanced_for_another_mask() -> None:
    documents = masks.Documents((3, 11, 2, 4)) & CAUSAL
    assert_as_one_process(3, lambda cp: cp.shards(documents, tokens=20), 20)
    several = lambda cp: cp.shards(layers=[CAUSAL, masks.SlidingWindow(4)], tokens=20)  # noqa: E731
    assert_as_one_process(3, several, 20, mask=documents)
    assert_as_one_process(3, lambda cp: cp.shards(tokens=20, keys=7), 20, masks.Full(), keys=7)


def test_a_mask_that_shows_nothing_and_a_text_without_tokens() -> None:
    nothing = CAUSAL & ~CAUSAL
    assert_as_one_process(2, lambda cp: cp.shards(nothing, tokens=6), 6, mask=nothing)
    assert_as_one_process(2, lambda cp: cp.shards(tokens=0), 0)


# -- what is an error, and the same on all ranks ---------------------------------------------------


def refused(group: object, told: str, **asked: Any) -> None:
    with pytest.raises(CompositionError, match=told):
        ContextParallel(group, **asked)


def test_choices_that_there_are_not() -> None:
    here = Alone()
    refused(here, r"method='rings'; it is .*'ring' \(", method="rings")
    refused(here, "dropout='none'; it is 'global'", dropout="none")
    refused(here, "timeout=0 is out of range", timeout=0)
    refused(here, "stages=0", stages=0)
    refused(here, "keep='yes'", keep="yes")
    refused("cp", "group='cp'; give a dimension of a DeviceMesh, mesh")
    refused(8, r"plans for so many ranks need no group: attnkit.parallel.plan\(\.\.\., ranks=")
    refused(None, "group=None; give a dimension of a DeviceMesh")


def on_a_mesh(group: dist.ProcessGroup) -> list[str]:
    told = []
    for make in (
        lambda: ContextParallel(init_device_mesh("cpu", (4, 1), mesh_dim_names=("dp", "cp"))),
        lambda: ContextParallel(init_device_mesh("cpu", (2, 2))),
        lambda: init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))["tp"],
    ):
        with pytest.raises((CompositionError, KeyError)) as error:
            make()
        told.append(str(error.value))
    return told


def test_a_mesh_of_several_dimensions_and_one_that_is_not_there(processes: Pool) -> None:
    for named, unnamed, missing in processes.run(on_a_mesh):
        assert "has 2 dimensions; text is spread along one of them, such as mesh['dp']" in named
        assert "such as a mesh whose dimensions have names" in unnamed
        assert "tp" in missing  # torch's own


def test_lengths_that_do_not_say_how_long_the_text_is() -> None:
    cp = ContextParallel(Alone())
    for wrong, told in (
        ({}, "tokens=None, seqlens=None: give the length of the whole text"),
        ({"tokens": 4, "seqlens": ak.SeqLens([4])}, "one of them"),
        ({"tokens": -1}, "tokens=-1 is too small"),
        ({"seqlens": [4]}, r"wrap the lengths as SeqLens\(lengths\)"),
        ({"seqlens": ak.SeqLens([4]), "keys": 3}, "says how many keys each sequence has"),
    ):
        with pytest.raises(CompositionError, match=told):
            cp.shards(CAUSAL, **wrong)
    with pytest.raises(CompositionError, match="built for"):
        cp.shards(masks.Documents((2, 3)), tokens=6)
    x = torch.zeros(1, 6, 2, 8)
    here = cp.shards(tokens=6)
    for given in ({"seqlens": ak.SeqLens([6])}, {"shards": cp}, {"shards": here.sharding}):
        with pytest.raises(CompositionError, match="shards"):
            ak.attention(x, x, x, **({"shards": here} | given))


def test_labels_that_would_be_shifted_twice() -> None:
    here, tokens = ContextParallel(Alone()).shards(tokens=4), torch.arange(4)[None]
    once = here.labels(tokens)
    for again in (here.labels, lambda t: here.loss(torch.zeros(1, 4, 9), tokens=t)):
        with pytest.raises(CompositionError, match="labels already and would be shifted twice"):
            again(once)
    with pytest.raises(CompositionError, match=r"one of tokens= .* and labels="):
        here.loss(torch.zeros(1, 4, 9), once, tokens=tokens)


def guarded(act: Callable[[Wires], object]) -> Callable[[Wires], object]:
    """Return the same on ranks that tell each other what they do, as those of a group."""
    store = dist.HashStore()

    def work(wires: Wires) -> object:
        wires.guard = Guard(store, wires.rank, wires.size, timeout=20.0)
        return act(wires)

    return work


def raised(act: Callable[[], object]) -> str:
    with pytest.raises(AttnkitError) as error:
        act()
    return str(error.value)


def test_a_tensor_of_another_length_than_the_rank_has() -> None:
    x = three(10)

    def act(wires: Wires) -> str:
        here = ContextParallel(wires).shards(tokens=10)
        local = [here.take(one) for one in x]
        if wires.rank == 1:
            local[0] = local[0][:, :-1]
        return raised(lambda: ak.attention(*local, mask=CAUSAL, shards=here))

    zero, one = run_ranks(2, guarded(act))
    rule = "query [2, 4, 4, 8] has 4 tokens, and rank 1 of 2 has 5 of 10; cut the whole: here.take"
    assert one.startswith(rule)
    assert f"rank 1: raised CompositionError: {rule}" in zero

    layer, text = ak.MultiHeadAttention(16, 2, rotary=True), torch.zeros(1, 10, 16)

    def of_a_layer(wires: Wires) -> str:
        here = ContextParallel(wires).shards(tokens=10)
        local = here.take(text)[:, wires.rank :]
        return raised(lambda: layer(local, shards=here))

    zero, one = run_ranks(2, guarded(of_a_layer))
    assert one.startswith("x [1, 4, 16] has 4 tokens, and rank 1 of 2 has 5 of 10; cut the whole")
    assert "rank 1: raised CompositionError: x [1, 4, 16] has 4 tokens" in zero

    def uncut(wires: Wires) -> str:
        here = ContextParallel(wires).shards(tokens=10)
        return raised(lambda: ak.attention(*x, mask=CAUSAL, shards=here))

    for told in run_ranks(2, guarded(uncut)):
        assert "these are all of them" in told


def test_what_is_wrong_before_anything_is_exchanged_is_told_to_other_ranks() -> None:
    wires, x = Listening(), torch.zeros(1, 9, 4, 4)
    here = ContextParallel(wires).shards(CAUSAL, tokens=9)
    layer = ak.MultiHeadAttention(16, 4, mask=CAUSAL, rotary=True)
    with pytest.raises(CompositionError, match="lengths are those of the whole") as one:
        ak.attention(x, x, x, mask=CAUSAL, shards=here, seqlens=ak.SeqLens([9]))
    with pytest.raises(CompositionError, match="cut the whole") as two:
        layer(x[:, :8].flatten(2), cache=ak.ShardedCache(here))
    with pytest.raises(CompositionError, match="mask") as three:
        ak.Attention(4, 4)(x, x, x, mask=3, shards=here)
    with pytest.raises(CompositionError, match="backend") as four:
        ak.attention(x, x, x, backend=4, shards=here)
    assert wires.heard == [told.value for told in (one, two, three, four)]


@pytest.mark.parametrize("backend", ["emulated"])
def test_dropout_of_one_process_where_the_kernel_draws_in_its_own_order(backend: str) -> None:
    x = [one.half() for one in three(32)]

    def act(wires: Wires, **how: Any) -> Any:
        here = ContextParallel(wires, **how).shards(tokens=32)
        local = [here.take(one) for one in x]
        return ak.attention(*local, mask=CAUSAL, shards=here, dropout=0.5, backend=backend)

    def told(wires: Wires) -> str:
        with pytest.raises(BackendRefused) as error:
            act(wires)
        return str(error.value)

    for one in run_ranks(2, guarded(told)):
        assert "dropout" in one
        assert "dropout='local' lets each draw for itself" in one
    torch.manual_seed(0)
    assert all(o.isfinite().all() for o in run_ranks(2, lambda w: act(w, dropout="local")))


OTHERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "mask": ({"mask": masks.SlidingWindow(4)}, "mask Causal()", "mask SlidingWindow(4)"),
    "bias": ({"pse": pse.ALiBi(4)}, "bias none", "bias ALiBi(4)"),
    "lengths": ({"tokens": 14}, "tokens 12", "tokens 14"),
    "dtype": ({"dtype": torch.float32}, "dtype float64", "dtype float32"),
    "heads": ({"heads": (4, 4)}, "heads 4 and 2 of keys", "heads 4 and 4 of keys"),
    "batch": ({"batch": 1}, "batch of 2", "batch of 1"),
    "method": ({"method": "ring"}, "method needed", "method ring"),
    "balance": ({"balance": "contiguous"}, "the same in these words", "the same in these words"),
    "softcap": ({"softcap": 3.0}, "soft-cap None", "soft-cap 3.0"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_ranks_that_disagree_say_in_what(case: str) -> None:
    other, mine, theirs = OTHERS[case]
    right = {"tokens": 12, "heads": (4, 2), "dtype": torch.float64, "batch": 2}
    right |= {"method": "needed", "balance": "zigzag", "mask": CAUSAL}

    def act(wires: Wires) -> str:
        given = right | (other if wires.rank == 1 else {})
        names = ("tokens", "heads", "dtype", "batch", "method", "balance")
        tokens, heads, dtype, batch, method, balance = (given.pop(name) for name in names)
        here = ContextParallel(wires, method=method, balance=balance).shards(tokens=tokens)
        local = [here.take(one)[:batch].to(dtype) for one in three(tokens, heads)]
        return raised(lambda: ak.attention(*local, shards=here, **given))

    start = time.monotonic()
    zero, one = run_ranks(2, guarded(act))
    assert zero == one
    assert f"  rank 0: {mine}" in zero
    assert f"  rank 1: {theirs}" in zero
    assert time.monotonic() - start < 15
    assert len(re.findall("\n  rank", zero)) == 2


def with_other_seeds(group: dist.ProcessGroup) -> str:
    here, x = ContextParallel(group, timeout=20.0).shards(tokens=12), three(12)
    local = [here.take(one) for one in x]
    torch.manual_seed(group.rank())
    return raised(lambda: ak.attention(*local, shards=here, dropout=0.5))


def test_ranks_with_other_dropout_seeds_are_told_what_to_do(processes: Pool) -> None:
    for told in processes.run(with_other_seeds, ranks=2):
        assert re.search(r"rank 0: dropout seed \d+\n  rank 1: dropout seed \d+\nEach rank", told)
        assert "seed all alike (torch.manual_seed)" in told
