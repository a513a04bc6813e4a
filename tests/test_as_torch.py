"""Layers from `nn.MultiheadAttention` and back; values of other tokens, and a key of one's own."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks, pse
from attnkit.errors import CompositionError, CompositionTypeError

FLAGS = ("kdim", "vdim", "bias", "add_bias_kv", "add_zero_attn", "batch_first")
BUILDS = []
for flags in itertools.product((False, True), repeat=len(FLAGS)):
    built: dict[str, Any] = dict(zip(FLAGS, flags, strict=True))
    built |= {"kdim": 6 if built["kdim"] else None, "vdim": 10 if built["vdim"] else None}
    BUILDS.append(built)


def torchs(**built: Any) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(8, 2, dtype=torch.float64, **built)
    for tensor in theirs.parameters():
        nn.init.normal_(tensor, std=0.5)
    return theirs


def test_every_form_comes_over_and_goes_back() -> None:
    torch.manual_seed(0)
    for built in BUILDS:
        theirs = torchs(**built)
        ours = ak.MultiHeadAttention.from_torch(theirs)
        x = torch.randn(2, 3, 8, dtype=torch.float64)
        context = torch.randn(2, 4, built["kdim"] or 8, dtype=torch.float64)
        values = torch.randn(2, 4, built["vdim"] or 8, dtype=torch.float64)
        turned = (x, context, values)
        if not built["batch_first"]:
            turned = tuple(t.transpose(0, 1) for t in turned)
        right = theirs(*turned, need_weights=False)[0]
        right = right if built["batch_first"] else right.transpose(0, 1)
        torch.testing.assert_close(ours(x, context, values=values), right)
        again = ours.to_torch(batch_first=built["batch_first"])
        assert again.state_dict().keys() == theirs.state_dict().keys()
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name
        assert all(
            getattr(again, name) == getattr(theirs, name)
            for name in ("batch_first", "add_zero_attn", "kdim", "vdim", "_qkv_same_embed_dim")
        )


def test_modes_dropout_and_what_trains_come_over() -> None:
    theirs = torchs(dropout=0.25, add_bias_kv=True).eval()
    theirs.in_proj_weight.requires_grad_(False)
    theirs.bias_v.requires_grad_(False)
    ours = ak.MultiHeadAttention.from_torch(theirs, mask=masks.Causal(), backend="tiled")
    assert not ours.training
    assert ours.attention.composition.dropout == 0.25
    assert (ours.attention.mask, ours.attention.backend) == (masks.Causal(), "tiled")
    frozen = {name for name, one in ours.named_parameters() if not one.requires_grad}
    assert frozen == {"q_proj.weight", "k_proj.weight", "v_proj.weight", "extra_v"}
    zero = ak.MultiHeadAttention.from_torch(torchs(add_zero_attn=True))
    assert not zero.attention.sink.requires_grad
    assert zero.q_proj.weight.data_ptr() != theirs.in_proj_weight.data_ptr()


def test_one_bias_of_three_and_none_behind() -> None:
    layer = ak.MultiHeadAttention(8, 2, bias={"q"}, dtype=torch.float64)
    nn.init.normal_(layer.q_proj.bias)
    theirs, x = layer.to_torch(), torch.randn(2, 3, 8, dtype=torch.float64)
    assert theirs.out_proj.bias is None
    torch.testing.assert_close(theirs(x, x, x)[0], layer(x))
    only_out = ak.MultiHeadAttention(8, 2, bias={"out"}, dtype=torch.float64).to_torch()
    assert only_out.in_proj_bias is None


def test_what_torchs_has_no_place_for_is_listed() -> None:
    cases = {
        "num_kv_heads=1": {"num_kv_heads": 1},
        "head_dim=8": {"head_dim": 8},
        "v_head_dim=2": {"v_head_dim": 2},
        "norm of queries": {"qk_norm": "rms"},
        "gate": {"gate": "head"},
        "rotary": {"rotary": True},
        "mask=Causal": {"mask": masks.Causal()},
        "bias on scores": {"pse": pse.ALiBi(2)},
        "scale=1.0": {"scale": 1.0},
        "softcap": {"softcap": 5.0},
        "score_fn": {"score_fn": lambda score, b, h, i, j: score},
        "sink that is learned": {"sink": True},
    }
    for told, given in cases.items():
        with pytest.raises(CompositionError, match=f"no {told}"):
            ak.MultiHeadAttention(8, 2, **given).to_torch()
    layer = ak.MultiHeadAttention(8, 2)
    layer.q_proj = nn.Identity()
    with pytest.raises(CompositionError, match=r"projection but nn.Linear"):
        layer.to_torch()
    with pytest.raises(CompositionTypeError, match="give a MultiheadAttention"):
        ak.MultiHeadAttention.from_torch(nn.Linear(8, 8))


class TestValues:
    """Values of other tokens than keys, as where positions join queries and keys alone."""

    def test_are_projected_in_place_of_the_keys(self) -> None:
        torch.manual_seed(0)
        layer = ak.MultiHeadAttention(16, 2, v_dim=6, mask=masks.Causal(), dtype=torch.float64)
        x, values = torch.randn(2, 5, 16).double(), torch.randn(2, 5, 6).double()
        heads = [
            t.view(2, 5, 2, 8) for t in (layer.q_proj(x), layer.k_proj(x), layer.v_proj(values))
        ]
        right = layer.out_proj(ak.attention(*heads, mask=masks.Causal()).flatten(-2))
        torch.testing.assert_close(layer(x, values=values), right)
        assert layer.plan(x, values=values).request.kv_len == 5
        cache = ak.KVCache()
        with torch.no_grad():
            steps = [
                layer(a, values=b, cache=cache)
                for a, b in zip(x.split(2, 1), values.split(2, 1), strict=True)
            ]
        torch.testing.assert_close(torch.cat(steps, 1), right)
        packed = layer(x.flatten(0, 1), values=values.flatten(0, 1), seqlens=ak.SeqLens([5, 5]))
        torch.testing.assert_close(packed.view(2, 5, 16), right)

    def test_of_a_context_are_kept_with_it(self) -> None:
        layer = ak.MultiHeadAttention(16, 2, kv_dim=4, v_dim=6)
        x, context, values = torch.randn(2, 3, 16), torch.randn(2, 5, 4), torch.randn(2, 5, 6)
        cache = ak.KVCache()
        right = layer(x, context, values=values)
        with torch.no_grad():
            first = layer(x[:, :2], context, values=values, cache=cache)
            second = layer(x[:, 2:], cache=cache)
            torch.testing.assert_close(torch.cat([first, second], 1), right)
            with pytest.raises(CompositionError, match="give them with the context"):
                layer(x[:, 2:], values=values, cache=cache)

    def test_that_do_not_fit(self) -> None:
        layer, x = ak.MultiHeadAttention(16, 2, v_dim=6), torch.randn(2, 3, 16)
        cases: list[tuple[str, Tensor | None]] = [
            (r"pass values=\[..., 6\]", None),
            (r"the module was built with v_dim=6", x),
            (r"each key has one value", torch.randn(2, 4, 6)),
        ]
        for told, values in cases:
            with pytest.raises(CompositionError, match=told):
                layer(x, values=values)


class TestExtraKey:
    """A key of the layer's own, against one more key that a mask lets every query see."""

    def longer(self, layer: ak.MultiHeadAttention, x: Tensor, mask: masks.Mask) -> Tensor:
        q, k, v = (
            getattr(layer, f"{name}_proj")(x).unflatten(-1, (-1, 8)) for name in ("q", "k", "v")
        )
        length = x.shape[1]
        k, v = (
            torch.cat([t, own.expand(len(x), 1, -1, -1)], 1)
            for t, own in ((k, layer.extra_k), (v, layer.extra_v))
        )
        cells = torch.ones(length, length + 1).bool()
        cells[:, :-1] = mask.materialize(length, length)[0, 0]
        found = ak.attention(q, k, v, mask=masks.Dense.keep(cells), sink=layer.attention.sink)
        return layer.out_proj(found.flatten(-2))

    @pytest.mark.parametrize("sink", [False, True])
    @pytest.mark.parametrize("kv_heads", [1, 2])
    def test_equals_a_key_in_the_sequence_with_gradients(self, sink: bool, kv_heads: int) -> None:
        torch.manual_seed(0)
        mask = masks.Causal(align="top_left") - masks.Rows(1, 2)  # a row that sees nothing else
        layer = ak.MultiHeadAttention(
            16, 2, num_kv_heads=kv_heads, extra_key=True, sink=sink, mask=mask, dtype=torch.float64
        )
        x, tensors = torch.randn(2, 5, 16).double(), list(layer.parameters())
        grads = []
        for output in (layer(x), self.longer(layer, x, mask)):
            grads.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
        for found, right in zip(*grads, strict=True):
            torch.testing.assert_close(found, right)

    def test_in_packed_and_decoded_texts_and_their_statistics(self) -> None:
        layer = ak.MultiHeadAttention(16, 2, extra_key=True, mask=masks.Causal())
        x = torch.randn(2, 5, 16)
        right = layer(x, return_stats=True)
        packed = layer(x.flatten(0, 1), seqlens=ak.SeqLens([5, 5]), return_stats=True)
        torch.testing.assert_close(packed.output.view(2, 5, 16), right.output)
        for name in ("lse", "max", "sum"):
            by_token = getattr(right.stats, name).transpose(1, 2).flatten(0, 1)
            torch.testing.assert_close(getattr(packed.stats, name), by_token)
        for cache in (ak.KVCache(), ak.StaticCache(8)):
            with torch.no_grad():
                steps = [layer(step, cache=cache) for step in x.split(1, 1)]
            torch.testing.assert_close(torch.cat(steps, 1), right.output)

    def test_in_a_graph(self) -> None:
        layer = ak.MultiHeadAttention(16, 2, extra_key=True, mask=masks.Causal())
        x = torch.randn(2, 5, 16)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), layer(x))

    def test_is_not_bent(self) -> None:
        with pytest.raises(CompositionError, match="extra_key=True with a softcap"):
            ak.MultiHeadAttention(16, 2, extra_key=True, softcap=5.0)
        with pytest.raises(CompositionTypeError, match="extra_key=1"):
            ak.MultiHeadAttention(16, 2, extra_key=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("built", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 6}])
@pytest.mark.parametrize("mask", [masks.Causal(), masks.SlidingWindow(3), masks.Padding([5, 3])])
def test_the_fused_kernel_computes_it_with_gradients(
    built: dict[str, Any], mask: masks.Mask
) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(32, 2, batch_first=True, **built)
    layers = [
        ak.MultiHeadAttention.from_torch(theirs, mask=mask, backend=backend)
        for backend in ("emulated", "reference")
    ]
    x, context = torch.randn(2, 5, 32), torch.randn(2, 5, built.get("kdim") or 32)
    values, grads = torch.randn(2, 5, 32), []
    for layer in layers:
        output = layer(x, context, values=values)
        trained = [one for one in layer.parameters() if one.requires_grad]
        grads.append([output, *torch.autograd.grad(output.square().sum(), trained)])
    for found, right in zip(*grads, strict=True):
        torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)
    assert layers[0].plan(x, context, values=values, mask=None).calls
