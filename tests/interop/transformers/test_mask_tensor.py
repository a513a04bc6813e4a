"""A mask in a tensor's clothes keeps its set through what models do to masks, or says that not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnkit import masks
from attnkit.errors import CompositionError
from attnkit.interop.transformers import report
from attnkit.interop.transformers.interface import attend
from attnkit.interop.transformers.mask_tensor import MaskTensor
from attnkit.masks import Lifted

MASK = masks.Causal() & masks.Padding((6, 4))
LEAST = torch.finfo(torch.float32).min


def made(mask: masks.Mask = MASK) -> MaskTensor:
    return MaskTensor(Lifted(mask, "a test"), (2, 1, 6, 6), torch.float32)


def plain(mask: masks.Mask = MASK) -> Tensor:
    return torch.zeros(2, 1, 6, 6).masked_fill(~mask.materialize(6, 6, 2), LEAST)


SAME: list[Callable[[Any], Any]] = [
    lambda t: t.detach(),
    lambda t: t.clone(),
    lambda t: t.contiguous(),
    lambda t: t.to("cpu"),
    lambda t: t.to(torch.bfloat16),
    lambda t: t[:, :, :, :6],
    lambda t: t[:],
    lambda t: copy.deepcopy(t),
    lambda t: pickle.loads(pickle.dumps(t)),
    lambda t: t.expand(2, 4, 6, 6),
]


@pytest.mark.parametrize("step", SAME)
def test_copies_and_views_of_all_keep_the_set(step: Callable[[Any], Any]) -> None:
    found, wanted = step(made()), step(plain())
    assert isinstance(found, MaskTensor)
    assert found.mask == MASK
    assert (found.shape, found.dtype, found.device) == (wanted.shape, wanted.dtype, wanted.device)
    assert torch.equal(found.cells() == 0, wanted == 0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_hands_it_on(reentrant: bool) -> None:
    seen = []

    def layer(x: Tensor, mask: Tensor) -> Tensor:
        seen.append(mask)
        return 2 * x

    x = torch.ones(1, requires_grad=True)
    checkpoint(layer, x, made(), use_reentrant=reentrant).sum().backward()
    assert [one.mask for one in seen][:2] == [MASK, MASK][: len(seen)]


def test_slices_are_cut_for_every_range() -> None:
    for mask in (masks.Causal(), MASK, masks.SlidingWindow(3), masks.Full()):
        for start in range(-7, 8):
            for stop in (*range(-7, 8), None):
                for at in (
                    (Ellipsis, slice(start, stop)),
                    (Ellipsis, slice(start, stop), slice(2, 5)),
                ):
                    found, wanted = made(mask)[at], plain(mask)[at]
                    assert isinstance(found, MaskTensor)
                    assert found.shape == wanted.shape
                    torch.testing.assert_close(found.cells(), wanted)


OTHERS: list[Callable[[Any], Any]] = [
    lambda t: t + 1.0,
    lambda t: 2.0 * t,
    lambda t: torch.cat([t, torch.zeros(2, 1, 6, 2)], -1),
    lambda t: t[:, 0],
    lambda t: t[..., ::2],
    lambda t: t[1:],
    lambda t: t.to(torch.bool),
    lambda t: t == 0,
    lambda t: t.masked_fill(torch.eye(6).bool(), -1.0),
    lambda t: torch.where(t == 0, 1.0, 2.0),
    lambda t: t.repeat(1, 2, 1, 1),
    lambda t: t.transpose(2, 3),
    lambda t: t.view(12, 6),
    lambda t: t.sum(),
    lambda t: nn.functional.pad(t, (0, 1)),
]


@pytest.mark.parametrize("step", OTHERS)
def test_what_else_is_done_gets_the_cells_and_is_told(step: Callable[[Any], Any]) -> None:
    class Model(nn.Module):
        def forward(self, mask: Tensor) -> Any:
            return step(mask)

    model = Model()
    found = model(made())
    assert type(found) is Tensor
    torch.testing.assert_close(found, step(plain()))
    (layer,) = report(model).layers
    assert layer.kind == "Model"
    assert sum(layer.dense.values()) >= 1
    assert "made dense by aten." in str(report(model))


def test_a_write_to_the_set_is_refused() -> None:
    writes: list[Callable[[Any], Any]] = [
        lambda t: t.mul_(2),
        lambda t: t.__setitem__((Ellipsis, slice(0, 2)), 1.0),
        lambda t: t.masked_fill_(torch.eye(6).bool(), 0.0),
    ]
    for write in writes:
        with pytest.raises(CompositionError, match="which is a set"):
            write(made())


@pytest.mark.parametrize("inference", [False, True])
def test_a_write_to_cells_that_were_looked_at_is_seen(inference: bool) -> None:
    class Layer(nn.Module):
        pass

    with torch.inference_mode(inference):
        query = torch.randn(2, 2, 6, 8)
        mask, same = made(), plain()
        for one in (mask, same):
            one[0, 0, 1, 5] = 0.0
            one[:, 0].select(1, 3).fill_(0.0)
        found, _ = attend(Layer(), query, query, query, mask)
        wanted, _ = attend(Layer(), query, query, query, same)
        torch.testing.assert_close(found, wanted)
        assert torch.equal(mask[..., :4] + 0, same[..., :4])


def test_it_has_no_storage() -> None:
    whole = MaskTensor(Lifted(masks.Causal(), "a test"), (64, 1, 1 << 20, 1 << 20), torch.float32)
    assert whole[..., -1:, :].mask.region(1, 1 << 20).area == 1 << 20
    assert "Causal()" in repr(whole)
