"""At 32k no tensor of all scores is made: not while a mask is lifted, nor by a layer with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig, masking_utils

from attnkit import masks
from attnkit.functional import plan
from attnkit.interop.transformers import NAME
from attnkit.interop.transformers.interface import attend
from attnkit.interop.transformers.mask_tensor import MaskTensor

LENGTH = 32768
MOST = 64 * LENGTH  # numbers: far below 32k x 32k, above what a few rows and tensors of ids take


class Largest(TorchFunctionMode):
    """Notes the largest tensor that is made."""

    most = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            # A view of everything that repeats one number holds one number.
            if type(one) is Tensor:
                self.most = max(self.most, one.untyped_storage().nbytes() // one.element_size())
        return found


CONFIG = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "vocab_size": 8}


def _config(kind: type = LlamaConfig, **more: Any) -> Any:
    return kind(**CONFIG, **more, attn_implementation=NAME)


def _padding() -> Tensor:
    exists = torch.ones(2, LENGTH, dtype=torch.long)
    exists[1, 30000:] = 0
    exists[0, :100] = 0
    return exists


def _positions() -> Tensor:
    lengths = torch.full((64,), LENGTH // 64)
    return torch.cat([torch.arange(int(n)) for n in lengths])[None]


def _spans() -> Tensor:
    return (torch.arange(LENGTH) // 256 - 2)[None].repeat(2, 1)


X = torch.zeros(2, LENGTH, 1)
MADE: dict[str, Callable[[], Any]] = {
    "causal": lambda: masking_utils.create_causal_mask(_config(), X, None, None),
    "padded": lambda: masking_utils.create_causal_mask(_config(), X, _padding(), None),
    "window": lambda: masking_utils.create_sliding_window_causal_mask(
        _config(Gemma3TextConfig, sliding_window=512), X, _padding(), None
    ),
    "chunks": lambda: masking_utils.create_chunked_causal_mask(
        _config(attention_chunk_size=4096), X, _padding(), None
    ),
    "packed": lambda: masking_utils.create_causal_mask(
        _config(), X[:1], None, None, position_ids=_positions()
    ),
    "both ways": lambda: masking_utils.create_bidirectional_mask(_config(), X, _padding()),
    "spans": lambda: masking_utils.create_causal_mask(
        _config(),
        X,
        None,
        None,
        block_sequence_ids=_spans(),
    ),
    "a step": lambda: masking_utils.create_causal_mask(
        _config(), X[:, :1], _padding(), DynamicCache()
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_lifting(name: str) -> None:
    with Largest() as seen:
        made = MADE[name]()
    assert isinstance(made, MaskTensor)
    assert made.lifted.cells_read == 0
    assert seen.most <= MOST


def test_a_layer() -> None:
    made = MADE["window"]()
    query = torch.randn(2, 1, LENGTH, 4)
    with Largest() as seen, torch.no_grad():
        attend(nn.Module().eval(), query, query, query, made)
    assert seen.most <= MOST
    meta = torch.empty(2, LENGTH, 1, 16, dtype=torch.bfloat16, device="meta")
    assert len(plan(meta, meta, meta, mask=made.mask, backend="emulated").calls) == 1


def test_the_watch_sees_a_matrix_of_scores() -> None:
    with Largest() as seen:
        masks.Causal().materialize(2048, 2048)
    assert seen.most >= 2048 * 2048
