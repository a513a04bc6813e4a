"""Calls of torch's attention in code that is not edited."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as imported
from torch.utils.checkpoint import checkpoint

from attnkit.backends import cuda
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.interop.torch import Calls, install, routed, routing

X = torch.randn(2, 2, 6, 8)


class Block(nn.Module):
    """Attends as most models do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).view(2, 6, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value, dropout_p=0.0)


def ways() -> dict[str, Any]:
    return {
        "F": lambda: F.scaled_dot_product_attention(X, X, X),
        "_nn": lambda: torch._C._nn.scaled_dot_product_attention(X, X, X),
        "imported": lambda: imported(X, X, X),
        "partial": partial(imported, X, X, value=X, is_causal=True),
    }


@pytest.mark.parametrize("name", ways())
def test_every_name_is_seen(name: str) -> None:
    call = ways()[name]
    right = call()
    with routed() as calls:
        found = call()
    torch.testing.assert_close(found, right)
    assert calls.routed == 1
    call()
    assert calls.routed == 1


def test_what_is_installed_is_seen_by_all_threads_and_undone() -> None:
    before = F.scaled_dot_product_attention
    installed = install()
    thread = threading.Thread(target=ways()["F"])
    thread.start()
    thread.join()
    imported(X, X, X)
    assert installed.calls.routed == 1  # and imported functions are not
    installed.undo()
    installed.undo()
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention is before


def test_only_the_latest_can_be_undone() -> None:
    first, second = install(), install()
    with pytest.raises(CompositionError, match="undo that one first"):
        first.undo()
    F.scaled_dot_product_attention(X, X, X)
    assert (first.calls.routed, second.calls.routed) == (0, 1)
    second.undo()
    first.undo()
    assert F.scaled_dot_product_attention is imported


def test_names_come_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), routed():
        1 / 0  # noqa: B018
    assert F.scaled_dot_product_attention is imported


def test_what_attnkit_does_not_take_raises_or_is_left_and_told() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 3, 4), torch.randn(2, 5, 4)])
    with pytest.raises(CompositionTypeError, match="nested"), routed():
        F.scaled_dot_product_attention(nested, nested, nested)
    with routed(otherwise="torch") as calls:
        F.scaled_dot_product_attention(X, X, X)
        for _ in range(2):
            assert F.scaled_dot_product_attention(nested, nested, nested).is_nested
        with pytest.raises(RuntimeError, match="attn_mask dtype"):  # torch's own error
            F.scaled_dot_product_attention(X, X, X, torch.ones(6, 6).byte())
    assert (calls.routed, calls.left.total()) == (1, 3)
    assert "  2 x query=<nested tensor" in str(calls)
    with (
        pytest.raises(CompositionError, match="otherwise='maybe'"),
        routed(
            otherwise="maybe",  # type: ignore[arg-type]
        ),
    ):
        pass


def test_modules_of_torch_are_routed_within() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        right = layer(x)
        with routed() as calls:
            found = layer(x)
    torch.testing.assert_close(found, right)
    assert calls.routed == 1


def test_gradients_and_checkpoints() -> None:
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 6, 16)
    block(x).square().sum().backward()
    right = block.qkv.weight.grad
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        block.qkv.weight.grad = None
        with routed() as calls:
            run(x).square().sum().backward()
        torch.testing.assert_close(block.qkv.weight.grad, right)
        assert calls.routed == (1 if run is block else 2)


def test_a_graph_that_is_compiled_inside_is_attnkits() -> None:
    block, x = Block(), torch.randn(2, 6, 16)
    right, seen = block(x), []
    original = routing.scaled_dot_product_attention

    def spy(*args: Any, **named: Any) -> Tensor:
        seen.append(True)
        return original(*args, **named)

    with pytest.MonkeyPatch.context() as patch, install() as installed:
        patch.setattr(routing, "scaled_dot_product_attention", spy)
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), right)
        assert seen == [True]
        assert installed.calls.routed == 0


def test_attnkit_itself_asks_torchs_function() -> None:
    assert cuda.scaled_dot_product_attention is imported
    calls = Calls()
    calls._own.within = True
    with routed() as outer:
        calls(X, X, X)
    assert (calls.routed, outer.routed) == (0, 1)
