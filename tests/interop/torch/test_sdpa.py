"""torch's `scaled_dot_product_attention` and ours: every form of its arguments, in float64."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit import masks
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.interop.torch import reading, replace
from attnkit.interop.torch.reading import terms_of
from attnkit.interop.torch.sdpa import scaled_dot_product_attention

SHAPES: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = [
    ((3, 4), (5, 4), (5, 6)),
    ((2, 3, 4), (2, 5, 4), (2, 5, 6)),
    ((2, 3, 4), (1, 5, 4), (1, 5, 4)),
    ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 6)),
    ((2, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 4)),
    ((2, 2, 3, 4), (2, 1, 5, 4), (2, 2, 5, 4)),
    ((2, 1, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)),
    ((1, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)),
    ((2, 2, 3, 4), (2, 5, 4), (2, 5, 4)),
    ((2, 3, 2, 4, 4), (2, 3, 2, 5, 4), (2, 3, 2, 5, 4)),
    ((2, 3, 2, 4, 4), (3, 2, 5, 4), (1, 1, 1, 5, 4)),
]


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's page says its function is equivalent to."""
    factor = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scores = query @ key.transpose(-2, -1) * factor
    if is_causal:
        allowed = torch.ones(scores.shape[-2:]).bool().tril(diagonal=0)
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.softmax(scores, -1).nan_to_num(0.0) @ value


def masks_for(shape: tuple[int, ...]) -> Iterator[Tensor | None]:
    """Yield masks that broadcast against scores of a shape: all lengths of axes, bool and float."""
    yield None
    for axes in range(2, len(shape) + 1):
        for ones in itertools.product([False, True], repeat=axes):
            own = [1 if one else size for one, size in zip(ones, shape[-axes:], strict=True)]
            cells = torch.rand(own) > 0.3
            yield cells
            yield torch.randn(own, dtype=torch.float64).masked_fill(~cells, -math.inf)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_equals_torch_for_every_shape_and_mask(shapes: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    scores = (query @ key.transpose(-2, -1)).shape
    for mask in masks_for(scores):
        for causal, scale in [(False, None), (False, 0.3), (True, None)]:
            if causal and mask is not None:
                continue
            found = scaled_dot_product_attention(
                query, key, value, mask, is_causal=causal, scale=scale
            )
            expected = formula(query, key, value, mask, causal, scale)
            torch.testing.assert_close(found, expected)
            if mask is None:
                theirs = F.scaled_dot_product_attention(
                    query, key, value, is_causal=causal, scale=scale
                )
                torch.testing.assert_close(found, theirs)


def test_the_signature_is_torchs() -> None:
    said = inspect.signature(scaled_dot_product_attention)
    kinds = [(one.name, one.kind.name, one.default) for one in said.parameters.values()]
    either, named, none = "POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY", inspect.Parameter.empty
    assert kinds == [
        *((name, either, none) for name in ("query", "key", "value")),
        *(("attn_mask", either, None), ("dropout_p", either, 0.0), ("is_causal", either, False)),
        *(("scale", named, None), ("enable_gqa", named, False)),
    ]
    schema = str(torch.ops.aten.scaled_dot_product_attention.default._schema)
    order = [schema.index(f" {name}") for name, _, _ in kinds]
    assert order == sorted(order)
    assert schema.index("*,") < schema.index(" scale")


@pytest.mark.parametrize(("of_keys", "of_values"), [(4, 4), (2, 2), (1, 1), (2, 1), (1, 4), (2, 4)])
def test_groups_of_heads(of_keys: int, of_values: int) -> None:
    query = torch.randn(2, 4, 3, 8, dtype=torch.float64)
    key = torch.randn(2, of_keys, 5, 8, dtype=torch.float64)
    value = torch.randn(2, of_values, 5, 8, dtype=torch.float64)
    found = scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(found, formula(query, key, value, enable_gqa=True))
    found = scaled_dot_product_attention(query[0], key[0], value[0], enable_gqa=True)
    torch.testing.assert_close(found, formula(query[0], key[0], value[0], enable_gqa=True))


def test_gradients_reach_all_tensors_the_mask_too() -> None:
    shapes = (2, 2, 4, 8), (2, 2, 5, 8), (2, 2, 5, 8), (1, 2, 4, 5)
    given = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    for _ in range(2):  # a mask that trains is not kept
        grads = torch.autograd.grad(scaled_dot_product_attention(*given).square().sum(), given)
        expected = torch.autograd.grad(formula(*given).square().sum(), given)
        for found, right in zip(grads, expected, strict=True):
            torch.testing.assert_close(found, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_with_a_float_mask(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 6, 8).to(dtype)
    for bias in (torch.randn(6, 6), torch.randn(6, 6).to(dtype)):
        found = scaled_dot_product_attention(x, x, x, bias)
        right = formula(x.double(), x.double(), x.double(), bias.double())
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), right, atol=2e-2, rtol=2e-2)


def test_dropout_applies_and_repeats() -> None:
    x = torch.randn(1, 2, 64, 8)
    torch.manual_seed(0)
    first = scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(first, scaled_dot_product_attention(x, x, x, dropout_p=0.5))
    assert not torch.allclose(first, scaled_dot_product_attention(x, x, x), atol=0.1)


def test_corners_of_torchs_own_bias() -> None:
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    query, key = torch.randn(1, 1, 3, 4, dtype=torch.float64), torch.randn(1, 1, 5, 4).double()
    for make, shift in ((causal_upper_left, 0), (causal_lower_right, 2)):
        found = scaled_dot_product_attention(query, key, key, make(3, 5))
        cells = torch.ones(3, 5).bool().tril(shift)
        torch.testing.assert_close(found, formula(query, key, key, cells))
    with pytest.raises(CompositionError, match="3 x 4, the scores are 3 x 5"):
        scaled_dot_product_attention(query, key, key, causal_lower_right(3, 4))


def test_empty_tensors() -> None:
    for shapes in [
        ((2, 2, 0, 4), (2, 2, 5, 4)),
        ((2, 2, 3, 4), (2, 2, 0, 4)),
        ((0, 2, 3, 4), (0, 2, 3, 4)),
    ]:
        query, key = (torch.randn(s) for s in shapes)
        theirs = F.scaled_dot_product_attention(query, key, key)
        assert torch.equal(scaled_dot_product_attention(query, key, key), theirs)


def test_a_row_of_finfo_min_is_empty_and_other_keys_are_masked() -> None:
    x = torch.randn(1, 1, 3, 4)
    low = torch.zeros(3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), torch.finfo().min)
    causal = scaled_dot_product_attention(x, x, x, is_causal=True)
    torch.testing.assert_close(scaled_dot_product_attention(x, x, x, low), causal)
    low[0] = torch.finfo().min
    assert not scaled_dot_product_attention(x, x, x, low)[0, 0, 0].any()


def copied_in(store: Any) -> list[Tensor]:
    return [one._copy for one in store.values.values() if hasattr(one, "_copy")]


class TestReading:
    """The same tensor is read once, another or a changed one is."""

    def reads(self, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
        seen: list[Tensor] = []
        original = reading._read

        def spy(tensor: Tensor, keep: bool, kv_len: int | None) -> Any:
            seen.append(tensor)
            return original(tensor, keep, kv_len)

        monkeypatch.setattr(reading, "_read", spy)
        return seen

    def test_once_for_each_tensor_and_view(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = self.reads(monkeypatch)
        mask = torch.ones(4, 4).tril().bool()
        for _ in range(3):
            assert terms_of(mask, keep=True).mask == masks.Causal()
            terms_of(mask[None, None], keep=True)  # a new view each time
        assert len(seen) == 2
        terms_of(mask, keep=False)
        terms_of(mask.clone(), keep=True)
        assert len(seen) == 4

    def test_again_after_it_was_written_to(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = self.reads(monkeypatch)
        mask = torch.ones(4, 4).tril().bool()
        view = mask[None]
        terms_of(view, keep=True)
        mask[:] = True  # through the base: the version of the view, too
        assert terms_of(view, keep=True).mask == masks.Full()
        assert len(seen) == 2

    def test_where_no_writes_are_counted_it_is_compared(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = self.reads(monkeypatch)
        with torch.inference_mode():
            mask = torch.ones(4, 4).tril().bool()
            for _ in range(3):
                assert terms_of(mask[None], keep=True).mask == masks.Causal()  # new views
            assert len(seen) == 1
            mask.fill_(True)
            assert terms_of(mask[None], keep=True).mask == masks.Full()
            keys = torch.ones(64).bool().expand(2, 1, 1 << 20, 64)  # 128 MiB, were it copied
            assert terms_of(keys, keep=True).mask == masks.Full()
            assert [one.shape.numel() for one in copied_in(reading._READ)][-1] == 64
        assert terms_of(mask[None], keep=True).mask == masks.Full()
        assert len(seen) == 3

    def test_every_layer_of_an_inference_reads_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = self.reads(monkeypatch)
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model = torch.nn.TransformerEncoder(layer, 3).eval()
        replace(model)
        later, late = torch.ones(6, 6).triu(1).bool(), torch.zeros(2, 6).bool()
        for mode in (torch.no_grad, torch.inference_mode):
            seen.clear()
            with mode():
                model(torch.randn(2, 6, 16), later, late)  # makes both float
            assert len(seen) == 2

    def test_kept_masks_do_not_keep_the_tensors(self) -> None:
        import gc
        import weakref

        mask = torch.randn(4, 4)
        terms_of(mask, keep=True)
        gone = weakref.ref(mask)
        del mask
        gc.collect()
        assert gone() is None

    def test_a_row_of_keys_is_not_expanded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = self.reads(monkeypatch)
        x = torch.randn(2, 2, 64, 4)
        exists = torch.arange(64) < torch.tensor([[40], [64]])
        scaled_dot_product_attention(x, x, x, exists[:, None, None])
        scaled_dot_product_attention(
            x, x, x, torch.zeros(1, 1, 1, 64).masked_fill(~exists[0], -1e4)
        )
        assert [list(one.shape) for one in seen] == [[2, 1, 1, 64], [1, 1, 1, 64]]


def test_what_is_refused() -> None:
    x = torch.randn(1, 2, 3, 4)
    call = scaled_dot_product_attention
    cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (CompositionError, "torch takes one", (x, x, x, torch.ones(3, 3).bool(), 0.0, True), {}),
        (CompositionTypeError, "is_causal=1", (x, x, x, None, 0.0, 1), {}),
        (CompositionTypeError, "enable_gqa='x'", (x, x, x), {"enable_gqa": "x"}),
        (CompositionTypeError, "attn_mask is torch.uint8", (x, x, x, torch.ones(3, 3).byte()), {}),
        (
            CompositionTypeError,
            "attn_mask is torch.float64",
            (x, x, x, torch.ones(3, 3).double()),
            {},
        ),
        (CompositionTypeError, "a mask of attnkit", (x, x, x, masks.Causal()), {}),
        (CompositionError, "two axes or more", (x, x, x, torch.ones(3).bool()), {}),
        (CompositionError, "two axes or more", (x, x, x, torch.ones(3, 2).bool()), {}),
        (CompositionError, "3 query heads, 2 key", (torch.randn(1, 3, 3, 4), x, x), {}),
        (
            CompositionError,
            "before the last three",
            (torch.randn(2, 2, 3, 4), *2 * (x.expand(3, -1, -1, -1),)),
            {},
        ),
        (CompositionTypeError, "query=3", (3, x, x), {}),
        (CompositionError, "query \\[4\\]", (x[0, 0, 0], x, x), {}),
    ]
    for kind, told, args, named in cases:
        with pytest.raises(kind, match=told):
            call(*args, **named)
    nested = torch.nested.nested_tensor([torch.randn(2, 3, 4)])
    with pytest.raises(CompositionTypeError, match="nested"):
        call(nested, nested, nested)


def test_graphs_without_a_mask_are_whole() -> None:
    x = torch.randn(1, 2, 6, 8)
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="eager")
    for causal in (False, True):
        found = compiled(x, x, x, is_causal=causal)
        torch.testing.assert_close(found, formula(x, x, x, is_causal=causal))
    broken = torch.compile(scaled_dot_product_attention, backend="eager")
    cells = torch.ones(6, 6).tril(-1).bool()
    torch.testing.assert_close(broken(x, x, x, cells), formula(x, x, x, cells))
