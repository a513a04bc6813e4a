"""Masks and biases that are made inside of a compiled function: written there, made as it runs."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import attnkit as ak
from attnkit import masks, pse

KEYS = pse.KeyBias(torch.arange(6.0))
ALIBI = pse.ALiBi(2)

CAUSAL = masks.Causal()

# What is made of numbers, words and other masks or biases is part of the graph.
WRITTEN = {
    "an anchor": lambda x: {"mask": masks.Causal("top_left")},
    "a window": lambda x: {"mask": masks.SlidingWindow(3)},
    "an intersection": lambda x: {"mask": CAUSAL & masks.SlidingWindow(3)},
    "a union of a difference": lambda x: {
        "mask": (CAUSAL - masks.Columns(1, 2)) | masks.Rows(0, 1)
    },
    "a complement": lambda x: {"mask": masks.Not(masks.Columns(1, 2))},
    "a part": lambda x: {"mask": masks.Causal()[2:, :]},
    "rows of a rank": lambda x: {
        "mask": CAUSAL.take([range(1, 3), (5, 3)], [range(6)], q_len=6, kv_len=6)
    },
    "heads of a rank": lambda x: {
        "mask": masks.PerHead([masks.Full(), CAUSAL, masks.Columns(1)]).for_heads(1, 3)
    },
    "one for each head": lambda x: {"mask": masks.PerHead([CAUSAL, masks.Full()])},
    "documents": lambda x: {"mask": masks.Documents([2, 2], [3, 3], inside=CAUSAL)},
    "padding of a size": lambda x: {"mask": masks.Padding([x.shape[1]])},
    "text": lambda x: {"mask": masks.parse("Causal() & SlidingWindow(2)")},
    "text that is given": lambda x: {"mask": "Causal()", "pse": "ALiBi(2)"},
    "slopes": lambda x: {"pse": pse.ALiBi([0.5, 0.25], align="top_left")},
    "a sum": lambda x: {"pse": ALIBI + KEYS},
    "a sum of new ones": lambda x: {"pse": pse.ALiBi(2) + pse.SqrtALiBi(2)},
}

# What reads a tensor is not.
READ = {
    "numbers of documents": lambda x: {
        "mask": masks.Documents.from_ids(torch.arange(6) // 3)[2:, :]
    },
    "cumulative lengths": lambda x: {
        "mask": masks.Documents.from_cu_seqlens(torch.tensor([0, 1, 4]), torch.tensor([0, 3, 6]))
    },
    "a tokenizer's mask": lambda x: {"mask": masks.Padding.of(torch.ones(1, 6))},
    "numbers of images": lambda x: {"mask": masks.Spans.of(torch.arange(6) // 3)},
    "cells": lambda x: {"mask": masks.Dense.keep(torch.ones(4, 6).tril().bool())},
    "a function": lambda x: {"mask": masks.Predicate(lambda b, h, i, j: i >= j)},
    "a bias of the input": lambda x: {"pse": pse.KeyBias(x[0, :, 0, 0])},
}
MADE = {**WRITTEN, **READ, "an inversion": lambda x: {"mask": CAUSAL & ~masks.Columns(1, 2)}}


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def attend(x, make):
    return ak.attention(x[:, :4], x, x, **make(x))


@pytest.mark.parametrize("made", MADE)
def test_what_is_made_in_a_compiled_function_is_real(made):
    x = torch.randn(1, 6, 2, 8, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(lambda x: attend(x, MADE[made]), backend="eager")
    torch.testing.assert_close(compiled(x), attend(x, MADE[made]))


@pytest.mark.parametrize("made", WRITTEN)
def test_one_graph_makes_it(made):
    x = torch.randn(1, 6, 2, 8, generator=torch.Generator().manual_seed(1))
    counter = CompileCounter()
    compiled = torch.compile(lambda x: attend(x, WRITTEN[made]), backend=counter, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), attend(x, WRITTEN[made]))
    assert counter.frame_count == 1


@pytest.mark.parametrize("made", READ)
def test_one_graph_says_where_to_make_it(made):
    x = torch.randn(1, 6, 2, 8)
    compiled = torch.compile(lambda x: attend(x, READ[made]), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="made outside of compiled code"):
        compiled(x)


def test_masks_of_the_call_and_of_the_graph_are_one_graph():
    """Composed of what is new in each step, with gradients, also of a bias that is added."""
    counter = CompileCounterWithBackend("aot_eager")

    def call(x, mask, bias):
        layout = CAUSAL & mask | masks.Columns(0, 1)
        return ak.attention(x, x, x, mask=layout, pse=bias + ALIBI)

    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for step in range(4):
        x, weight = (torch.randn(*s, requires_grad=True) for s in ((2, 6, 2, 8), (6,)))
        given = masks.Padding([3 + step % 3, 6 - step]), pse.KeyBias(weight)
        outputs = [form(x, *given) for form in (compiled, call)]
        slopes = [torch.autograd.grad(y.square().sum(), (x, weight)) for y in outputs]
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*slopes)
    assert counter.frame_count == 1


@pytest.mark.parametrize("make", [lambda: pse.T5Relative(2), lambda: pse.ALiBi(2, learnable=True)])
def test_parameters_are_not_made_in_each_step(make):
    compiled = torch.compile(lambda x: attend(x, lambda x: {"pse": make()}), backend="eager")
    with pytest.raises(ak.CompositionError, match="made outside of compiled code"):
        compiled(torch.randn(1, 6, 2, 8))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: masks.SlidingWindow(0), "SlidingWindow"),
        (lambda: masks.Causal() & masks.Documents([2, 9]), "q_len"),
        (lambda: masks.Padding([1], sid="left"), "side"),
    ],
)
def test_what_is_wrong_is_told_when_it_runs(make, told):
    compiled = torch.compile(lambda x: ak.attention(x, x, x, mask=make()), backend="eager")
    with pytest.raises(ak.CompositionError, match=told):
        compiled(torch.randn(1, 6, 2, 8))


def test_a_mask_that_leaves_the_graph_is_one():
    x = torch.randn(1, 6, 2, 8)
    made, bias = torch.compile(
        lambda m: (m & masks.SlidingWindow(3), ALIBI + KEYS), backend="eager", fullgraph=True
    )(CAUSAL)
    meant = {"mask": CAUSAL & masks.SlidingWindow(3), "pse": ALIBI + KEYS}
    assert torch.equal(ak.attention(x, x, x, mask=made, pse=bias), ak.attention(x, x, x, **meant))
    assert (made | masks.Columns(0, 1)).region(6, 6) == (
        meant["mask"] | masks.Columns(0, 1)
    ).region(6, 6)
    with pytest.raises(ak.CompositionError, match="inside of a compiled function"):
        made.region(6, 6)
    with pytest.raises(ak.CompositionError, match="inside of a compiled function"):
        bias.materialize(6, 6)
