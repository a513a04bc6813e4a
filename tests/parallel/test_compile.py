"""Shards inside of `torch.compile`: one operator, one graph for every length."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks, pse
from attnkit.errors import CompositionError
from attnkit.parallel import ContextParallel
from attnkit.parallel import graph as graphs
from attnkit.parallel.wires import Alone
from attnkit.rotary import Dynamic, Rotary
from tests.parallel.processes import Pool
from tests.parallel.threads import Listening

CAUSAL = masks.Causal()
LENGTHS = ([7, 12], [3, 15, 1], [20, 4])


def made(dropout: float = 0.0) -> ak.MultiHeadAttention:
    torch.manual_seed(0)
    return ak.MultiHeadAttention(
        16,
        4,
        num_kv_heads=2,
        mask=CAUSAL,
        pse=pse.T5Relative(4, bidirectional=False),
        rotary=Rotary(scaling=Dynamic(2.0, original_max_position_embeddings=8)),
        sink=True,
        dropout=dropout,
    ).double()


def results(layer: nn.Module, x: Tensor, slope: Tensor, **given: object) -> list[Tensor]:
    x = x.clone().requires_grad_()
    output = layer(x, **given)
    return [output, *torch.autograd.grad(output, [x, *layer.parameters()], slope)]


def far(some: list[Tensor], others: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def test_one_graph_serves_every_length_of_shards() -> None:
    layer, cp, seen = made(), ContextParallel(Alone()), []

    def counted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counted)
    for lengths in LENGTHS:
        seqlens = ak.SeqLens(lengths)
        here = cp.shards(CAUSAL, seqlens=seqlens)
        x, slope = torch.randn(2, seqlens.total_q, 16, dtype=torch.float64)
        expected = results(layer, x, slope, seqlens=seqlens)
        assert far(results(compiled, x, slope, shards=here), expected) < 1e-12
    assert len(seen) <= 2  # the second leaves the number of tokens open


def test_statistics_without_a_maximum_and_wrong_lengths_in_a_graph() -> None:
    layer, cp = made(), ContextParallel(Alone())
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    here, x = cp.shards(CAUSAL, tokens=9), torch.randn(1, 9, 16, dtype=torch.float64)
    found = compiled(x, shards=here, return_stats=True)
    expected = layer(x, return_stats=True)
    assert far([found.output, found.stats.lse], [expected.output, expected.stats.lse]) < 1e-12
    with pytest.raises(CompositionError, match=r"stats\.lse"):
        found.stats.max  # noqa: B018
    with pytest.raises(CompositionError, match="8 tokens"):
        compiled(x[:, :8], shards=here)


def test_what_is_wrong_in_a_graph_is_told_to_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    wires = Listening()
    here = ContextParallel(wires).shards(CAUSAL, tokens=9)
    x = torch.randn(1, 9, 4, 4, requires_grad=True)
    tokens = torch.randn(1, 9, 16, dtype=torch.float64)
    torch._dynamo.reset()
    attend = torch.compile(ak.attention, fullgraph=True, backend="eager")
    layer = torch.compile(made(), fullgraph=True, backend="eager")
    output = attend(x, x, x, mask=CAUSAL, shards=here)
    assert not wires.heard
    with pytest.raises(CompositionError, match="8 tokens") as one:
        attend(*[x[:, :8]] * 3, mask=CAUSAL, shards=here)
    with pytest.raises(CompositionError, match="8 tokens") as two:
        layer(tokens[:, :8], shards=here)

    def fails(*given: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(graphs, "backward", fails)
    with pytest.raises(RuntimeError, match="no room") as three:
        torch.autograd.backward(output.sum())
    assert wires.heard == [told.value for told in (one, two, three)]


def compiled_on_ranks(group: dist.ProcessGroup, method: str, dropout: float) -> float:
    """Return how far a compiled layer is from the same without a graph, on this rank."""
    layer, cp = made(dropout), ContextParallel(group, method=method)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    apart = []
    for lengths in LENGTHS[:2]:
        here = cp.shards(CAUSAL, seqlens=ak.SeqLens(lengths))
        x, slope = torch.randn(2, sum(lengths), 16, dtype=torch.float64)
        x, slope = here.take(x, 0), here.take(slope, 0)
        found = []
        for one in (layer, compiled):
            torch.manual_seed(3)
            found.append(results(one, x, slope, shards=here))
        apart.append(far(*found))
    return max(apart)


@pytest.mark.sweep
@pytest.mark.parametrize(("method", "dropout"), [("needed", 0.2), ("ulysses", 0.0)])
def test_ranks_compute_in_graphs_what_they_do_without(
    processes: Pool, method: str, dropout: float
) -> None:
    assert max(processes.run(compiled_on_ranks, method, dropout, ranks=2, limit=240.0)) < 1e-12
