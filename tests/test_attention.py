"""`Attention`, `attention` and `plan`: bad input, state, training, and what they return."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks, pse
from attnkit.errors import CompositionTypeError

BACKENDS = ("reference", "emulated")


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape or (2, 6, 4, 8), dtype=dtype)


# -- bad input ------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "rank": (
        lambda: ak.attention(x(6, 8), x(6, 8), x(6, 8)),
        ak.CompositionError,
        r"query \[6, 8\] in layout BSND .*4 axes.*permute the tensor or name the layout",
    ),
    "tensor as a mask": (
        lambda: ak.attention(x(), x(), x(), mask=x(6, 6) > 0),  # type: ignore[arg-type]
        CompositionTypeError,
        r"mask=<tensor \[6, 6\] of torch.bool> is a Tensor; .*masks.Dense.keep\(t\)",
    ),
    "tensor as a bias": (
        lambda: ak.attention(x(), x(), x(), pse=x(6, 6)),  # type: ignore[arg-type]
        CompositionTypeError,
        r"pse=<tensor \[6, 6\] of torch.float32> is a Tensor; .*pse.Dense\(t\)",
    ),
    "a flag for the logits of a sink": (
        lambda: ak.attention(x(), x(), x(), sink=True),  # type: ignore[call-overload]
        CompositionTypeError,
        r"sink=True; .*logits.*\[4\]",
    ),
    "layout of another rank": (
        lambda: ak.attention(x(), x(), x(), layout="BSH", num_heads=4),
        ak.CompositionError,
        r"3 axes.*layouts of 4 axes: .*BSND",
    ),
    "unknown layout": (
        lambda: ak.attention(x(), x(), x(), layout="bsdn"),
        ak.CompositionError,
        r"unknown layout 'bsdn'; did you mean 'BSND'",
    ),
    "heads that do not divide": (
        lambda: ak.attention(x(), x(2, 6, 3, 8), x(2, 6, 3, 8)),
        ak.CompositionError,
        r"4 query heads do not divide .* 3 key heads.*multiple",
    ),
    "module heads that do not divide": (
        lambda: ak.Attention(4, 8, num_kv_heads=3),
        ak.CompositionError,
        r"num_heads=4 is not a multiple of num_kv_heads=3",
    ),
    "merged heads that do not divide": (
        lambda: ak.attention(x(2, 6, 30), x(2, 6, 30), x(2, 6, 30), layout="BSH", num_heads=4),
        ak.CompositionError,
        r"30 does not divide into num_heads=4",
    ),
    "merged heads that nobody counted": (
        lambda: ak.attention(x(2, 6, 32), x(2, 6, 32), x(2, 6, 32), layout="BSH"),
        ak.CompositionError,
        r"pass num_heads=",
    ),
    "head dims that differ": (
        lambda: ak.attention(x(), x(2, 6, 4, 6), x(2, 6, 4, 6)),
        ak.CompositionError,
        r"heads of 8 and 6 dimensions",
    ),
    "a module of another head_dim": (
        lambda: ak.Attention(4, 16)(x(), x(), x()),
        ak.CompositionError,
        r"built with head_dim=16",
    ),
    "a module of other heads": (
        lambda: ak.Attention(8, 8)(x(), x(), x()),
        ak.CompositionError,
        r"num_heads=8 was given, but the shape holds 4",
    ),
    "keys without values": (
        lambda: ak.attention(x(), x(), x(2, 5, 4, 8)),
        ak.CompositionError,
        r"key has 6 positions and value 5",
    ),
    "batches that would broadcast": (
        lambda: ak.attention(x(), x(1, 6, 4, 8), x(1, 6, 4, 8)),
        ak.CompositionError,
        r"batch sizes are 2, 1, 1; nothing is broadcast",
    ),
    "mixed dtypes": (
        lambda: ak.attention(x(), x().half(), x()),
        CompositionTypeError,
        r"key torch.float16 on cpu.*cast them to one dtype",
    ),
    "mixed devices": (
        lambda: ak.attention(x(), x().to("meta"), x()),
        ak.CompositionError,
        r"key torch.float32 on meta.*move them to one device",
    ),
    "integers": (
        lambda: ak.attention(*(x().long() for _ in "qkv")),
        CompositionTypeError,
        r"dtype torch.int64.*cast the inputs",
    ),
    "None": (lambda: ak.attention(x(), None, x()), CompositionTypeError, "key is a NoneType"),
    "None in a module": (
        lambda: ak.Attention(4, 8)(x(), x(), None),
        CompositionTypeError,
        "value is a NoneType",
    ),
    "numpy": (
        lambda: ak.Attention(4, 8)(np.zeros((2, 6, 4, 8)), x(), x()),
        CompositionTypeError,
        r"query is a ndarray; give a torch tensor",
    ),
    "packed without lengths": (
        lambda: ak.attention(*(x(6, 4, 8) for _ in "qkv"), layout="TND"),
        ak.CompositionError,
        r"seqlens=ak.SeqLens",
    ),
    "lengths that do not sum": (
        lambda: ak.attention(
            *(x(6, 4, 8) for _ in "qkv"), layout="TND", seqlens=ak.SeqLens([2, 3])
        ),
        ak.CompositionError,
        r"sum to 5, but query holds 6 tokens",
    ),
    "running totals for lengths": (
        lambda: ak.attention(
            *(x(6, 4, 8) for _ in "qkv"), layout="TND", seqlens=ak.SeqLens([2, 6])
        ),
        ak.CompositionError,
        r"from_cu_seqlens",
    ),
    "a bare list of lengths": (
        lambda: ak.Attention(4, 8, layout="TND")(*(x(6, 4, 8) for _ in "qkv"), seqlens=[6]),
        CompositionTypeError,
        r"wrap the lengths as SeqLens",
    ),
    "lengths with a batch axis": (
        lambda: ak.attention(x(), x(), x(), seqlens=ak.SeqLens([6])),
        ak.CompositionError,
        r"takes no seqlens; use layout='TND'",
    ),
    "a mask for other lengths": (
        lambda: ak.attention(x(), x(), x(), mask=masks.Documents([3, 4])),
        ak.CompositionError,
        r"built for q_len=7, but the score matrix has q_len=6",
    ),
    "a mask for another batch": (
        lambda: ak.attention(x(), x(), x(), mask=masks.Padding([6, 6, 6])),
        ak.CompositionError,
        r"tells 3 batch elements apart, but there are 2",
    ),
    "a mask for other heads": (
        lambda: ak.Attention(4, 8, mask=masks.PerHead([masks.Causal()] * 3)),
        ak.CompositionError,
        r"made for 3 heads, but num_heads=4",
    ),
    "a boolean tensor for a mask": (
        lambda: ak.attention(x(), x(), x(), mask=torch.ones(6, 6).bool()),
        CompositionTypeError,
        r"masks.Dense.keep\(t\).*masks.Dense.drop\(t\)",
    ),
    "a boolean tensor at call time": (
        lambda: ak.Attention(4, 8)(x(), x(), x(), mask=torch.ones(6, 6).bool()),
        CompositionTypeError,
        r"masks.Dense.keep\(t\)",
    ),
    "a tensor for a bias": (
        lambda: ak.attention(x(), x(), x(), pse=torch.ones(6, 6)),
        CompositionTypeError,
        r"pse.Dense\(t\)",
    ),
    "slopes of the wrong size": (
        lambda: ak.attention(x(), x(), x(), pse=pse.ALiBi(slopes=(0.5, 0.25))),
        ak.CompositionError,
        r"made for 2 heads, but the query has 4; give it one per query head",
    ),
    "slopes of the wrong size in a module": (
        lambda: ak.Attention(4, 8, pse=pse.ALiBi(2)),
        ak.CompositionError,
        r"made for 2 heads, but num_heads=4",
    ),
    "a bias for other lengths": (
        lambda: ak.attention(x(), x(), x(), pse=pse.Dense(torch.zeros(4, 5, 6))),
        ak.CompositionError,
        r"5 x 6 .*but this one is 6 x 6",
    ),
    "a bias elsewhere": (
        lambda: ak.attention(x(), x(), x(), pse=pse.Dense(torch.zeros(6, 6, device="meta"))),
        ak.CompositionError,
        r"is on meta, the query on cpu; move it there",
    ),
    "a sink of the wrong size": (
        lambda: ak.attention(x(), x(), x(), sink=torch.zeros(3)),
        ak.CompositionError,
        r"sink \[3\].*one logit per query head, \[4\]",
    ),
    "a sink of integers": (
        lambda: ak.attention(x(), x(), x(), sink=torch.zeros(4, dtype=torch.int64)),
        CompositionTypeError,
        r"sink is of type torch.int64",
    ),
    "a sink elsewhere": (
        lambda: ak.attention(x(), x(), x(), sink=torch.zeros(4, device="meta")),
        ak.CompositionError,
        r"sink is on meta",
    ),
    "a sink tensor for the module's flag": (
        lambda: ak.Attention(4, 8, sink=torch.zeros(4)),
        CompositionTypeError,
        r"True or False \(True for a learnable logit per head",
    ),
    "no heads": (lambda: ak.Attention(0, 8), ak.CompositionError, r"num_heads=0 is too small"),
    "half a head": (
        lambda: ak.Attention(4, 8.0),
        CompositionTypeError,
        r"head_dim=8.0 is of type float",
    ),
    "an empty window": (
        lambda: ak.Attention(4, 8, mask=masks.SlidingWindow(0)),
        ak.CompositionError,
        r"empty window",
    ),
}


def _number(name: str, value: object, kind: type[Exception], text: str) -> None:
    def build() -> object:
        return ak.Attention(4, 8, **{name: value})

    BAD[f"{name}={value}"] = (build, kind, text)


_number("scale", float("nan"), ak.CompositionError, r"scale=nan is out of range.*finite")
_number("scale", float("inf"), ak.CompositionError, r"scale=inf is out of range.*finite")
_number("scale", "0.5", CompositionTypeError, r"scale='0.5' is of type str")
_number("dropout", 1.0, ak.CompositionError, r"dropout=1.0 is out of range.*below 1")
_number("dropout", -0.1, ak.CompositionError, r"dropout=-0.1 is out of range.*at least 0")
_number("dropout", -1e-320, ak.CompositionError, r"out of range")
_number("dropout", float("nan"), ak.CompositionError, r"out of range")
_number("dropout", True, CompositionTypeError, r"dropout=True is of type bool")
_number("dropout", None, CompositionTypeError, r"dropout=None is of type NoneType")
_number("softcap", 0, ak.CompositionError, r"softcap=0 is out of range.*above 0")
_number("softcap", float("inf"), ak.CompositionError, r"softcap=inf is out of range")


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_clear_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, kind, text = BAD[name]
    # Before any computation: no backend may be reached.
    monkeypatch.setattr("attnkit.attend.run_plan", lambda *_: pytest.fail("it ran"))
    with pytest.raises(kind, match=rf"(?s){text}") as error:
        build()
    assert isinstance(error.value, ValueError)
    if kind is CompositionTypeError:
        assert isinstance(error.value, TypeError)


# -- results --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("layout", "shape", "out"),
    [
        ("BSND", (2, 6, 4, 8), (2, 6, 4, 5)),
        ("BNSD", (2, 4, 6, 8), (2, 4, 6, 5)),
        ("BSH", (2, 6, 32), (2, 6, 20)),
        ("SBH", (6, 2, 32), (6, 2, 20)),
        ("TND", (6, 4, 8), (6, 4, 5)),
    ],
)
def test_shapes_of_output_and_statistics(
    backend: str, layout: str, shape: tuple[int, ...], out: tuple[int, ...]
) -> None:
    q = x(*shape, dtype=torch.bfloat16)
    value = x(*(shape[:-1]), 5 if len(out) == 4 or layout == "TND" else 20, dtype=torch.bfloat16)
    layer = ak.Attention(4, 8, mask=masks.Causal(), layout=layout, backend=backend)
    lens = ak.SeqLens([2, 4]) if layout == "TND" else None
    found = layer(q, q, value, seqlens=lens, return_stats=True)
    assert isinstance(found, ak.AttentionOutput)
    assert (found.output.shape, found.output.dtype) == (out, torch.bfloat16)
    rows = (6, 4) if layout == "TND" else (2, 4, 6)
    for stat in (found.stats.max, found.stats.sum, found.stats.lse):
        assert (stat.shape, stat.dtype) == (rows, torch.float32)
    assert torch.equal(layer(q, q, value, seqlens=lens), found.output)


def test_a_call_time_mask_is_intersected_and_a_bias_is_added() -> None:
    q = x()
    layer = ak.Attention(4, 8, mask=masks.Causal(), pse=pse.ALiBi(4))
    more = pse.SqrtALiBi(4)
    found = layer(q, q, q, mask=masks.Columns(2), pse=more)
    meant = ak.attention(q, q, q, mask=masks.Causal() & masks.Columns(2), pse=pse.ALiBi(4) + more)
    assert torch.equal(found, meant)
    assert not torch.equal(found, layer(q, q, q))
    assert layer.mask == masks.Causal()
    assert layer.pse == pse.ALiBi(4)
    bare = ak.Attention(4, 8)
    assert torch.equal(bare(q, q, q, pse=more), ak.attention(q, q, q, pse=more))


def test_the_module_equals_the_function() -> None:
    q, k = x(2, 6, 4, 8), x(2, 9, 2, 8)
    layer = ak.Attention(4, 8, num_kv_heads=2, mask=masks.SlidingWindow(3), scale=0.2, softcap=4)
    meant = ak.attention(q, k, k, mask=masks.SlidingWindow(3), scale=0.2, softcap=4.0)
    assert torch.equal(layer(q, k, k), meant)


def test_plans_and_reports_take_meta_tensors() -> None:
    q = x().to("meta")
    layer = ak.Attention(4, 8, mask=masks.SlidingWindow(3), sink=True, pse=pse.ALiBi(4))
    plan = layer.plan(q, q, q)
    assert plan.request.device == "meta"
    assert layer.explain(q, q, q) == plan.explain()
    assert ak.plan(q, q, q, backend="emulated").calls[0].query.shape == (2, 6, 4, 8)


def test_repr_names_what_is_not_a_default() -> None:
    text = repr(
        ak.Attention(
            4,
            8,
            num_kv_heads=2,
            mask=masks.Causal(),
            pse=pse.ALiBi(4),
            layout="BNSD",
            dropout=0.1,
            sink=True,
            softcap=30.0,
            scale=0.25,
        )
    )
    for part in (
        "num_heads=4",
        "head_dim=8",
        "num_kv_heads=2",
        "mask=Causal()",
        "pse=ALiBi(4)",
        "layout='BNSD'",
        "scale=0.25",
        "dropout=0.1",
        "softcap=30.0",
        "sink=True",
        "backend='auto'",
    ):
        assert part in text
    assert "scale" not in repr(ak.Attention(4, 8))


# -- training -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_the_module(backend: str) -> None:
    layer = ak.Attention(
        2, 3, num_kv_heads=1, mask=masks.SlidingWindow(3), pse=pse.ALiBi(2), sink=True,
        backend=backend,
    ).double()  # fmt: skip
    assert layer.sink is not None
    with torch.no_grad():
        layer.sink.normal_()
    q = x(1, 4, 2, 3, dtype=torch.float64).requires_grad_()
    k, v = (x(1, 5, 1, n, dtype=torch.float64).requires_grad_() for n in (3, 2))

    def run(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"sink": sink}, (q, k, v))

    assert torch.autograd.gradcheck(run, (q, k, v, layer.sink))


def test_a_learnable_bias_trains_with_the_module() -> None:
    table = nn.Parameter(torch.zeros(4, 6, 6))
    layer = ak.Attention(4, 8, pse=pse.Dense(table) + pse.ALiBi(4))
    q = x()
    layer(q, q, q).square().sum().backward()
    assert table.grad is not None
    assert table.grad.abs().sum() > 0
    assert dict(layer.named_parameters()) == {"pse_0_tensor": table}


def test_dropout_follows_the_mode_and_torchs_generator() -> None:
    q = x()
    for backend in BACKENDS:
        layer = ak.Attention(4, 8, dropout=0.5, backend=backend)
        torch.manual_seed(1)
        first, second = layer(q, q, q), layer(q, q, q)
        torch.manual_seed(1)
        assert torch.equal(layer(q, q, q), first)
        assert not torch.equal(first, second)
        layer.eval()
        plain = ak.attention(q, q, q, backend=backend)
        assert torch.equal(layer(q, q, q), plain)
        assert layer.plan(q, q, q).request.dropout == 0


@pytest.mark.parametrize("backend", ["tiled", "emulated", "reference"])
def test_a_sink_of_each_query_is_a_factor_of_the_output(backend: str) -> None:
    """As docs/guides/backends.md has it, against a softmax with one more column, of value 0."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, 4, 8, dtype=torch.float64).requires_grad_() for _ in range(3))
    sink, mask = torch.randn(2, 4, 9).double().requires_grad_(), masks.Causal() & masks.Rows(2, 9)
    output, stats = ak.attention(q, k, v, mask=mask, backend=backend, return_stats=True)
    found = output * torch.sigmoid(stats.lse - sink).transpose(1, 2).unsqueeze(-1)
    scores = 8**-0.5 * torch.einsum("bind,bjnd->bnij", q, k)
    scores = scores.masked_fill(~mask.materialize(9, 9), -torch.inf)
    weights = torch.cat([scores, sink[..., None]], -1).softmax(-1)[..., :-1]
    meant = torch.einsum("bnij,bjnd->bind", weights, v)
    grads = [torch.autograd.grad(t.sin().sum(), [q, k, v, sink]) for t in (found, meant)]
    torch.testing.assert_close(found, meant, atol=1e-12, rtol=0)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_freezing_and_unfreezing_is_seen() -> None:
    """A frozen bias goes to the kernel as it is; once it wants a gradient, a pass makes that."""
    q = x()
    layer = ak.Attention(4, 8, pse=pse.Dense(nn.Parameter(torch.zeros(4, 6, 6))))
    layer.backend = "emulated"
    layer.requires_grad_(False)
    assert layer.plan(q, q, q).bias_pass is None
    assert not layer(q, q, q).requires_grad
    layer.requires_grad_(True)
    assert layer.plan(q, q, q).bias_pass is not None
    layer(q, q, q).square().sum().backward()
    (table,) = layer.parameters()
    assert table.grad is not None
    assert table.grad.isfinite().all()
    with torch.no_grad():
        assert layer.plan(q, q, q).bias_pass is None
        layer(q, q, q)


# -- state ----------------------------------------------------------------------------------


def full_layer() -> ak.Attention:
    layer = ak.Attention(
        4,
        8,
        mask=masks.Causal(),
        pse=pse.Dense(nn.Parameter(torch.randn(4, 6, 6))) + pse.Dense(torch.randn(6, 6)),
        sink=True,
    )
    assert layer.sink is not None
    nn.init.normal_(layer.sink)
    return layer


def saved_and_loaded(layer: ak.Attention) -> ak.Attention:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), saved_and_loaded],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies_are_whole_and_their_own(duplicate: Callable[[ak.Attention], Any]) -> None:
    layer, q = full_layer(), x()
    meant = layer(q, q, q)
    twin = duplicate(layer)
    assert not twin._plans
    assert torch.equal(twin(q, q, q), meant)
    assert repr(twin) == repr(layer)
    with torch.no_grad():
        twin.pse_0_tensor.add_(1.0 + torch.rand_like(twin.pse_0_tensor))
        twin.sink.add_(1.0)
    assert not torch.equal(twin(q, q, q), meant)
    assert torch.equal(layer(q, q, q), meant)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign: bool) -> None:
    layer, other, q = full_layer(), full_layer(), x()
    state = layer.state_dict()
    assert sorted(state) == ["pse_0_tensor", "sink"]
    with torch.no_grad():
        # A fixed table is part of the definition, not the state.
        other.pse_1_tensor.copy_(layer.pse_1_tensor)
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other(q, q, q), layer(q, q, q))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_casting_takes_the_bias_and_the_sink_along(dtype: torch.dtype, backend: str) -> None:
    table = torch.randn(4, 6, 6)
    layer = ak.Attention(4, 8, pse=pse.Dense(table), sink=True, backend=backend).to(dtype)
    assert layer.sink is not None
    q = x(dtype=dtype).requires_grad_()
    out = layer(q, q, q)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert layer.sink.grad is not None
    assert layer.sink.grad.dtype == dtype
    assert layer.pse is not None
    assert layer.pse.tensors[0].dtype == dtype


def test_moving_through_meta_rebinds_the_bias() -> None:
    layer, q = full_layer(), x()
    meant, fixed = layer(q, q, q), layer.pse_1_tensor
    state = layer.state_dict()
    moved = layer.to("meta")
    assert moved.plan(*(t.to("meta") for t in (q, q, q))).request.sink
    moved.to_empty(device="cpu").load_state_dict(state)
    with torch.no_grad():
        moved.pse_1_tensor.copy_(fixed)
    assert torch.equal(moved(q, q, q), meant)


def test_functional_call_uses_the_tensors_it_is_given() -> None:
    layer, q = full_layer(), x()
    zero = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    meant = layer(q, q, q)
    found = torch.func.functional_call(layer, zero, (q, q, q))
    table = pse.Dense(zero["pse_0_tensor"]) + pse.Dense(layer.pse_1_tensor)
    assert torch.equal(
        found, ak.attention(q, q, q, mask=masks.Causal(), pse=table, sink=zero["sink"])
    )
    assert torch.equal(layer(q, q, q), meant)


# -- what is kept between calls -------------------------------------------------------------


def test_equal_calls_share_a_plan_and_new_lengths_do_not_pile_up() -> None:
    layer = ak.Attention(2, 4, mask=masks.Causal(), layout="TND")
    q = x(12, 2, 4)
    lens = ak.SeqLens([5, 7])
    assert layer.plan(q, q, q, seqlens=lens) is layer.plan(q, q, q, seqlens=ak.SeqLens([5, 7]))
    counts = []
    for last in (1, 2):  # two times as many plans, and no more are kept
        for n in range(1, 12 - last):
            for m in range(1, 12 - last - n + 1):
                layer.plan(q, q, q, seqlens=ak.SeqLens([n, m, 12 - last - n - m, last]))
        counts.append(len(layer._plans))
    assert counts[0] == counts[1]
    kept = layer.plan(q, q, q, seqlens=lens)
    for n in range(15):  # the one that is in use stays
        layer.plan(q, q, q, seqlens=ak.SeqLens([n % 11 + 1, 11 - n % 11]))
        assert layer.plan(q, q, q, seqlens=lens) is kept


def test_no_call_pins_its_tensors() -> None:
    import gc
    import weakref

    layer = ak.Attention(4, 8, mask=masks.Causal(), backend="emulated")
    q, table = x(), torch.zeros(4, 6, 6)
    gone = [weakref.ref(q), weakref.ref(table)]
    layer(q, q, q, pse=pse.Dense(table))
    del q, table
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
