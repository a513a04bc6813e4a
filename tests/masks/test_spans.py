"""`Spans`: images in causal text, from a number per token; and what decoding makes of them."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.decoding import rows_of_text
from attnkit.masks import Spans, from_token_types


def test_every_row_of_numbers() -> None:
    """All rows of up to five tokens with the numbers 0, 1 and 2, in pairs as a batch."""
    for size in range(1, 6):
        rows = list(product((0, 1, 2), repeat=size))
        for row, other in zip(rows, rows[::-1], strict=True):
            ids = torch.tensor([row, other])
            mask = Spans.of(ids)
            found = mask.materialize(size, size, 2)
            for b, one in enumerate((row, other)):
                for i, j in product(range(size), repeat=2):
                    between = one[min(i, j) : max(i, j) + 1]
                    assert found[b, 0, i, j] == (one[i] != 0 and len(set(between)) == 1)
            assert Spans.of(ids[0]).region(size, size) == mask.region(size, size)


def test_token_types_of_gemma_and_paligemma() -> None:
    """Gemma 3: the tokens of one image see each other; PaliGemma: the whole prompt does."""
    types = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0]])
    image = (types == 1).long()
    number = (torch.nn.functional.pad(image, (1, 0)).diff() == 1).cumsum(1) * image
    same = (number[:, :, None] == number[:, None]) & (image[:, None] == 1)
    causal = torch.ones(8, 8).tril().bool()
    assert from_token_types(types).materialize(8, 8, 2)[:, 0].equal(causal | same)
    prompt = torch.tensor([0, 0, 0, 1, 1, 1])
    prefix = from_token_types(prompt, both_ways=0)
    assert prefix.region(6, 6) == masks.PrefixLM(3).region(6, 6)
    assert prefix.region(1, 9) == masks.PrefixLM(3).region(1, 9)
    both = from_token_types([3, 0, 5, 5, 3], both_ways=[3, 5])
    assert both == masks.Causal() | Spans([(0, 1), (2, 4), (4, 5)])
    assert from_token_types(types.to(torch.uint8)) == from_token_types(types)


def test_spans_run_on_every_backend_and_in_a_compiled_function() -> None:
    types = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0]])
    mask = from_token_types(types)
    x = torch.randn(2, 6, 2, 8, dtype=torch.float64)
    cells = mask.materialize(6, 6, 2)
    meant = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for _ in range(3)), attn_mask=cells
    ).transpose(1, 2)
    for backend in ("tiled", "reference", "emulated"):
        torch.testing.assert_close(ak.attention(x, x, x, mask=mask, backend=backend), meant)
    assert masks.parse(str(mask)) == mask

    @torch.compile(backend="eager")
    def forward(x: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        return ak.attention(x, x, x, mask=from_token_types(types))

    torch.testing.assert_close(forward(x, types), meant)


def test_text_is_decoded_after_images_that_came_at_once() -> None:
    mask = from_token_types([0, 1, 1, 0])
    whole = mask.region(7, 7)
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        rows, _ = rows_of_text(mask, None, start, stop)
        assert rows.region(stop - start, stop) == whole.cut((start, stop), (0, stop))
    with pytest.raises(ak.CompositionError, match="first 2 tokens see"):
        rows_of_text(mask, None, 2, 3)


@pytest.mark.parametrize("spans", [(), ((0, 2),), ((), ()), (((0, 2),), ())])
def test_text_alone(spans: Any) -> None:
    mask = Spans(spans)
    assert masks.parse(str(mask)) == mask
    assert mask.batches == (2 if spans and spans[-1] == () else None)
    assert not mask.region(4, 4, batch=(mask.batches or 1) - 1) or spans == ((0, 2),)
