"""timm, torchtune and torchtitan, by stand-ins of what their adapters touch.

Their wheels bring much else (torchvision, torchao, a registry of their own), so that the
interfaces are recorded here: names, signatures and the order of calls, of timm 1.0.31, torchtune
0.6.1 and torchtitan 0.3.0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.interop import timm, torchtitan, torchtune


def close(found: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)


class TimmAttention(nn.Module):
    """As timm.layers.attention.Attention computes."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.fused_attn = nn.Linear(16, 48), fused

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).reshape(len(x), -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0)
        else:
            found = (query * 8**-0.5 @ key.transpose(-2, -1)).softmax(-1) @ value
        return found.transpose(1, 2).reshape(x.shape)


class TestTimm:
    def test_both_kinds_of_modules_are_computed_and_come_back(self) -> None:
        model = nn.Sequential(TimmAttention(True), TimmAttention(False))
        x = torch.randn(2, 5, 16)
        right = model(x)
        with timm.routed(model) as calls:
            close(model(x), right)
        assert calls.routed == 2
        assert [one.fused_attn for one in model] == [True, False]

    def test_nothing_to_route_is_an_error(self) -> None:
        with pytest.raises(CompositionError, match="no attention module with a flag"):
            timm.routed(nn.Linear(2, 2)).__enter__()
        with (
            pytest.raises(CompositionError, match="called torch's attention"),
            timm.routed(TimmAttention(True)),
        ):
            pass
        with pytest.raises(CompositionTypeError, match="a model of timm"):
            timm.routed("vit").__enter__()  # type: ignore[arg-type]
        with pytest.raises(ZeroDivisionError), timm.routed(TimmAttention(True)):
            1 / 0  # noqa: B018


class TuneAttention(nn.Module):
    """As torchtune.modules.MultiHeadAttention calls its `_attention_call`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.attn_dropout, self.is_causal = nn.Linear(16, 48), 0.0, True
        self._attention_call: Callable[..., Tensor] = self.theirs

    @staticmethod
    def theirs(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool
    ) -> Tensor:
        mask = None if mask is None else mask[:, None]
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)

    def forward(self, x: Tensor, *, mask: Any = None) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        found = self._attention_call(
            q,
            k,
            v,
            mask=mask,
            dropout_p=self.attn_dropout if self.training else 0.0,
            is_causal=mask is None and self.is_causal,
        )
        return found.transpose(1, 2).reshape(x.shape)


class TestTorchtune:
    LENGTHS = [torch.tensor([3, 1, 2]), torch.tensor([4, 2])]  # noqa: RUF012

    def dense(self) -> Tensor:
        """As ``create_block_causal_mask`` makes it."""
        rows = [
            torch.block_diag(*(torch.ones(n, n).tril().bool() for n in row.tolist()))
            for row in self.LENGTHS
        ]
        return torch.stack(rows)

    def test_every_kind_of_mask(self) -> None:
        theirs, x = TuneAttention(), torch.randn(2, 6, 16)
        ours = copy.deepcopy(theirs)
        model = nn.Sequential(nn.ModuleDict({"attn": ours}), nn.Linear(2, 2))
        assert torchtune.enable(model) == ("0.attn",)
        assert ours._attention_call is torchtune.attend
        close(ours(x), theirs(x))
        right = theirs(x, mask=self.dense())
        close(ours(x, mask=self.dense()), right)
        close(ours(x, mask=torchtune.packed_block_causal_mask(self.LENGTHS)), right)

    def test_a_block_mask_is_read(self) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        cells = self.dense()
        blocks = create_block_mask(lambda b, h, i, j: cells[b, i, j], 2, None, 6, 6, device="cpu")
        theirs, x = TuneAttention(), torch.randn(2, 6, 16)
        ours = copy.deepcopy(theirs)
        torchtune.enable(ours)
        close(ours(x, mask=blocks), theirs(x, mask=cells))
        ours.attn_dropout = 0.5
        with pytest.raises(CompositionError, match="FlexAttention has no dropout"):
            ours(x, mask=blocks)

    def test_packed_masks_are_torchtunes(self) -> None:
        mask = torchtune.packed_block_causal_mask(self.LENGTHS)
        assert torch.equal(mask.materialize(6, 6, 2)[:, 0], self.dense())
        alone = torchtune.packed_block_causal_mask([[3, 1, 2]])
        assert torch.equal(alone.materialize(6, 6)[0, 0], self.dense()[0])

    def test_what_is_refused(self) -> None:
        x = torch.randn(1, 2, 6, 8)
        mask = torchtune.packed_block_causal_mask([[6]])
        with pytest.raises(CompositionError, match="intersect them"):
            torchtune.attend(x, x, x, mask, 0.0, True)
        with pytest.raises(CompositionTypeError, match="a BlockMask or a mask of attnkit"):
            torchtune.attend(x, x, x, object(), 0.0, False)
        with pytest.raises(CompositionError, match="got no rows"):
            torchtune.packed_block_causal_mask([])
        with pytest.raises(CompositionError, match="none has an _attention_call"):
            torchtune.enable(nn.Linear(2, 2))
        with pytest.raises(CompositionTypeError, match="a model of torchtune"):
            torchtune.enable(None)  # type: ignore[arg-type]


class VarlenMetadata(NamedTuple):
    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int
    cu_seq_q_host: tuple[int, ...] | None = None


class VarlenAttention(nn.Module):
    @dataclass(kw_only=True, slots=True)
    class Config:
        window_size: tuple[int, int] = (-1, 0)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.window_size = config.window_size


class ScaledDotProductAttention(nn.Module):
    pass


class FlexAttention(nn.Module):
    pass


class Sharded(VarlenAttention):
    pass


class TestTorchtitan:
    ENDS = (0, 3, 7, 12)

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (
            torch.randn(2, 6, n, d, dtype=torch.float64) for n, d in ((4, 8), (2, 8), (2, 6))
        )
        return query, key, value

    def right(self, heads: tuple[Tensor, Tensor, Tensor], left: int, right: int) -> Tensor:
        """The documents one by one, by the window of torchtitan's page."""
        q, k, v = (tensor.flatten(0, 1).transpose(0, 1) for tensor in heads)
        k, v = (tensor.repeat_interleave(2, 0) for tensor in (k, v))
        found = []
        for a, b in zip(self.ENDS, self.ENDS[1:], strict=False):
            i, j = torch.arange(b - a)[:, None], torch.arange(b - a)
            cells = (left < 0) | (i - j <= left)
            cells = cells & ((right < 0) | (j - i <= right))
            parts = q[:, a:b], k[:, a:b], v[:, a:b]
            found.append(F.scaled_dot_product_attention(*parts, attn_mask=cells))
        return torch.cat(found, 1).transpose(0, 1).reshape(2, 6, 4, 6)

    @pytest.mark.parametrize("window", [(-1, 0), (-1, -1), (2, 0), (1, 1)])
    @pytest.mark.parametrize("host", [False, True])
    @pytest.mark.parametrize("kind", [VarlenAttention, Sharded])
    def test_packed_documents(self, window: tuple[int, int], host: bool, kind: Any) -> None:
        layer, heads = kind(VarlenAttention.Config(window_size=window)), self.heads()
        assert torchtitan.enable(nn.ModuleDict({"inner": layer})) == ("inner",)
        ends = torch.tensor(self.ENDS, dtype=torch.int32)
        masks = VarlenMetadata(
            ends, ends if host else ends.clone(), 5, 5, self.ENDS if host else None
        )
        right = self.right(heads, *window)
        for again in (layer, copy.deepcopy(layer)):
            found = again(*heads, attention_masks=masks, enable_gqa=True)
            torch.testing.assert_close(found, right)

    def test_a_sink_as_torchtitan_adds_it(self) -> None:
        layer, heads = VarlenAttention(VarlenAttention.Config()), self.heads()
        torchtitan.enable(layer)
        ends = torch.tensor(self.ENDS)
        seen: list[Tensor] = []

        def transform(output: Tensor, lse: Tensor) -> Tensor:
            seen.append(lse)
            return output * torch.sigmoid(lse)[..., None]

        masks = VarlenMetadata(ends, ends, 5, 5)
        found = layer(*heads, attention_masks=masks, out_transform=transform, scale=0.3)
        plain = layer(*heads, attention_masks=masks, scale=0.3)
        torch.testing.assert_close(found, plain * torch.sigmoid(seen[0])[..., None])
        alone = heads[0][0, 0] * 0.3 * heads[1][0, 0].repeat_interleave(2, 0)
        torch.testing.assert_close(seen[0][0, 0], alone.sum(-1))  # it sees itself

    def test_masks_and_scores_as_functions(self) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        layer, (query, key, value) = FlexAttention(), self.heads()
        torchtitan.enable(layer)
        masks = create_block_mask(
            lambda b, h, i, j: (i >= j) & (i - j < 3), None, None, 6, 6, device="cpu"
        )
        seen: list[Tensor] = []

        def transform(output: Tensor, lse: Tensor) -> Tensor:
            seen.append(lse)
            return output * 2

        i, j = torch.arange(6)[:, None], torch.arange(6)
        cells = (i >= j) & (i - j < 3)
        turned = [t.transpose(1, 2) for t in (query, key, value)]
        bias = torch.zeros(6, 6).double().masked_fill(~cells, -torch.inf)
        for mod, more in ((None, 0.0), (lambda s, b, h, i, j: s + (i - j) * 0.5, (i - j) * 0.5)):
            right = F.scaled_dot_product_attention(
                *turned, attn_mask=bias + more, scale=0.3, enable_gqa=True
            ).transpose(1, 2)
            named = {"attention_masks": masks, "score_mod": mod, "scale": 0.3}
            found = layer(query, key, value, **named, enable_gqa=True)
            torch.testing.assert_close(found, right)
            doubled = layer(query, key, value, **named, out_transform=transform)
            torch.testing.assert_close(doubled, right * 2)
        assert seen[0].shape == (2, 6, 4)

    def test_one_text(self) -> None:
        layer, heads = ScaledDotProductAttention(), self.heads()
        torchtitan.enable(layer)
        q, k, v = (tensor.transpose(1, 2) for tensor in heads)
        for causal in (False, True):
            right = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
            found = layer(*heads, is_causal=causal, enable_gqa=True)
            torch.testing.assert_close(found, right.transpose(1, 2))
        torch.testing.assert_close(layer(*heads), found)

    def test_what_is_refused(self) -> None:
        layer, heads = VarlenAttention(VarlenAttention.Config()), self.heads()
        torchtitan.enable(layer)
        with pytest.raises(CompositionTypeError, match="give a VarlenMetadata"):
            layer(*heads, attention_masks=None)
        with pytest.raises(CompositionError, match="hands score_mod to"):
            layer(*heads, attention_masks=None, score_mod=None)
        with pytest.raises(CompositionError, match="takes no attention_masks"):
            torchtitan.one_text(*heads, attention_masks=object())
        with pytest.raises(CompositionError, match="no inner attention"):
            torchtitan.enable(nn.Linear(2, 2))
        with pytest.raises(CompositionTypeError, match="a model of torchtitan"):
            torchtitan.enable(3)  # type: ignore[arg-type]
