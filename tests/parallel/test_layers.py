"""Layers that are given `shards=`: on all ranks together, they are the layers of one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnkit as ak
from attnkit import masks, pse
from attnkit.errors import CompositionError
from attnkit.parallel import ContextParallel, ParallelPlan, Sharding, Shards
from attnkit.parallel.wires import Alone, Wires
from attnkit.rotary import Dynamic, Rotary
from tests.parallel.processes import Pool
from tests.parallel.threads import run_ranks

TOKENS, DIM = 37, 16
CAUSAL = masks.Causal()
LENGTHS = ak.SeqLens([11, 1, 0, 17, 8])
NEAR = masks.Causal() & masks.SlidingWindow(7)


def mha(**changes: Any) -> ak.MultiHeadAttention:
    torch.manual_seed(0)
    given = {"num_kv_heads": 2, "mask": CAUSAL, **changes}
    layer = ak.MultiHeadAttention(DIM, 4, **given).double()
    for weight in layer.parameters():
        with torch.no_grad():
            weight.add_(0.3 * torch.randn_like(weight))  # sinks and tables are no zeros
    return layer


LAYERS: dict[str, Callable[[], ak.MultiHeadAttention]] = {
    "rotary": lambda: mha(rotary=True),
    "alibi": lambda: mha(pse=pse.ALiBi(4), mask=NEAR),
    "t5": lambda: mha(pse=pse.T5Relative(4, bidirectional=False), sink=True),
    "gated, normed, soft-capped": lambda: mha(
        rotary=True, qk_norm="rms", gate="head", softcap=3.0, mask=NEAR
    ),
    "extra key": lambda: mha(extra_key=True, bias=True),
    "turned by length": lambda: mha(
        rotary=Rotary(scaling=Dynamic(2.0, original_max_position_embeddings=8))
    ),
    "heads differ": lambda: mha(mask=masks.PerHead([CAUSAL, NEAR, CAUSAL, masks.Full()])),
}


def gradients(
    layer: nn.Module, output: Tensor, inputs: list[Tensor], slope: Tensor
) -> list[Tensor]:
    leaves = [*inputs, *layer.parameters()]
    found = torch.autograd.grad(output, leaves, slope, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


def on_one(layer: nn.Module, slope: Tensor, *inputs: Tensor, **given: Any) -> list[Tensor]:
    own = [one.clone().requires_grad_() for one in inputs]
    output = layer(*own, **given)
    return [output, *gradients(layer, output, own, slope)]


def on_ranks(
    count: int,
    layer: nn.Module,
    shards: Callable[[ContextParallel], Shards],
    slope: Tensor,
    *inputs: Tensor,
    faulty: Callable[[Shards], dict[str, Any]] = lambda here: {},
    **choices: Any,
) -> list[Tensor]:
    """Return what `on_one` does, of all ranks: outputs put together, weights' shares added."""
    dim = inputs[0].ndim - 2

    def work(wires: Wires) -> tuple[Shards, list[Tensor]]:
        here, own = shards(ContextParallel(wires, **choices)), copy.deepcopy(layer)
        sides = [here, here.keys][: len(inputs)]
        local = [
            s.take(x, dim).clone().requires_grad_() for s, x in zip(sides, inputs, strict=True)
        ]
        output = own(*local, shards=here, **faulty(here))
        return here, [output.detach(), *gradients(own, output, local, here.take(slope, dim))]

    found = run_ranks(count, work)
    here, parts = found[0][0], list(zip(*(one[1] for one in found), strict=True))
    whole = [here.sharding.restore(parts[0], dim)]
    for side, part in zip([here, here.keys], parts[1 : 1 + len(inputs)], strict=False):
        whole.append(side.sharding.restore(part, dim))
    return [*whole, *(sum(shares[1:], shares[0]) for shares in parts[1 + len(inputs) :])]


def far(some: list[Tensor], others: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_on_ranks_is_that_of_one_process(name: str, packed: bool) -> None:
    layer = LAYERS[name]()
    shape = (TOKENS, DIM) if packed else (2, TOKENS, DIM)
    x, slope = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    mask, lengths = layer.attention.mask, {"seqlens": LENGTHS} if packed else {}
    expected = on_one(layer, slope, x, **lengths)
    found = on_ranks(
        3,
        layer,
        lambda cp: cp.shards(mask, **({"seqlens": LENGTHS} if packed else {"tokens": TOKENS})),
        slope,
        x,
    )
    assert far(found, expected) < 1e-12


@pytest.mark.parametrize("packed", [False, True])
def test_cross_attention_has_two_shardings(packed: bool) -> None:
    layer = mha(kv_dim=6, pse=pse.ALiBi(4))
    lengths = ak.SeqLens([11, 26], [20, 9])
    shape = ((37, DIM), (29, 6)) if packed else ((2, TOKENS, DIM), (2, 29, 6))
    x, context = (torch.randn(one, dtype=torch.float64) for one in shape)
    slope = torch.randn_like(x)
    expected = on_one(layer, slope, x, context, **({"seqlens": lengths} if packed else {}))
    given = {"seqlens": lengths} if packed else {"tokens": TOKENS, "keys": 29}
    found = on_ranks(3, layer, lambda cp: cp.shards(CAUSAL, **given), slope, x, context)
    assert far(found, expected) < 1e-12


@pytest.mark.parametrize("layout", ["BSND", "BNSD", "SBH", "TND"])
def test_functions_take_shards_in_every_layout(layout: str) -> None:
    form = ak.layouts.get(layout)
    shape = form.shape(ak.layouts.Sizes(1, TOKENS, 4, 8))
    heads = {"num_heads": 4} if form.merges_heads else {}
    q, k, v = torch.randn(3, *shape, dtype=torch.float64)
    packed = {"seqlens": LENGTHS} if form.packed else {}
    given = {"mask": NEAR, "layout": layout, "return_stats": True, **heads}
    expected = ak.attention(q, k, v, **given, **packed)
    dim = form.length_axis

    def work(wires: Wires) -> tuple[Shards, ak.AttentionOutput]:
        here = ContextParallel(wires).shards(NEAR, **(packed or {"tokens": TOKENS}))
        return here, ak.attention(*(here.take(t, dim) for t in (q, k, v)), **given, shards=here)

    found = run_ranks(2, work)
    sharding = found[0][0].sharding
    whole = sharding.restore([one.output for _, one in found], dim)
    lse = sharding.restore([one.stats.lse for _, one in found], 0 if form.packed else 2)
    assert far([whole, lse], [expected.output, expected.stats.lse]) < 1e-12
    with pytest.raises(CompositionError, match=r"stats\.lse"):
        found[0][1].stats.max  # noqa: B018


def test_one_sharding_serves_layers_whose_masks_differ() -> None:
    layer, (x, slope) = Twice(False, 0.0), torch.randn(2, 1, TOKENS, DIM, dtype=torch.float64)
    for kind in ("even", "contiguous", Sharding.of(TOKENS, [[(3, 9)], [(0, 3), (9, TOKENS)], []])):
        found = on_ranks(
            3,
            layer,
            lambda cp: cp.shards(layers=[CAUSAL, NEAR], tokens=TOKENS),
            slope,
            x,
            balance=kind,
        )
        assert far(found, on_one(layer, slope, x)) < 1e-12


def test_positions_that_count_on_each_rank_are_seen() -> None:
    layer, x = mha(rotary=True), torch.randn(1, TOKENS, DIM, dtype=torch.float64)
    expected = on_one(layer, x, x)

    def counted(here: Shards) -> dict[str, Any]:
        return {"positions": torch.arange(here.size)}

    found = on_ranks(3, layer, lambda cp: cp.shards(CAUSAL, tokens=TOKENS), x, x, faulty=counted)
    assert far(found, expected) > 1e-3


def test_the_losses_of_ranks_add_up_and_labels_shifted_after_the_cut_do_not() -> None:
    tokens = torch.randint(5, (1, TOKENS))
    logits = torch.randn(1, TOKENS, 5, dtype=torch.float64)
    expected = nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])

    def work(wires: Wires) -> list[Tensor]:
        here = ContextParallel(wires).shards(CAUSAL, tokens=TOKENS)
        own, cut = here.take(logits), here.take(tokens)
        late = torch.cat((cut[:, 1:], torch.full((1, 1), -100)), 1)
        by_tokens = here.loss(own, tokens=tokens)
        return [here.loss(own, here.labels(tokens)), by_tokens, here.loss(own, late)]

    found = [sum(shares) for shares in zip(*run_ranks(3, work), strict=True)]
    assert found[0].item() == pytest.approx(expected.item(), abs=1e-14)
    assert found[1].item() == pytest.approx(expected.item(), abs=1e-14)
    assert abs(found[2].item() - expected.item()) > 1e-3


def test_what_is_gathered_is_the_whole_and_gradients_are_cut_again() -> None:
    x = torch.randn(2, TOKENS, 3, dtype=torch.float64)
    slope = torch.randn_like(x)

    def work(wires: Wires) -> bool:
        here = ContextParallel(wires).shards(CAUSAL, tokens=TOKENS)
        own = here.take(x).clone().requires_grad_()
        whole = here.gather(own)
        (found,) = torch.autograd.grad(whole, own, slope)
        turned = here.gather(here.take(x, -2).mT, -1).mT
        return (
            torch.equal(whole, x)
            and torch.equal(turned, x)
            and torch.equal(found, here.take(slope))
        )

    assert all(run_ranks(3, work))


def dropped(group: Any, seed: int, again: bool, extra: bool) -> tuple[Any, list[Tensor]]:
    """Return what a layer that drops gives on this rank; with the forward computed again."""
    here = ContextParallel(group).shards(CAUSAL, tokens=TOKENS)
    (x, slope), layer = for_dropout(extra)
    own = here.take(x).requires_grad_()
    torch.manual_seed(seed)
    if again:
        output = checkpoint(layer, own, shards=here, use_reentrant=False)
    else:
        output = layer(own, shards=here)
    return here.sharding, [output.detach(), *gradients(layer, output, [own], here.take(slope))]


def for_dropout(extra: bool) -> tuple[Tensor, nn.Module]:
    torch.manual_seed(1)
    data = torch.randn(2, 1, TOKENS, DIM, dtype=torch.float64)
    return data, Twice(extra)


class Twice(nn.Module):
    """Two layers: what the second draws follows on what the first has drawn."""

    def __init__(self, extra: bool, dropout: float = 0.3) -> None:
        super().__init__()
        self.first = mha(rotary=True, dropout=dropout, extra_key=extra)
        self.second = mha(rotary=True, dropout=dropout, mask=NEAR)

    def forward(self, x: Tensor, shards: Shards | None = None) -> Tensor:
        return self.second(self.first(x, shards=shards), shards=shards)


@pytest.mark.parametrize(("again", "extra"), [(False, False), (True, True)])
def test_ranks_that_draw_alike_drop_what_one_process_drops(
    processes: Pool, again: bool, extra: bool
) -> None:
    (x, slope), layer = for_dropout(extra)
    torch.manual_seed(4)
    expected = on_one(layer, slope, x)
    apart = []
    for seed in (4, 5):
        found = processes.run(dropped, seed, again, extra, ranks=3)
        sharding, parts = found[0][0], list(zip(*(one[1] for one in found), strict=True))
        whole = [sharding.restore(one) for one in parts[:2]]
        apart.append(far([*whole, *map(sum, parts[2:])], expected))
    assert apart[0] < 1e-12
    assert apart[1] > 1e-2


def test_seed_plan_and_positions_are_made_on_the_host_whatever_the_default_device() -> None:
    x, found = torch.randn(37, 4, 8), []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        with torch.device(device):
            here = ContextParallel(Alone()).shards(NEAR, seqlens=LENGTHS)
            how = {"mask": NEAR, "layout": "TND"}
            made = ak.attention(x, x, x, dropout=0.5, shards=here, **how)
            asked = {"seqlens": LENGTHS, "ranks": 4, "method": "hybrid"}
            plan = ak.parallel.plan(x, x, x, heads_ways=2, **asked, **how)
            found.append((made, here.positions("cpu"), plan.explain()))
    (made, where, told), (again, there, said) = found
    assert torch.equal(made, again)
    assert torch.equal(where, there)
    assert told == said


def test_layers_and_steps_share_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    made, cp = [], ContextParallel(Alone())
    make = ParallelPlan.of

    def counted(*args: Any, **kwargs: Any) -> ParallelPlan:
        made.append(args)
        return make(*args, **kwargs)

    monkeypatch.setattr(ParallelPlan, "of", counted)
    layers = [mha(rotary=True) for _ in range(3)]
    for _ in range(3):
        x, here = torch.randn(1, TOKENS, DIM, dtype=torch.float64), cp.shards(tokens=TOKENS)
        for layer in layers:
            x = layer(x, shards=here)
    assert len(made) == 1
    assert layers[0].plan(x, shards=here) is layers[1].plan(x, shards=here)
    for length in range(40):
        cp.shards(tokens=length)
    assert len(cp._shards) == 16
    assert copy.deepcopy(layers[0]).attention._plans == {}


def test_a_plan_is_that_of_all_ranks_and_is_told() -> None:
    def work(wires: Wires) -> tuple[ParallelPlan, str]:
        here = ContextParallel(wires).shards(NEAR, tokens=TOKENS)
        layer, x = mha(mask=NEAR), torch.empty(1, here.size, DIM, dtype=torch.float64)
        layer.plan(x, shards=here).verify()
        q = torch.empty(1, here.size, 4, 4, dtype=torch.float64)
        assert ak.plan(q, q, q, mask=NEAR, shards=here).size == wires.size
        core = ak.Attention(4, 4, mask=NEAR)
        assert core.explain(q, q, q, shards=here) == core.plan(q, q, q, shards=here).explain()
        return layer.plan(x, shards=here), layer.explain(x, shards=here)

    plans, told = zip(*run_ranks(3, work), strict=True)
    assert plans[0] == plans[1] == plans[2]
    assert len(set(told)) == 1


def test_half_precision_and_autocast() -> None:
    layer = mha(rotary=True).float()
    x = torch.randn(2, TOKENS, DIM)

    def work(wires: Wires) -> tuple[Shards, Tensor]:
        here, own = ContextParallel(wires).shards(CAUSAL, tokens=TOKENS), copy.deepcopy(layer)
        with torch.autocast("cpu", torch.bfloat16):
            return here, own(here.take(x), shards=here).detach()

    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
    found = run_ranks(2, work)
    whole = found[0][0].sharding.restore([one for _, one in found])
    assert whole.dtype == expected.dtype == torch.bfloat16
    exact = layer.double()(x.double())
    assert (whole - exact).std() < 1.1 * (expected - exact).std()
