"""What today's layers have around attention, each against a definition written here, in float64."""

from __future__ import annotations

import typing

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import layer_norm, linear, rms_norm
from torch.utils.checkpoint import checkpoint

from attnkit import masks
from attnkit.backends import BACKENDS
from attnkit.cache import KVCache
from attnkit.errors import CompositionError
from attnkit.layouts import SeqLens
from attnkit.modules import MultiHeadAttention
from attnkit.rotary import Dynamic, Rotary, YaRN

DIM = 16
CAUSAL = masks.Causal()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(num_heads: int = 4, **how) -> MultiHeadAttention:
    torch.manual_seed(0)
    layer = MultiHeadAttention(DIM, num_heads, dtype=torch.float64, **{"mask": CAUSAL, **how})
    for name, weight in layer.named_parameters():  # norms begin as ones, which hide much
        if "norm" in name:
            nn.init.normal_(weight)
    return layer


def heads(flat: Tensor, n: int) -> Tensor:
    return flat.unflatten(-1, (n, -1))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention of heads [b, s, n, d], merged."""
    n = q.shape[2]
    k, v = (t.repeat_interleave(n // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bind,bjnd->bnij", q, k) * (scale or q.shape[-1] ** -0.5)
    scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).bool().tril(), -torch.inf)
    return torch.einsum("bnij,bjnd->bind", scores.softmax(-1), v).flatten(-2)


def close(found: Tensor, meant: Tensor) -> bool:
    return torch.allclose(found, meant, rtol=0, atol=1e-12)


# -- norms of queries and keys -------------------------------------------------------------------


def normed(layer: MultiHeadAttention, kind: str, flat: Tensor, which: str, n: int) -> Tensor:
    weight = getattr(layer, f"{which}_norm").weight
    if kind == "rms":
        return rms_norm(heads(flat, n), (4,), weight, 1e-6)
    if kind == "layer":
        return layer_norm(heads(flat, n), (4,), weight, getattr(layer, f"{which}_norm").bias)
    return heads(rms_norm(flat, flat.shape[-1:], weight, 1e-6), n)


@pytest.mark.parametrize("kind", ["rms", "layer", "rms_whole"])
def test_norms_come_before_rotary(kind):
    layer, x = build(num_kv_heads=2, qk_norm=kind, rotary=True), noise(2, 5, DIM)
    q = normed(layer, kind, layer.q_proj(x), "q", 4)
    k = normed(layer, kind, layer.k_proj(x), "k", 2)
    q, k = (Rotary().rotate(t, torch.arange(5)) for t in (q, k))
    meant = layer.out_proj(attend(q, k, heads(layer.v_proj(x), 2)))
    assert close(layer(x), meant)
    packed = layer(x.flatten(0, 1), seqlens=SeqLens([5, 5]))
    assert close(packed, meant.flatten(0, 1))
    state = layer.state_dict()
    width = 8 if kind == "rms_whole" else 4
    assert state["k_norm.weight"].shape == (width,)


def test_a_norm_of_ones_own():
    layer = build(qk_norm=lambda size: nn.RMSNorm(size, eps=0.5))
    assert layer.q_norm.eps == 0.5
    assert layer.q_norm.weight.dtype == torch.float64
    layer.k_norm = nn.Identity()  # and another one later
    x = noise(2, 5, DIM)
    q = rms_norm(heads(layer.q_proj(x), 4), (4,), layer.q_norm.weight, 0.5)
    meant = attend(q, heads(layer.k_proj(x), 4), heads(layer.v_proj(x), 4))
    assert close(layer(x), layer.out_proj(meant))


# -- biases, sizes, gates ------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{"q", "k", "v"}, ["out"], (), frozenset({"q"}), True, False])
def test_biases_by_name(given):
    layer = build(bias=given)
    names = {"q", "k", "v", "out"}
    expected = names if given is True else set(given or ())
    assert {n for n in names if getattr(layer, f"{n}_proj").bias is not None} == expected


@pytest.mark.parametrize("layout", ["BSND", "BNSD", "BSH", "TND"])
@pytest.mark.parametrize("size", [2, 7])
def test_values_of_another_size(size, layout):
    layer, x = build(num_kv_heads=2, v_head_dim=size, layout=layout), noise(2, 5, DIM)
    q, k, v = heads(layer.q_proj(x), 4), heads(layer.k_proj(x), 2), heads(layer.v_proj(x), 2)
    assert v.shape[-1] == size
    meant = layer.out_proj(attend(q, k, v))
    assert close(layer(x), meant)
    assert close(layer(x.flatten(0, 1), seqlens=SeqLens([5, 5])), meant.flatten(0, 1))
    cache = KVCache()
    with torch.no_grad():
        steps = [layer(part, cache=cache) for part in x.split([2, 1, 2], dim=1)]
    assert close(torch.cat(steps, dim=1), meant)
    assert layer.plan(x).request.value_dim == size


@pytest.mark.parametrize("gate", ["head", "elementwise"])
def test_gates(gate):
    layer, x = build(gate=gate, v_head_dim=3, bias={"gate"}), noise(2, 5, DIM)
    plain = heads(attend(*(heads(p(x), 4) for p in (layer.q_proj, layer.k_proj, layer.v_proj))), 4)
    sizes = {"head": 4, "elementwise": 12}
    opened = linear(x, layer.gate_proj.weight, layer.gate_proj.bias).sigmoid()
    assert opened.shape[-1] == sizes[gate]
    meant = layer.out_proj((plain * heads(opened, 4)).flatten(-2))
    assert close(layer(x), meant)
    found = layer(x.flatten(0, 1), seqlens=SeqLens([5, 5]), return_stats=True)
    assert close(found.output, meant.flatten(0, 1))


# -- projections as black boxes ------------------------------------------------------------------


class Adapted(nn.Module):
    """A projection with a correction of low rank, as LoRA has it; no `weight` to be read."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Quantised(nn.Module):
    """A projection whose weights are bytes."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        weight = base.weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (weight / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, (self.codes * self.scale).to(x.dtype))


class Casting(nn.Module):
    """A projection that computes in its own dtype, whatever it is given."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x.to(self.base.weight.dtype)).to(x.dtype)


@pytest.mark.parametrize("box", [Adapted, Quantised, Casting])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_module_projects(box, dtype):
    layer, x = build(num_kv_heads=2, rotary=True), noise(2, 5, DIM).to(dtype)
    if dtype == torch.float32 and box is Adapted:
        layer.float()
    for name in ("q", "k", "v", "out"):
        setattr(layer, f"{name}_proj", box(getattr(layer, f"{name}_proj")))
    if dtype == torch.float32 and box is Adapted:
        layer.float()
    found = layer(x)
    turn = torch.arange(5)
    q, k = heads(layer.q_proj(x), 4), heads(layer.k_proj(x), 2)
    q, k = Rotary().rotate(q, turn), Rotary().rotate(k, turn)
    meant = layer.out_proj(attend(q, k, heads(layer.v_proj(x), 2)))
    assert found.dtype == dtype
    assert torch.allclose(found, meant, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("trains", [("q", "v"), (), ("k",)])
def test_the_plan_of_replaced_projections_is_the_one_that_runs(trains, monkeypatch):
    layer, x, ran = build(), noise(2, 5, DIM), []
    layer.requires_grad_(False)
    for name in trains:
        setattr(layer, f"{name}_proj", Adapted(getattr(layer, f"{name}_proj")))
    backend = type(BACKENDS["tiled"])
    run = backend.run
    monkeypatch.setattr(
        backend, "run", lambda self, plan, given: (ran.append(plan), run(self, plan, given))[1]
    )
    layer(x)
    assert layer.plan(x).request == ran[0].request


def test_projections_that_are_parts_of_one():
    """Queries, keys and values from one product, as fused checkpoints have them."""
    layer, x = build(), noise(2, 5, DIM)
    fused = torch.cat([getattr(layer, f"{n}_proj").weight for n in "qkv"])

    class Part(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

        def forward(self, x: Tensor) -> Tensor:
            return linear(x, fused).chunk(3, dim=-1)[self.index]

    meant = layer(x)
    layer.q_proj, layer.k_proj, layer.v_proj = Part(0), Part(1), Part(2)
    assert close(layer(x), meant)


# -- positions -----------------------------------------------------------------------------------


def test_positions_of_tokens_and_of_texts():
    layer, x = build(rotary=True, num_kv_heads=2), noise(2, 5, DIM)
    assert close(layer(x, positions=torch.arange(5)), layer(x))
    assert close(layer(x, positions=torch.arange(5) + 7), layer(x))  # distances are what counts
    where = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 5, 6, 9]])
    each = [layer(x[b : b + 1], positions=where[b]) for b in range(2)]
    assert close(layer(x, positions=where), torch.cat(each))
    packed = layer(x.flatten(0, 1), seqlens=SeqLens([5, 5]), positions=where.flatten())
    assert close(packed, torch.cat(each).flatten(0, 1))
    cache, cuts = KVCache(), [(0, 3), (3, 4), (4, 5)]
    with torch.no_grad():
        steps = [layer(x[:, a:b], cache=cache, positions=where[:, a:b]) for a, b in cuts]
    assert close(torch.cat(steps, dim=1), torch.cat(each))


@pytest.mark.parametrize(
    "rotary",
    [
        Rotary(sections=(3, 3, 2)),
        Rotary(sections=(4, 2, 2), order="interleaved"),
        Rotary(sections=(4, 4), order="axial"),
    ],
    ids=str,
)
def test_positions_along_several_axes(rotary):
    layer = build(num_heads=2, head_dim=16, rotary=rotary)
    x, axes = noise(2, 6, DIM), len(rotary.sections)
    where = torch.randint(0, 9, (axes, 2, 6), generator=torch.manual_seed(1))
    q, k, v = (heads(p(x), 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    meant = layer.out_proj(attend(rotary.rotate(q, where), rotary.rotate(k, where), v))
    assert close(layer(x, positions=where), meant)
    lens = SeqLens([6, 6])
    packed = layer(x.flatten(0, 1), seqlens=lens, positions=where.flatten(1))
    assert close(packed, meant.flatten(0, 1))


# -- compiled, cast, checkpointed ----------------------------------------------------------------


EVERY = {
    "norms": {"qk_norm": "rms", "rotary": True},
    "norms of the whole": {"qk_norm": "rms_whole"},
    "gate by head": {"gate": "head"},
    "gate by element": {"gate": "elementwise", "bias": {"q", "gate"}},
    "sizes": {"v_head_dim": 3, "num_kv_heads": 2},
    "yarn": {"rotary": Rotary(scaling=YaRN(4.0, 16), rotary_dim=0.5)},
    "dynamic": {"rotary": Rotary(scaling=Dynamic(2.0, 4))},
    "sections": {"rotary": Rotary(sections=(1, 1))},
}


@pytest.mark.parametrize("how", EVERY.values(), ids=EVERY.keys())
def test_one_graph_computes_the_same_for_all_positions(how):
    torch.compiler.reset()
    layer, counter = build(**how), CompileCounterWithBackend("aot_eager")
    call = torch.compile(layer, fullgraph=True, backend=counter)
    sections = layer.rotary.sections if layer.rotary else None
    for seed in range(3):
        x, more = noise(2, 5, DIM, seed=seed).requires_grad_(), {}
        if layer.rotary is not None:
            shape = (2, 5) if sections is None else (2, 2, 5)
            generator = torch.manual_seed(seed)
            more = {"positions": torch.randint(0, 50, shape, generator=generator)}
        each = []
        for form in (call, layer):
            output = form(x, **more)
            each.append(
                (output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()]))
            )
        for found, meant in zip(*each, strict=True):
            torch.testing.assert_close(found, meant)
    assert counter.frame_count == 1


def test_replaced_projections_compile():
    torch.compiler.reset()
    layer, x = build(rotary=True, qk_norm="layer"), noise(2, 5, DIM)
    layer.q_proj, layer.v_proj = Adapted(layer.q_proj), Quantised(layer.v_proj)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(x), layer(x))


@pytest.mark.parametrize("how", EVERY.values(), ids=EVERY.keys())
def test_autocast_and_checkpoints(how):
    layer = build(**how).float()
    x = noise(2, 5, DIM).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    leaves = [x, *layer.parameters()]
    grads = [
        torch.autograd.grad(output.square().sum(), leaves)
        for output in (layer(x), checkpoint(layer, x, use_reentrant=False))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.skipif(not hasattr(typing, "get_overloads"), reason="Python 3.11 remembers overloads")
def test_what_is_returned_follows_from_what_is_asked():
    hints = [typing.get_type_hints(one) for one in typing.get_overloads(MultiHeadAttention.forward)]
    told = {str(hint["return_stats"]): hint["return"].__name__ for hint in hints}
    literal = "typing.Literal"
    assert told == {f"{literal}[False]": "Tensor", f"{literal}[True]": "AttentionOutput"}


# -- wrong uses ----------------------------------------------------------------------------------


X = noise(1, 3, DIM)


def replaced(name: str, module: nn.Module) -> MultiHeadAttention:
    layer = build()
    setattr(layer, name, module)
    return layer


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda: build(bias="qkv"), ["bias='qkv'", "{'q', 'k', 'v'}"]),
        (lambda: build(bias={"q", "o"}), ["'o'", "q, k, v, out"]),
        (lambda: build(bias={"gate"}), ["'gate'", "q, k, v, out"]),
        (lambda: build(bias=[[]]), ["bias=[[]]"]),
        (lambda: build(qk_norm="batch"), ["qk_norm='batch'", "rms, layer, rms_whole"]),
        (lambda: build(qk_norm=True), ["qk_norm=True"]),
        (lambda: build(qk_norm=lambda size: size), ["qk_norm=<function", "a function that makes"]),
        (lambda: build(gate="row"), ["gate='row'", "'head'", "'elementwise'"]),
        (lambda: build(gate=True), ["gate=True"]),
        (lambda: build(gate=[]), ["gate=[]"]),
        (lambda: build(v_head_dim=0), ["v_head_dim=0"]),
        (lambda: build(v_head_dim=2**31 - 1), ["num_heads * v_head_dim=8589934588"]),
        (lambda: build()(X, positions=torch.arange(3)), ["positions=", "rotary=False"]),
        (lambda: build(rotary=True)(X, positions=[0, 1, 2]), ["positions is a list"]),
        (lambda: build(rotary=True)(X, positions=torch.arange(4)), ["[4]", "[1, 3]"]),
        (lambda: build(rotary=True)(X, positions=torch.ones(3) > 0), ["torch.bool"]),
        (
            lambda: build(rotary=Rotary(sections=(1, 1), order="axial"))(X),
            ["axial", "positions=[a, s]"],
        ),
        (lambda: build(rotary=Rotary(sections=(1, 2))), ["3 pairs", "2 pairs"]),
        (lambda: replaced("v_proj", nn.Identity())(X[..., :8]), ["[b, s, 16]"]),
        (
            lambda: replaced("v_proj", nn.Linear(DIM, 8, dtype=torch.float64))(X),
            ["Linear(", "[1, 3, 8]", "4 heads of 4", "v_head_dim="],
        ),
        (lambda: replaced("q_proj", nn.LSTM(DIM, DIM, dtype=torch.float64))(X), ["returned"]),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(bad, words):
    with pytest.raises(CompositionError) as caught:
        bad()
    assert all(word in str(caught.value) for word in words), str(caught.value)
