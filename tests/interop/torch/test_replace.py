"""Models of torch's layers, before and after their attention was switched."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.interop.torch import MultiheadAttention, multihead, replace


@contextmanager
def counted() -> Iterator[list[Any]]:
    """Count what attnkit computes."""
    seen: list[Any] = []
    original = multihead.attention

    def spy(*args: Any, **named: Any) -> Any:
        seen.append((args, named))
        return original(*args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multihead, "attention", spy)
        yield seen


def encoder(**built: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0, **built)
    return nn.TransformerEncoder(layer, 2)


PADDED = torch.arange(6) >= torch.tensor([[4], [6]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)


@pytest.mark.filterwarnings("ignore:.*nested.*")
@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "named",
    [
        {},
        {"src_key_padding_mask": PADDED},
        {"mask": CAUSAL},
        {"mask": CAUSAL, "is_causal": True},
        {"mask": CAUSAL, "src_key_padding_mask": PADDED},
    ],
    ids=lambda named: "+".join(named) or "plain",
)
def test_encoders_call_attnkit_in_every_mode(
    named: dict[str, Tensor], training: bool, grad: bool
) -> None:
    model, x = encoder().train(training), torch.randn(2, 6, 16)
    ours = copy.deepcopy(model)
    replace(ours)
    with torch.set_grad_enabled(grad), counted() as seen:
        right, found = model(x, **named), ours(x, **named)
    assert len(seen) == 2
    rows = ~PADDED if "src_key_padding_mask" in named else slice(None)
    torch.testing.assert_close(found[rows], right[rows], atol=1e-5, rtol=1e-5)


def test_a_transformer_with_masks_and_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True).double()
    ours = copy.deepcopy(model)
    report = replace(ours)
    assert len(report.switched) == 6
    src, tgt = (torch.randn(2, s, 16, dtype=torch.float64) for s in (6, 5))
    named = {
        "tgt_mask": torch.ones(5, 5).triu(1).bool(),
        "tgt_is_causal": True,
        "src_key_padding_mask": PADDED,
        "memory_key_padding_mask": PADDED,
    }
    grads = []
    with counted() as seen:
        for one in (model, ours):
            loss = one(src, tgt, **named).square().sum()
            grads.append(torch.autograd.grad(loss, list(one.parameters())))
    assert len(seen) == 6
    for right, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, right)


def test_the_model_stays_what_it_is_and_undo_gives_it_back() -> None:
    model = encoder().eval()
    attn, names = model.layers[0].self_attn, list(model.state_dict())
    hooked: list[Any] = []
    attn.register_forward_hook(lambda *given: hooked.append(given))
    report = replace(model)
    assert model.layers[0].self_attn is attn
    assert isinstance(attn, MultiheadAttention)
    assert list(model.state_dict()) == names
    model.load_state_dict(encoder().state_dict())
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        right = model(x)
    assert len(hooked) == 1
    with pytest.raises(CompositionError, match="not switched yet"):
        replace(model)
    report.undo()
    assert type(attn) is nn.MultiheadAttention
    assert vars(attn).keys() == vars(encoder().layers[0].self_attn).keys()
    assert attn._qkv_same_embed_dim
    assert model.use_nested_tensor
    with torch.no_grad(), counted() as seen:
        torch.testing.assert_close(model(x), right, atol=1e-5, rtol=1e-5)
    assert not seen


def test_weights_that_nobody_looks_at() -> None:
    model = nn.Sequential(nn.MultiheadAttention(16, 2))
    x = torch.randn(6, 2, 16)
    report = replace(model, weights=False)
    with counted() as seen:
        assert model[0](x, x, x)[1] is None
    assert len(seen) == 1
    report.undo()
    assert "weights_wanted" not in vars(model[0])
    replace(model)
    assert model[0](x, x, x)[1] is not None


def test_classes_of_their_own_are_left_and_told() -> None:
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"own": Own(16, 2), "plain": nn.MultiheadAttention(16, 2)})
    report = replace(model)
    assert report.switched == ("plain",)
    assert "left as it is: own, " in str(report)
    assert type(model["own"]) is Own
    with pytest.raises(CompositionError, match=r"(?s)nothing to switch.*class of its own"):
        replace(nn.Sequential(Own(16, 2)))
    with pytest.raises(CompositionTypeError, match="give an nn"):
        replace("model")  # type: ignore[arg-type]
    itself = nn.MultiheadAttention(16, 2)
    assert "the model itself" in str(replace(itself))


def test_new_parameters_are_those_of_the_module() -> None:
    """What an optimizer steps, and what a load puts there, is what attnkit reads."""
    model = encoder().eval()
    replace(model)
    x = torch.randn(2, 6, 16)
    before = model(x)
    with torch.no_grad():
        model.layers[1].self_attn.in_proj_weight.mul_(2.0)
    assert not torch.allclose(model(x), before)
