"""Core attention as Megatron-core 0.16.1 and MindSpeed call it, against their formula."""

from __future__ import annotations

import copy
import enum
import inspect
import itertools
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.interop.megatron import CoreAttention


class AttnMaskType(enum.Enum):
    """As in megatron/core/transformer/enums.py."""

    padding = 1
    causal = 2
    no_mask = 3
    padding_causal = 4
    arbitrary = 5


@dataclass
class Config:
    """The fields of `TransformerConfig` that core attention reads."""

    num_attention_heads: int = 4
    attention_dropout: float = 0.0
    context_parallel_size: int = 1
    window_size: tuple[int, int] | None = None
    window_attn_skip_freq: int | list[int] | None = None
    softmax_type: str = "vanilla"
    params_dtype: torch.dtype = torch.float64
    perform_initialization: bool = True

    def init_method(self, tensor: Tensor) -> Tensor:
        return nn.init.normal_(tensor)


@dataclass
class PackedSeqParams:
    """As in megatron/core/packed_seq_params.py."""

    qkv_format: str
    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor
    cu_seqlens_q_padded: Tensor | None = None
    cu_seqlens_kv_padded: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_kv: int | None = None
    local_cp_size: int | None = None


def core(kind: str, number: int = 1, **fields: Any) -> CoreAttention:
    torch.manual_seed(1)
    return CoreAttention(Config(**fields), number, AttnMaskType[kind], "self")


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropped: Tensor | None,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """``DotProductAttention.forward`` without buffers: True in `dropped` is masked out."""
    group = query.shape[2] // key.shape[2]
    key, value = (t.repeat_interleave(group, 2) for t in (key, value))
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) * query.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    scores = scores if dropped is None else scores.masked_fill(dropped, -torch.inf)
    if offset is not None:
        column = offset.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[0]]
    return torch.einsum("bnst,tbnd->sbnd", weights, value).flatten(2)


def heads(length: int = 6, keys: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = (length, 2, 4, 8), (length, 2, keys, 8), (length, 2, keys, 8)
    query, key, value = (torch.randn(*size, dtype=torch.float64) for size in sizes)
    return query, key, value


def window(length: int, left: int, right: int) -> Tensor:
    """What ``get_sliding_window_causal_mask`` drops."""
    kept = torch.ones(length, length).triu(-left).tril(right)
    return ~kept.bool()


PADDING = torch.zeros(2, 1, 1, 6).bool()
PADDING[0, ..., 4:] = True
ANY = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.6
ANY[..., 0] = False


@pytest.mark.parametrize(
    ("kind", "windowed", "biased", "softmax"),
    list(
        itertools.product(
            AttnMaskType.__members__,
            (False, True),
            (False, True),
            ("vanilla", "off-by-one", "learnable"),
        )
    ),
)
def test_every_kind_of_mask(kind: str, windowed: bool, biased: bool, softmax: str) -> None:
    query, key, value = heads()
    causal = "causal" in kind
    layer = core(
        kind, softmax_type=softmax, window_size=(2, 0 if causal else 1) if windowed else None
    )
    given = {"padding": PADDING, "padding_causal": PADDING, "arbitrary": ANY}.get(kind)
    dropped = torch.zeros(6, 6).bool() if given is None else given
    if causal:
        dropped = dropped | window(6, 6, 0)
    if windowed:
        dropped = dropped | window(6, 2, 1)
    bias = torch.randn(1, 4, 6, 6, dtype=torch.float64, requires_grad=True) if biased else None
    tensors = [query.requires_grad_(), *layer.parameters(), *([] if bias is None else [bias])]
    grads = []
    for output in (
        layer(query, key, value, given, attention_bias=bias),
        formula(query, key, value, dropped, bias, layer.softmax_offset),
    ):
        rows = output.nan_to_num(0.0)
        grads.append([rows, *torch.autograd.grad(rows.square().sum(), tensors)])
    for found, right in zip(*grads, strict=True):
        torch.testing.assert_close(found, right.nan_to_num(0.0))


def test_the_type_of_a_call_stands_for_that_of_the_layer() -> None:
    query, key, value = heads()
    found = core("causal")(query, key, value, None, AttnMaskType.no_mask)
    torch.testing.assert_close(found, formula(query, key, value, None))
    causal = core("no_mask")(query, key, value, None, attn_mask_type=AttnMaskType.causal)
    torch.testing.assert_close(causal, formula(query, key, value, window(6, 6, 0)))


@pytest.mark.parametrize("apart", [False, True])
def test_packed_documents(apart: bool) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(9, 4, 8, dtype=torch.float64), torch.randn(9, 2, 8).double()
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    again = ends.clone() if apart else ends
    params = PackedSeqParams("thd", ends, again, again, again)
    for kind in ("causal", "padding_causal", "padding", "no_mask"):
        found = core(kind)(query, key, key, None, packed_seq_params=params)
        assert found.shape == (9, 32)
        for start, stop in ((0, 4), (4, 9)):
            q, k = query[start:stop, None], key[start:stop, None]
            dropped = window(stop - start, 9, 0) if "causal" in kind else None
            torch.testing.assert_close(found[start:stop], formula(q, k, k, dropped)[:, 0])


def test_layers_that_have_no_window() -> None:
    every = [core("causal", n, window_size=(3, 0), window_attn_skip_freq=2) for n in (1, 2, 3)]
    assert [one.window_size for one in every] == [(3, 0), (-1, -1), (3, 0)]
    named = [core("causal", n, window_size=(3, 0), window_attn_skip_freq=[0, 1]) for n in (1, 2)]
    assert [one.window_size for one in named] == [(-1, -1), (3, 0)]


def test_dropout_acts_in_training_alone() -> None:
    layer, (query, key, value) = core("causal", attention_dropout=0.5), heads(32)
    right = formula(query, key, value, window(32, 32, 0))
    assert not torch.allclose(layer(query, key, value, None), right)
    torch.testing.assert_close(layer.eval()(query, key, value, None), right)
    assert CoreAttention(Config(), 1, AttnMaskType.causal, "self", 0.25).attention_dropout.p == 0.25


def test_state_copies_and_the_signature() -> None:
    layer = core("causal", softmax_type="learnable").to(torch.bfloat16)
    assert list(layer.state_dict()) == ["softmax_offset"]
    assert not core("causal", softmax_type="off-by-one").state_dict()
    query, key, value = (one.to(torch.bfloat16) for one in heads())
    right = layer(query, key, value, None)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(query, key, value, None), right)
    said = inspect.signature(CoreAttention.forward).parameters.values()
    assert [(one.name, one.default) for one in said][4:] == [
        ("attention_mask", inspect.Parameter.empty),
        ("attn_mask_type", None),
        ("attention_bias", None),
        ("packed_seq_params", None),
    ]


def test_what_is_refused() -> None:
    query, key, value = heads()
    ends = torch.tensor([0, 6])
    cases: list[tuple[type[Exception], str, str, dict[str, Any]]] = [
        (CompositionTypeError, "attention_mask=None", "padding", {"attention_mask": None}),
        (CompositionTypeError, "True = dropped", "arbitrary", {"attention_mask": ANY.double()}),
        (CompositionTypeError, "AttnMaskType", "causal", {"attn_mask_type": "causal"}),
        (
            CompositionError,
            "of format thd",
            "causal",
            {"packed_seq_params": PackedSeqParams("sbhd", ends, ends)},
        ),
        (
            CompositionError,
            "gaps between them",
            "causal",
            {"packed_seq_params": PackedSeqParams("thd", ends, ends, ends + 1)},
        ),
        (
            CompositionError,
            "local_cp_size=2",
            "causal",
            {"packed_seq_params": PackedSeqParams("thd", ends, ends, local_cp_size=2)},
        ),
    ]
    for kind, told, of, named in cases:
        with pytest.raises(kind, match=told):
            core(of)(query, key, value, **{"attention_mask": None, **named})
    with pytest.raises(CompositionError, match="which of them are last"):
        core("causal")(query[:2], key, value, None)
    with pytest.raises(CompositionError, match="context_parallel_size=2"):
        core("causal", context_parallel_size=2)
    with pytest.raises(CompositionError, match="softmax_type='two'"):
        core("causal", softmax_type="two")
