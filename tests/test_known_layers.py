"""The attention layers of well-known models: each one expression, and plain torch beside it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, softmax

import attnkit as ak
from attnkit import masks, pse
from attnkit.rotary import Llama3, Rotary, YaRN

S, DIM = 12, 32


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turn(x: Tensor, turns: Tensor, size: float = 1.0) -> Tensor:
    """Rotary positions as Hugging Face writes them, of heads [b, n, s, d]."""
    angle = torch.outer(torch.arange(x.shape[-2]).double(), turns)
    cos, sin = (torch.cat((a, a), -1) * size for a in (angle.cos(), angle.sin()))
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


def ladder(base: float, dim: int) -> Tensor:
    return base ** (-torch.arange(0, dim, 2).double() / dim)


def split(flat: Tensor, n: int) -> Tensor:
    return flat.unflatten(-1, (n, -1)).transpose(1, 2)


def weigh(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, bias=0.0, sink=None):
    """Attention of heads [b, n, s, d] by its definition; the heads are merged."""
    n = q.shape[1]
    k, v = (t.repeat_interleave(n // t.shape[1], dim=1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale + bias).masked_fill(~allowed, -torch.inf)
    if sink is not None:
        extra = sink.double().view(1, n, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, extra), dim=-1)
    weights = softmax(scores, dim=-1)[..., : k.shape[-2]]
    return (weights @ v).transpose(1, 2).flatten(-2)


LOWER = torch.ones(S, S).bool().tril()
X = noise(2, S, DIM)


def rms(heads: Tensor, norm: nn.Module) -> Tensor:
    return rms_norm(heads, heads.shape[-1:], norm.weight, 1e-6)


# -- the layers ------------------------------------------------------------------------------------


def llama() -> tuple[nn.Module, Tensor]:
    layer = ak.MultiHeadAttention(
        DIM,
        4,
        num_kv_heads=2,
        rotary=Rotary(5e5, scaling=Llama3(8.0, original_max_position_embeddings=64)),
        mask=masks.Causal(),
        dtype=torch.float64,
    )
    turns = ladder(5e5, 8)
    often = 64 * turns / (2 * math.pi)
    kept = ((often - 1) / 3).clamp(0, 1)
    turns = turns * kept + turns / 8 * (1 - kept)
    q, k = split(layer.q_proj(X), 4), split(layer.k_proj(X), 2)
    mixed = weigh(turn(q, turns), turn(k, turns), split(layer.v_proj(X), 2), LOWER, 8**-0.5)
    return layer, layer.out_proj(mixed)


def qwen3() -> tuple[nn.Module, Tensor]:
    layer = ak.MultiHeadAttention(
        DIM,
        4,
        num_kv_heads=2,
        head_dim=16,
        qk_norm="rms",
        rotary=Rotary(1e6, scaling=YaRN(4.0, original_max_position_embeddings=32768)),
        mask=masks.Causal(),
        dtype=torch.float64,
    )
    nn.init.normal_(layer.q_norm.weight)
    dim, turns = 16, ladder(1e6, 16)
    ends = [dim * math.log(32768 / (n * 2 * math.pi)) / (2 * math.log(1e6)) for n in (32, 1)]
    low, high = math.floor(ends[0]), math.ceil(ends[1])
    ramp = ((torch.arange(8).double() - low) / (high - low)).clamp(0, 1)
    turns = turns / 4 * ramp + turns * (1 - ramp)
    size = 0.1 * math.log(4) + 1
    q = turn(rms(split(layer.q_proj(X), 4), layer.q_norm), turns, size)
    k = turn(rms(split(layer.k_proj(X), 2), layer.k_norm), turns, size)
    return layer, layer.out_proj(weigh(q, k, split(layer.v_proj(X), 2), LOWER, 0.25))


def gemma3() -> tuple[nn.Module, Tensor]:
    """A layer that sees a window; weights of its norms are 1 + what its checkpoints hold."""
    layer = ak.MultiHeadAttention(
        DIM,
        4,
        num_kv_heads=1,
        qk_norm="rms",
        rotary=True,
        scale=24**-0.5,
        mask=masks.Causal() & masks.SlidingWindow(5),
        dtype=torch.float64,
    )
    window = LOWER & ~torch.ones(S, S).bool().tril(-5)
    turns = ladder(1e4, 8)
    q = turn(rms(split(layer.q_proj(X), 4), layer.q_norm), turns)
    k = turn(rms(split(layer.k_proj(X), 1), layer.k_norm), turns)
    return layer, layer.out_proj(weigh(q, k, split(layer.v_proj(X), 1), window, 24**-0.5))


def gpt_oss() -> tuple[nn.Module, Tensor]:
    layer = ak.MultiHeadAttention(
        DIM,
        4,
        num_kv_heads=2,
        bias=True,
        sink=True,
        rotary=Rotary(150000.0, scaling=YaRN(32.0, 4096, truncate=False)),
        mask=masks.Causal() & masks.SlidingWindow(4),
        dtype=torch.float64,
    )
    nn.init.normal_(layer.attention.sink)
    turns = ladder(150000.0, 8)
    low, high = (8 * math.log(4096 / (n * 2 * math.pi)) / (2 * math.log(150000.0)) for n in (32, 1))
    ramp = ((torch.arange(4).double() - low) / (high - low)).clamp(0, 1)
    turns = turns / 32 * ramp + turns * (1 - ramp)
    size = 0.1 * math.log(32) + 1
    q, k = (turn(split(p(X), n), turns, size) for p, n in ((layer.q_proj, 4), (layer.k_proj, 2)))
    window = LOWER & ~torch.ones(S, S).bool().tril(-4)
    v = split(layer.v_proj(X), 2)
    mixed = weigh(q, k, v, window, 8**-0.5, sink=layer.attention.sink)
    return layer, layer.out_proj(mixed)


def bert() -> tuple[nn.Module, Tensor]:
    exists = torch.arange(S) < torch.tensor([[5], [S]])
    layer = ak.MultiHeadAttention(
        DIM, 4, bias=True, mask=masks.Padding.of(exists), dtype=torch.float64
    )
    q, k, v = (split(p(X), 4) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    return layer, layer.out_proj(weigh(q, k, v, exists[:, None, None], 8**-0.5))


def t5() -> tuple[nn.Module, Tensor]:
    layer = ak.MultiHeadAttention(
        DIM, 4, scale=1.0, pse=pse.T5Relative(4, table=noise(32, 4)), dtype=torch.float64
    )
    q, k, v = (split(p(X), 4) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    far = torch.arange(S) - torch.arange(S)[:, None]
    near = far.abs()
    log = 8 + (torch.log(near.clamp(min=1) / 8) / math.log(128 / 8) * 8).long()
    bucket = torch.where(near < 8, near, log.clamp(max=15)) + 16 * (far > 0)
    bias = noise(32, 4)[bucket].permute(2, 0, 1)
    return layer, layer.out_proj(weigh(q, k, v, torch.ones(S, S).bool(), 1.0, bias))


def qwen2_gated() -> tuple[nn.Module, Tensor]:
    """Qwen2's biases, with the gate and the part of a head that turns of Qwen3-Next."""
    layer = ak.MultiHeadAttention(
        DIM,
        2,
        num_kv_heads=1,
        bias={"q", "k", "v"},
        gate="elementwise",
        rotary=Rotary(1e6, rotary_dim=0.25),
        mask=masks.Causal(),
        dtype=torch.float64,
    )

    def part(heads: Tensor) -> Tensor:
        return torch.cat((turn(heads[..., :4], ladder(1e6, 4)), heads[..., 4:]), dim=-1)

    q, k = part(split(layer.q_proj(X), 2)), part(split(layer.k_proj(X), 1))
    mixed = weigh(q, k, split(layer.v_proj(X), 1), LOWER, 16**-0.5)
    return layer, layer.out_proj(mixed * layer.gate_proj(X).sigmoid())


class Latent(nn.Module):
    """A projection of DeepSeek's MLA: through a latent, and one rotary part for all heads."""

    def __init__(self, latent: nn.Module, up: nn.Module, shared: nn.Module | None, n: int) -> None:
        super().__init__()
        self.latent, self.up, self.shared, self.n = latent, up, shared, n

    def forward(self, x: Tensor) -> Tensor:
        heads = self.up(self.latent(x)).unflatten(-1, (self.n, -1))
        if self.shared is None:
            return heads.flatten(-2)
        rope = self.shared(x)[..., None, :].expand(*heads.shape[:-1], -1)
        return torch.cat((rope, heads), dim=-1).flatten(-2)


def mla() -> tuple[nn.Module, Tensor]:
    """Heads of 4 + 6 for queries and keys, of which the first 4 turn, and of 5 for values."""
    layer = ak.MultiHeadAttention(
        DIM,
        4,
        head_dim=10,
        v_head_dim=5,
        rotary=Rotary(rotary_dim=4, pairing="interleaved"),
        mask=masks.Causal(),
        dtype=torch.float64,
    )
    wide = {"bias": False, "dtype": torch.float64}
    down = nn.Sequential(nn.Linear(DIM, 8, **wide), nn.RMSNorm(8, dtype=torch.float64))
    shared, up_k, up_v = (nn.Linear(a, b, **wide) for a, b in ((DIM, 4), (8, 24), (8, 20)))
    layer.k_proj, layer.v_proj = Latent(down, up_k, shared, 4), Latent(down, up_v, None, 4)

    def paired(heads: Tensor) -> Tensor:  # the two conventions differ by the order of a head
        rope = torch.cat((heads[..., 0:4:2], heads[..., 1:4:2]), dim=-1)
        return torch.cat((turn(rope, ladder(1e4, 4)), heads[..., 4:]), dim=-1)

    rope = shared(X)[:, None].expand(2, 4, S, 4)
    k = paired(torch.cat((rope, split(up_k(down(X)), 4)), dim=-1))
    mixed = weigh(paired(split(layer.q_proj(X), 4)), k, split(up_v(down(X)), 4), LOWER, 10**-0.5)
    return layer, layer.out_proj(mixed)


LAYERS = [llama, qwen3, gemma3, gpt_oss, bert, t5, qwen2_gated, mla]


@pytest.mark.parametrize("model", LAYERS, ids=lambda model: model.__name__)
def test_the_layer_is_its_definition(model):
    torch.manual_seed(0)
    layer, meant = model()
    weights = [w for w in layer.parameters() if w.requires_grad]
    found = layer(X)
    # A sink is kept in float32.
    assert torch.allclose(found, meant, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(out.square().sum(), weights) for out in (found, meant)]
    for mine, true in zip(*grads, strict=True):
        assert torch.allclose(mine.double(), true.double(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("model", [gpt_oss, bert, mla])
def test_the_layer_compiles(model):
    torch.compiler.reset()
    layer, meant = model()
    form = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(form(X), meant, rtol=0, atol=1e-12)


@pytest.mark.parametrize("model", [llama, qwen3, gemma3, gpt_oss, qwen2_gated, mla])
@torch.no_grad()
def test_the_layer_decodes(model):
    torch.manual_seed(0)
    layer, meant = model()
    cache = ak.KVCache()
    steps = [layer(part, cache=cache) for part in X.split([7, 1, 1, 3], dim=1)]
    assert torch.allclose(torch.cat(steps, dim=1), meant, rtol=0, atol=1e-12)
