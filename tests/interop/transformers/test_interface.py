"""Every keyword that a model passes is honoured, known to mean nothing here, or an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from attnkit import masks
from attnkit.errors import CompositionError
from attnkit.interop.transformers import enable, expect, report
from attnkit.interop.transformers.interface import attend
from attnkit.interop.transformers.keywords import HONOURED, RESTATED
from attnkit.interop.transformers.lifting import make_mask
from attnkit.interop.transformers.mask_tensor import MaskTensor
from attnkit.masks import Lifted
from tests.interop.transformers.models import pair

F64 = torch.float64


class Layer(nn.Module):
    """An attention module as the interface sees it."""


def tensors(q_len: int = 7, kv_len: int = 7, batch: int = 2, value: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = ((4, q_len, 8), (2, kv_len, 8), (2, kv_len, value))
    return [torch.randn(batch, *size, dtype=F64) for size in sizes]


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention as the eager functions of transformers write it; rows without keys give 0."""
    key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if kept is not None:
        scores = scores.masked_fill(~kept, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]].nan_to_num(0.0)
    return (weights @ value).transpose(1, 2), weights


def given(mask: masks.Mask, q_len: int = 7, kv_len: int = 7, batch: int = 2) -> MaskTensor:
    return MaskTensor(Lifted(mask, "a test"), (batch, 1, q_len, kv_len), F64)


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sink", [None, "head", "token"])
@pytest.mark.parametrize("bias", [None, (1, 4, 7, 7), (2, 4, 7, 7), (1, 1, 7, 7)])
def test_terms_together(
    scaling: float | None, softcap: float | None, sink: str | None, bias: tuple[int, ...] | None
) -> None:
    query, key, value = tensors(value=6)
    extra: dict[str, Any] = {"scaling": scaling, "softcap": softcap}
    logits = {
        None: None,
        "head": torch.randn(1, 4, 1, 1, dtype=F64),
        "token": torch.randn(2, 4, 7, 1, dtype=F64),
    }[sink]
    added = None if bias is None else torch.randn(bias, dtype=F64)
    mask = masks.SlidingWindow(3) & masks.Padding((7, 4))
    wanted, weights = formula(
        query, key, value, mask.materialize(7, 7, 2), bias=added, sink=logits, **extra
    )
    if sink == "head":
        extra["s_aux"] = logits.flatten()
    if sink == "token":
        extra["sinks"] = logits
    call = (Layer().eval(), query, key, value, given(mask))
    near(attend(*call, position_bias=added, **extra)[0], wanted)
    output, seen = attend(*call, position_bias=added, output_attentions=True, **extra)
    near(output, wanted)
    near(seen, weights)


def test_gradients_reach_a_sink_of_each_query() -> None:
    query, key, value = tensors()
    sink = torch.randn(2, 4, 7, 1, dtype=F64, requires_grad=True)
    mask = masks.Causal()
    grads = []
    for output in (
        attend(Layer(), query, key, value, given(mask), sinks=sink)[0],
        formula(query, key, value, mask.materialize(7, 7), sink=sink)[0],
    ):
        grads.append(torch.autograd.grad((output**2).sum(), sink)[0])
    near(*grads)


def test_masks_of_every_form() -> None:
    query, key, value = tensors(5, 7)
    mask = masks.Causal() & masks.Padding((7, 4))
    kept = mask.materialize(5, 7, 2)
    bias = torch.randn(2, 1, 5, 7, dtype=F64)
    least = torch.finfo(F64).min
    wanted = formula(query, key, value, kept)[0]
    layer = Layer().eval()
    near(attend(layer, query, key, value, kept)[0], wanted)
    for masked in (least, -torch.inf):
        near(
            attend(
                layer,
                query,
                key,
                value,
                kept.new_zeros(kept.shape, dtype=F64).masked_fill(~kept, masked),
            )[0],
            wanted,
        )
    near(
        attend(layer, query, key, value, bias.masked_fill(~kept, least))[0],
        formula(query, key, value, kept, bias=bias)[0],
    )
    near(attend(layer, query, key, value, None)[0], formula(query, key, value)[0])
    longer = given(masks.Causal(align="top_left"), 5, 9)
    near(
        attend(layer, query, key, value, longer)[0],
        formula(query, key, value, masks.Causal(align="top_left").materialize(5, 7))[0],
    )
    one_row = given(masks.Padding((7, 4)), 1, 7)
    near(
        attend(layer, query, key, value, one_row)[0],
        formula(query, key, value, masks.Padding((7, 4)).materialize(5, 7, 2))[0],
    )
    with pytest.raises(CompositionError, match="5 queries and 7 keys"):
        attend(layer, query, key, value, given(masks.Full(), 5, 6))
    with pytest.raises(CompositionError, match=r"shape \[2, 1, 5, 6\]"):
        attend(layer, query, key, value, bias[..., :6])


def test_a_batch_of_one_serves_all() -> None:
    query, key, value = tensors()
    near(attend(Layer(), query[:1], key, value, None)[0], formula(query[:1], key, value)[0])
    near(attend(Layer(), query, key[:1], value[:1], None)[0], formula(query, key[:1], value[:1])[0])


def test_keys_that_an_indexer_chooses() -> None:
    query, key, value = tensors()
    chosen = torch.stack([torch.randperm(7)[:3] for _ in range(14)]).view(2, 7, 3)
    kept = torch.zeros(2, 1, 7, 7).bool().scatter_(-1, chosen[:, None], True)
    mask = masks.Causal()
    wanted = formula(query, key, value, kept & mask.materialize(7, 7))[0]
    near(attend(Layer(), query, key, value, given(mask), indices=chosen.int())[0], wanted)


def test_blocks_that_an_indexer_chooses() -> None:
    query, key, value = tensors()
    layer = Layer()
    layer.indexer = nn.Module()
    layer.indexer.block_size = 2
    blocks = torch.tensor([[0, 2, -1], [1, -1, -1], [3, 0, 1]]).repeat(2 * 2 * 7, 1)[: 2 * 2 * 7]
    blocks = blocks.view(2, 2, 7, 3)
    kept = torch.zeros(2, 4, 7, 7).bool()
    for b, g, i, k in torch.cartesian_prod(*(torch.arange(n) for n in (2, 2, 7, 3))).tolist():
        block = int(blocks[b, g, i, k])
        if block >= 0:
            kept[b, 2 * g : 2 * g + 2, i, 2 * block : 2 * block + 2] = True
    wanted = formula(query, key, value, kept)[0]
    near(attend(layer, query, key, value, None, block_indices=blocks)[0], wanted)
    with pytest.raises(CompositionError, match="block_size"):
        attend(Layer(), query, key, value, None, block_indices=blocks)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_packed_sequences(causal: bool, window: int | None) -> None:
    query, key, value = tensors(9, 9, batch=1)
    totals = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    inside = masks.Causal() if causal else masks.Full()
    if window is not None:
        inside = masks.SlidingWindow(window) if causal else masks.Band(window - 1, window - 1)
    mask = masks.Documents([4, 0, 5], inside=inside)
    wanted = formula(query, key, value, mask.materialize(9, 9))[0]
    layer = Layer()
    both = {"cu_seq_lens_q": totals, "cu_seq_lens_k": totals}
    many = {**both, "max_length_q": 5, "max_length_k": 5}
    found = attend(layer, query, key, value, None, is_causal=causal, sliding_window=window, **many)
    near(found[0], wanted)
    near(attend(layer, query, key, value, given(inside, 9, 9, 1), **many)[0], wanted)
    with pytest.raises(CompositionError, match="without cu_seq_lens_k"):
        attend(layer, query, key, value, None, cu_seq_lens_q=totals)
    with pytest.raises(CompositionError, match="packed sequences are one batch element"):
        attend(layer, query[..., :8, :], key, value, given(inside, 8, 9, 1), **both)


def test_causal_by_a_flag_alone() -> None:
    query, key, value = tensors()
    wanted = formula(query, key, value, masks.Causal().materialize(7, 7))[0]
    near(attend(Layer(), query, key, value, None, is_causal=True)[0], wanted)
    with pytest.raises(CompositionError, match="does not say which keys"):
        attend(Layer(), query[:, :, :5], key, value, None, is_causal=True)


def test_what_is_not_known_is_an_error() -> None:
    query, key, value = tensors()
    with pytest.raises(CompositionError, match=r"Layer passes alibi=2 .*not known|does not know"):
        attend(Layer(), query, key, value, None, alibi=2)
    attend(Layer(), query, key, value, None, alibi=None)  # None asks for nothing
    with pytest.raises(CompositionError, match="paged cache"):
        attend(Layer(), query, key, value, None, cache=object())
    with pytest.raises(CompositionError, match="s_aux has shape"):
        attend(Layer(), query, key, value, None, s_aux=torch.zeros(3))
    with pytest.raises(CompositionError, match="new_kind"):
        make_mask(1, 2, 2, 0, 0, lambda b, h, i, j: j <= i, None, new_kind=1)
    model = pair("llama")[1]
    enable(model)
    with pytest.raises(CompositionError, match="leave it out"):
        model(**pair("llama")[2], temperature=2.0)


def test_every_keyword_of_the_installed_models_is_known() -> None:
    """Read off their sources: what they pass to the attention function by name."""
    known = {*HONOURED, *RESTATED, "attention_mask", "scaling", "dropout", "query", "key", "value"}
    folder = Path(transformers.__file__).parent / "models"
    unknown = set()
    for file in folder.glob("*/modeling_*.py"):
        for call in re.findall(r"= attention_interface\((.*?)\n\s*\)\n", file.read_text(), re.S):
            for name in re.findall(r"^\s*(\w+)=(?!=)", call, re.M):
                unknown |= {name} - known
    assert not unknown


def test_weights_are_said_to_be_computed_apart() -> None:
    query, key, value = tensors()
    layer = Layer()
    attend(layer, query, key, value, None, output_attentions=True)
    assert "attention weights computed apart" in str(report(layer))


def test_none_only_where_eager_attention_has_none() -> None:
    every = torch.ones(2, 4).bool()
    some = every.clone()
    some[1, 2:] = False
    both_ways = transformers.masking_utils.bidirectional_mask_function
    causal = transformers.masking_utils.causal_mask_function
    for exists in (None, every, some):
        for skip in (False, True):
            made = make_mask(2, 4, 4, 0, 0, both_ways, exists, allow_is_bidirectional_skip=skip)
            assert (made is None) == (skip and exists is not some)
        hints = {"allow_is_causal_skip": True, "allow_is_bidirectional_skip": False}
        assert make_mask(2, 4, 4, 0, 0, causal, exists, **hints) is not None


def test_a_mask_function_that_is_not_known_is_told_by_name() -> None:
    def every_other(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i - j) % 2 == 0

    query, key, value = tensors()
    layer = Layer()
    made = make_mask(2, 7, 7, 0, 0, every_other, None, F64)
    kept = torch.arange(7)[:, None] % 2 == torch.arange(7) % 2
    near(attend(layer, query, key, value, made)[0], formula(query, key, value, kept)[0])
    assert "every_other is not known, and was read cell by cell" in str(report(layer))
    with pytest.raises(CompositionError, match="every_other"):
        expect(layer, sets=True)
