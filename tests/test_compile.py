"""`Attention` in compiled graphs: one graph, the same numbers, a new one only where it must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends.tiled import backend as tiled


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def inputs(*shape: int, seed: int = 0, **how: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, **how).requires_grad_()


def compiled(function: Callable[..., Any], backend: Any = "aot_eager") -> Callable[..., Any]:
    made: Callable[..., Any] = torch.compile(function, fullgraph=True, backend=backend)
    return made


def bent(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.where(IDS[i] == IDS[j], score, torch.sin(score) - h)


IDS = torch.arange(32) // 5
WINDOW = masks.Causal() & masks.SlidingWindow(9)
LAYERS: dict[str, Callable[[], dict[str, Any]]] = {
    "window": lambda: {"mask": WINDOW},
    "sink and soft-cap": lambda: {"mask": WINDOW, "sink": True, "softcap": 5.0},
    "cells": lambda: {"mask": masks.Dense.keep(inputs(32, 32) > 0)},
    "a function": lambda: {"mask": masks.Predicate(lambda b, h, i, j: IDS[i] >= IDS[j])},
    "alibi": lambda: {"mask": WINDOW, "pse": pse.ALiBi(4)},
    "slopes that train": lambda: {"mask": WINDOW, "pse": pse.ALiBi(4, learnable=True)},
    "buckets": lambda: {"mask": masks.Causal(), "pse": pse.T5Relative(4)},
    "a score function": lambda: {"mask": WINDOW, "score_fn": bent},
    "a matrix that trains": lambda: {"pse": pse.Dense(nn.Parameter(inputs(4, 32, 32)))},
}


UNKNOWN_TO_THE_KERNEL = ("sink and soft-cap", "a score function")


@pytest.mark.parametrize("name", UNKNOWN_TO_THE_KERNEL)
def test_what_the_kernel_does_not_have_is_refused_when_the_layer_is_built(name: str) -> None:
    with pytest.raises(ak.BackendRefused):
        ak.Attention(4, 8, num_kv_heads=2, backend="emulated", **LAYERS[name]())


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (name, backend)
        for backend in ("tiled", "reference", "emulated")
        for name in LAYERS
        if backend != "emulated" or name not in UNKNOWN_TO_THE_KERNEL
    ],
)
def test_one_graph_computes_the_same(name: str, backend: str) -> None:
    how = LAYERS[name]()
    layer = ak.Attention(4, 8, num_kv_heads=2, backend=backend, **how).double()
    wide = {"dtype": torch.float64}
    q, k = inputs(2, 32, 4, 8, **wide), inputs(2, 32, 2, 8, seed=1, **wide)

    def call(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        found = layer(2 * q, k, k, return_stats=True)
        return found.output, found.stats.lse

    leaves = [q, k, *layer.parameters()]
    each = []
    for form in (compiled(call), call):  # what a first call in a graph keeps serves the next one
        output, lse = form(q, k)
        each.append((output, lse, *torch.autograd.grad(output.square().sum(), leaves)))
    for found, meant in zip(*each, strict=True):
        # The graph also asks for what flows through the statistics: zeros, by another way.
        torch.testing.assert_close(found, meant)


def test_inductor() -> None:
    layer = ak.MultiHeadAttention(32, 4, mask=WINDOW, rotary=True)
    x = inputs(2, 32, 32)
    wanted, found = layer(x), compiled(layer, "inductor")(x)
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (found, wanted)]
    torch.testing.assert_close(*grads)


def test_the_functional_form() -> None:
    x, bias, sink = inputs(1, 16, 2, 8), pse.ALiBi(2), inputs(2)

    def call(x: Tensor, sink: Tensor) -> Any:
        return ak.attention(x, x, x, mask=WINDOW, pse=bias, sink=sink)

    assert torch.equal(compiled(call)(x, sink), call(x, sink))


def test_it_compiles_again_only_for_another_request() -> None:
    counter = CompileCounter()
    layer = ak.Attention(2, 8, mask=WINDOW, dropout=0.1)
    call = compiled(layer, counter)
    x = inputs(1, 16, 2, 8)
    steps: list[Callable[[], Any]] = [
        lambda: call(x, x, x),
        lambda: call(*[inputs(1, 16, 2, 8, seed=1)] * 3),
        lambda: call(*[inputs(1, 24, 2, 8)] * 3),
        lambda: call(*[inputs(1, 16, 2, 8)] * 3),
        lambda: layer.eval() and call(x, x, x),
        lambda: call(x, x, x),
    ]
    frames = []
    for step in steps:
        step()
        frames.append(counter.frame_count)
    assert frames == [1, 1, 2, 2, 3, 3]


def test_graphs_of_one_function_keep_their_layers_apart() -> None:
    """Another mask or bias is data of the graph; another number, or a bias more, is not."""
    counter = CompileCounter()
    call = compiled(lambda layer, x: layer(x, x, x), counter)
    x = inputs(1, 16, 2, 8)

    def frames(layer: ak.Attention) -> int:
        torch.testing.assert_close(call(layer, x), layer(x, x, x), rtol=0, atol=0)
        return counter.frame_count

    equal = [ak.Attention(2, 8, mask=masks.SlidingWindow(4) & masks.Causal()) for _ in range(2)]
    assert [frames(layer) for layer in equal] == [1, 1]
    others = [
        ak.Attention(2, 8, mask=masks.SlidingWindow(5) & masks.Causal()),
        ak.Attention(2, 8, mask=equal[0].mask, scale=0.1),
        ak.Attention(2, 8, mask=equal[0].mask, pse=pse.ALiBi(2)),
        ak.Attention(2, 8, mask=equal[0].mask, pse=pse.ALiBi(2, slopes=(1.0, 2.0))),
    ]
    assert [frames(layer) for layer in (*others, *others, *equal)] == [1, 2, 3, 3] + [3] * 6


# -- what is new in each step --------------------------------------------------------------------

Step = tuple[Tensor, dict[str, Any]]
LENGTHS = ((4, 12, 3), (9, 7), (1, 1, 1, 20), (5, 5), (30,))


def _packed(lengths: tuple[int, ...]) -> Step:
    return inputs(sum(lengths), 16), {"seqlens": ak.SeqLens(lengths)}


def _padded(lengths: tuple[int, ...]) -> Step:
    x = inputs(len(lengths) + 1, max(lengths) + 3, 16)
    return x, {"mask": masks.Padding((2, *lengths))}


def _documents(lengths: tuple[int, ...]) -> Step:
    return inputs(2, 40, 16), {"mask": masks.Documents((*lengths, 40 - sum(lengths)))}


def _biased(lengths: tuple[int, ...]) -> Step:
    bias = pse.ALiBi([1 / n for n in range(2, 4)]) + pse.KeyBias(torch.arange(30.0) / lengths[0])
    return inputs(2, 30, 16), {"pse": bias}


def _longer(lengths: tuple[int, ...]) -> Step:
    return inputs(2, sum(lengths), 16), {}


STEPS: dict[str, tuple[dict[str, Any], Callable[[tuple[int, ...]], Step], int]] = {
    "packed": ({"mask": masks.Causal(), "layout": "TND", "rotary": True}, _packed, 2),
    "padding": ({"mask": masks.Causal(), "sink": True}, _padded, 2),
    "documents": ({"mask": masks.Causal(), "rotary": True}, _documents, 1),
    "biases": ({"pse": pse.T5Relative(2)}, _biased, 1),
    "T5 of another length": ({"pse": pse.T5Relative(2)}, _longer, 2),
    "merged heads": ({"mask": WINDOW, "layout": "BSH"}, _documents, 1),
    "packed T5": ({"pse": pse.T5Relative(2), "layout": "TND"}, _packed, 2),
}


@pytest.mark.parametrize("name", STEPS)
def test_new_values_are_the_same_graph(name: str) -> None:
    """Lengths, paddings, documents and biases are data; the first other size opens the sizes."""
    how, make, graphs = STEPS[name]
    counter = CompileCounterWithBackend("aot_eager")
    layer = ak.MultiHeadAttention(16, 2, **how)
    call = compiled(layer, counter)
    for lengths in LENGTHS:
        x, more = make(lengths)
        each = []
        for form in (call, layer):
            output = form(x, **more)
            each.append(
                (output, *torch.autograd.grad(output.sin().sum(), [x, *layer.parameters()]))
            )
        for found, meant in zip(*each, strict=True):
            torch.testing.assert_close(found, meant)
    assert counter.frame_count == graphs


def test_decoding_steps_are_one_graph() -> None:
    """Keys grow by one token in each step; so may the rows of a bias that is cut to them."""
    counter = CompileCounterWithBackend("aot_eager")
    layer = ak.Attention(4, 8, num_kv_heads=2, mask=masks.Causal(), pse=pse.ALiBi(4))
    call = compiled(layer, counter)
    query, kept = inputs(2, 1, 4, 8), inputs(2, 12, 2, 8)
    with torch.no_grad():
        for length in range(3, 12):
            keys = kept[:, :length]
            torch.testing.assert_close(call(query, keys, keys), layer(query, keys, keys))
    assert counter.frame_count == 2


def test_sizes_are_symbols_where_they_are_marked() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    call = compiled(
        lambda x, m: ak.attention(x, x, x, mask=m, return_stats=True).stats.lse, counter
    )
    for batch, length in ((2, 9), (3, 7), (4, 20)):
        x, mask = inputs(batch, length, 2, 8).detach(), masks.Padding([5] * batch)
        for axis in (0, 1):
            torch._dynamo.mark_dynamic(x, axis)
        meant = ak.attention(x, x, x, mask=mask, return_stats=True).stats.lse
        torch.testing.assert_close(call(x, mask), meant)
    assert counter.frame_count == 1


def test_what_does_not_fit_is_told_when_it_runs() -> None:
    layer = ak.Attention(2, 8, mask=masks.Causal(), layout="TND")
    call = compiled(lambda x, lens: layer(x, x, x, seqlens=lens))
    x = inputs(16, 2, 8)
    call(x, ak.SeqLens([4, 12]))
    with pytest.raises(ak.CompositionError, match="sum to 17"):
        call(x, ak.SeqLens([4, 13]))
    crossing = compiled(ak.MultiHeadAttention(16, 2))
    with pytest.raises(Exception, match="as many keys as queries"):  # while it is traced
        crossing(inputs(16, 16), seqlens=ak.SeqLens([4, 12], [12, 4]))
    masked = compiled(lambda x, mask: ak.attention(x, x, x, mask=mask))
    masked(x[None], masks.Documents([9, 7]))
    with pytest.raises(ak.CompositionError, match="is built for q_len=17"):
        masked(x[None], masks.Documents([9, 8]))


def test_statistics_that_nobody_asks_for_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest score of each row costs another pass over the scores."""
    layer, x = ak.MultiHeadAttention(16, 2, mask=WINDOW), inputs(2, 24, 16)
    call = compiled(lambda x, stats=False: layer(x, return_stats=stats))

    def never(*given: Any) -> Any:
        raise AssertionError("the largest scores were computed")

    monkeypatch.setattr(tiled, "maxima", never)
    call(x).sum().backward()
    monkeypatch.undo()
    torch.testing.assert_close(call(x, True).stats.max, layer(x, return_stats=True).stats.max)


@pytest.mark.parametrize("layout", ["TND", "BSND"])
def test_packed_calls_of_a_whole_layer(layout: str) -> None:
    """Rotary positions start anew in each sequence; dense modules pack their calls."""
    layer = ak.MultiHeadAttention(16, 2, mask=WINDOW, rotary=True, layout=layout)
    call = compiled(lambda x, lens: layer(x, seqlens=lens))
    x, lens = inputs(24, 16), ak.SeqLens([20, 4])
    assert torch.equal(call(x, lens), layer(x, seqlens=lens))
    masked = compiled(lambda x, lens, mask: layer(x, seqlens=lens, mask=mask))
    mask = masks.SlidingWindow(3)
    assert torch.equal(masked(x, lens, mask), layer(x, seqlens=lens, mask=mask))


def test_a_refusal_is_told_while_tracing() -> None:
    layer = ak.Attention(2, 8, mask=masks.Causal())
    x = inputs(1, 16, 2, 8)
    with pytest.raises(Exception, match="head_dim=8"):
        compiled(layer)(*[inputs(1, 16, 2, 16)] * 3)
    assert compiled(layer)(x, x, x).shape == x.shape


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_dropout_is_drawn_anew_and_repeated_in_the_backward(backend: str) -> None:
    layer = ak.Attention(2, 8, dropout=0.5, backend=backend)
    call = compiled(lambda x, v: layer(x, x, v))
    x, v = inputs(1, 32, 2, 8), torch.ones(1, 32, 2, 8, requires_grad=True)
    torch.manual_seed(0)
    first, second = call(x, v), call(x, v)
    torch.manual_seed(0)
    assert torch.equal(first, call(x, v))
    assert not torch.equal(first, second)
    # The output is linear in the values, so it is their gradient's product with them.
    (grad,) = torch.autograd.grad(first.sum(), v)
    assert grad.sum().item() == pytest.approx(first.sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("wrapped", "reentrant"),
    [(False, False), (False, True), (True, False)],  # torch does not trace the reentrant form
    ids=["eager", "eager, reentrant", "compiled"],
)
def test_activation_checkpointing(wrapped: bool, reentrant: bool) -> None:
    layer = ak.MultiHeadAttention(16, 2, mask=WINDOW, dropout=0.5)
    x = inputs(2, 24, 16)

    leaves = [x, *layer.parameters()]

    def call(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=reentrant)

    form = compiled(call) if wrapped else call
    grads = []
    for run in (form, compiled(layer) if wrapped else layer):
        torch.manual_seed(3)
        for leaf in leaves:
            leaf.grad = None
        run(x).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for found, meant in zip(*grads, strict=True):
        torch.testing.assert_close(found, meant)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    layer = ak.MultiHeadAttention(32, 4, mask=WINDOW)
    x = inputs(2, 32, 32)
    each = []
    for form in (layer, compiled(layer)):
        with torch.autocast("cpu", dtype=dtype):
            output = form(x)
        assert output.dtype == dtype
        each.append((output, *torch.autograd.grad(output.float().square().sum(), [x])))
    for found, meant in zip(*each, strict=True):
        # The tracer adds up the gradients of three projections in an order of its own.
        error = (found - meant).abs().max().item()
        assert error <= 4 * torch.finfo(dtype).eps * meant.abs().max().item()


def test_a_stack_of_layers_is_one_graph() -> None:
    counter = CompileCounter()
    layers = nn.Sequential(*(ak.MultiHeadAttention(16, 2, mask=WINDOW) for _ in range(3)))
    x = inputs(2, 24, 16)
    assert torch.equal(compiled(layers, counter)(x), layers(x))
    assert counter.frame_count == 1


def test_data_parallel_on_two_processes(tmp_path: Path) -> None:
    """Gradients of two halves of a batch, averaged by DDP, are those of the whole batch."""
    torch.multiprocessing.spawn(  # type: ignore[no-untyped-call]
        _half, args=(str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2
    )
    layer = _layer()
    layer(_batch()).square().mean().backward()
    for rank in range(2):
        for compiles in ("eager", "compiled"):
            found = torch.load(tmp_path / f"{compiles}-{rank}.pt")
            for name, weight in layer.named_parameters():
                torch.testing.assert_close(found[name], weight.grad, msg=f"{compiles} {name}")


def _layer() -> nn.Module:
    torch.manual_seed(0)
    return ak.MultiHeadAttention(16, 2, mask=WINDOW, pse=pse.ALiBi(2, learnable=True), sink=True)


def _batch() -> Tensor:
    return inputs(4, 24, 16, seed=9)


def _half(rank: int, rendezvous: str, folder: str) -> None:
    torch.set_num_threads(1)
    where = f"file://{rendezvous}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    _gradients_of_half(rank, Path(folder))
    # The wrapped models are gone by now: one that outlives its process group may hang.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _gradients_of_half(rank: int, folder: Path) -> None:
    for name in ("eager", "compiled"):
        layer = _layer()
        inside: Any = compiled(layer) if name == "compiled" else layer
        model = nn.parallel.DistributedDataParallel(inside)
        model(_batch()[2 * rank : 2 * rank + 2]).square().mean().backward()
        torch.save(
            {key: w.grad for key, w in layer.named_parameters()}, folder / f"{name}-{rank}.pt"
        )
