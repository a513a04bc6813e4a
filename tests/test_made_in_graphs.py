"""Masks and biases that are made inside of a compiled function: real ones, outside of the graph."""

from __future__ import annotations

import pytest
import torch

import attnkit as ak
from attnkit import masks, pse

KEYS = pse.KeyBias(torch.arange(6.0))
ALIBI = pse.ALiBi(2)

MADE = {
    "an anchor": lambda x: {"mask": masks.Causal("top_left")},
    "a window": lambda x: {"mask": masks.SlidingWindow(3)},
    "an intersection": lambda x: {"mask": masks.Causal() & ~masks.Columns(1, 2)},
    "documents": lambda x: {"mask": masks.Documents([2, 2], [3, 3], inside=masks.Causal())},
    "numbers of documents": lambda x: {
        "mask": masks.Documents.from_ids(torch.arange(6) // 3)[2:, :]
    },
    "cumulative lengths": lambda x: {
        "mask": masks.Documents.from_cu_seqlens(torch.tensor([0, 1, 4]), torch.tensor([0, 3, 6]))
    },
    "a tokenizer's mask": lambda x: {"mask": masks.Padding.of(torch.ones(1, 6))},
    "numbers of images": lambda x: {"mask": masks.Spans.of(torch.arange(6) // 3)},
    "text": lambda x: {"mask": masks.parse("Causal() & SlidingWindow(2)")},
    "cells": lambda x: {"mask": masks.Dense.keep(torch.ones(4, 6).tril().bool())},
    "slopes": lambda x: {"pse": pse.ALiBi([0.5, 0.25], align="top_left")},
    "a sum": lambda x: {"pse": ALIBI + KEYS},
    "a sum of new ones": lambda x: {"pse": pse.ALiBi(2) + pse.SqrtALiBi(2)},
    "a bias of the input": lambda x: {"pse": pse.KeyBias(x[0, :, 0, 0])},
}


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


@pytest.mark.parametrize("made", MADE)
def test_one_graph_says_where_to_make_it(made):
    x = torch.randn(1, 6, 2, 8)
    compiled = torch.compile(lambda x: attend(x, MADE[made]), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="made outside of compiled code"):
        compiled(x)
