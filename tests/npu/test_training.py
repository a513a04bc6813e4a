"""Modules and training on the device: what surrounds attention in a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnkit as ak
from attnkit import masks, pse
from attnkit.cache import KVCache
from attnkit.kernel import launch as launching
from attnkit.modules import MultiHeadAttention
from attnkit.static import StaticCache
from lm.config import ModelConfig
from lm.data import Batch
from lm.model import LanguageModel
from tests.agreement import LAST
from tests.npu.device import DEVICE

EPS = torch.finfo(torch.float32).eps


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(found: Tensor, wanted: Tensor, terms: int = 64) -> None:
    """Compare float32 with float32: both round sums of `terms` numbers."""
    limit = LAST * terms * EPS * max(1.0, wanted.abs().max().item())
    assert (found.detach().cpu() - wanted).abs().max().item() <= limit


class Block(nn.Module):
    """A transformer block, as small as one can be."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        mask = masks.Causal() & masks.SlidingWindow(6)
        self.attention = MultiHeadAttention(
            32, 4, num_kv_heads=2, rotary=True, mask=mask, pse=pse.ALiBi(4), backend=backend
        )
        self.norm = nn.LayerNorm(32)
        self.feed = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.feed(x)


def twins() -> tuple[Block, Block]:
    """Return equal blocks: the reference on the CPU, and the ascend backend on the NPU."""
    torch.manual_seed(0)
    reference, ascend = Block("reference"), Block("ascend")
    ascend.load_state_dict(reference.state_dict())
    return reference, ascend.to("npu")


def test_module_to_npu():
    reference, ascend = twins()
    assert {p.device.type for p in ascend.parameters()} == {"npu"}
    x = inputs(2, 12, 32)
    near(ascend(x.npu()), reference(x).detach())
    back = copy.deepcopy(ascend).to("cpu")
    assert {p.device.type for p in back.parameters()} == {"cpu"}


def test_auto_takes_the_fused_kernel_on_an_npu():
    layer = ak.Attention(4, 16, mask=masks.Causal())
    x = inputs(2, 12, 4, 16)
    assert layer.plan(*[x.npu()] * 3).backend == "ascend"
    assert layer.plan(x, x, x).backend != "ascend"


def test_a_training_loop_takes_the_steps_of_the_reference():
    reference, ascend = twins()
    losses = []
    for model, device in ((reference, "cpu"), (ascend, "npu")):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        steps = []
        for step in range(4):
            x, target = (inputs(2, 12, 32, seed=2 * step + k).to(device) for k in (0, 1))
            loss = nn.functional.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        losses.append(steps)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] != losses[0][0]
    for wanted, found in zip(reference.parameters(), ascend.parameters(), strict=True):
        near(found, wanted.detach(), terms=4 * 64)


@pytest.mark.parametrize("extras", [{"pse": "ALiBi(4)"}, {"sink": True}])
def test_the_example_trains_as_on_the_reference(extras: dict[str, object]):
    """The language model of examples/, its optimizer and packed batches, for a few steps."""
    losses = []
    for backend, device in (("reference", "cpu"), ("ascend", "npu")):
        torch.manual_seed(0)
        attention = ak.AttentionConfig(
            num_heads=4, head_dim=8, mask="Causal()", layout="TND", backend=backend, **extras
        )
        model = LanguageModel(ModelConfig(dim=32, layers=2), attention).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
        steps = []
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(0, 256, (31,), generator=generator)
            batch = Batch(tokens[:-1], tokens[1:], (11, 4, 15)).to(torch.device(device))
            loss = model.loss(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps.append(loss.item())
        losses.append(steps)
    # AdamW divides by the root of squared gradients, which lifts the roundings of small ones.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] != losses[0][0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool):
    _, ascend = twins()
    gradients = []
    for wrapped in (False, True):
        x = inputs(2, 12, 32).npu().requires_grad_()
        with DEVICE.recording() as calls:
            y = checkpoint(ascend, x, use_reentrant=use_reentrant) if wrapped else ascend(x)
            y.square().sum().backward()
        forwards = [c["op"] for c in calls if "Grad" not in c["op"]]
        assert len(forwards) == 1 + wrapped, "the forward is computed again in the backward"
        gradients.append(x.grad)
    assert torch.equal(gradients[0].cpu(), gradients[1].cpu())


def test_checkpointing_repeats_the_dropout_of_its_forward():
    torch.npu.manual_seed(3)
    layer = ak.Attention(4, 16, mask=masks.Causal(), dropout=0.3, backend="ascend")
    x = inputs(2, 12, 4, 16).npu().requires_grad_()
    with DEVICE.recording() as calls:
        y = checkpoint(lambda t: layer(t, t, t), x, use_reentrant=False)
        y.sum().backward()
    draws = [(c["seed"], c["offset"]) for c in calls if "Dropout" in c["op"]]
    assert len(draws) == 3
    assert len(set(draws)) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype):
    reference, ascend = twins()
    x = inputs(2, 12, 32)
    with DEVICE.recording() as calls, torch.autocast("npu", dtype=dtype):
        y = ascend(x.npu())
        y.float().sum().backward()
    forward = next(call for call in calls if "Grad" not in call["op"])
    assert forward["query"]["dtype"] == {torch.float16: 1, torch.bfloat16: 27}[dtype]
    weights = [p.grad for p in ascend.parameters()]
    assert all(grad is not None and grad.dtype == torch.float32 for grad in weights)
    # The error of a low precision is bounded by its unit, times the sums of 32 and 64 terms.
    wanted = reference(x)
    error = (y.detach().cpu().float() - wanted).abs().max().item()
    assert error < 8 * torch.finfo(dtype).eps * wanted.abs().max().item()


@pytest.mark.parametrize("how", ["eager", "aot_eager"])
@pytest.mark.parametrize("bias", [None, pse.ALiBi(4)], ids=["v1", "v2"])
def test_compile(how: str, bias: pse.Pse | None):
    """One graph, although torch_npu 2.13.0 tells a tracer the shapes of the grad op of version 2
    with a function that always raises: the graph holds an operator of ours."""
    torch.compiler.reset()
    layer = ak.Attention(4, 16, mask=masks.Causal(), pse=bias, backend="ascend")
    x = inputs(2, 12, 4, 16).npu().requires_grad_()
    gradients = []
    for call in (layer, torch.compile(layer, backend=how, fullgraph=True)):
        call(x, x, x).square().sum().backward()
        gradients.append(x.grad)
        x.grad = None
    assert torch.equal(gradients[0].cpu(), gradients[1].cpu())


def test_compile_with_dropout():
    torch.compiler.reset()
    layer = ak.Attention(4, 16, mask=masks.Causal(), dropout=0.3, backend="ascend")
    x = inputs(2, 12, 4, 16).npu().requires_grad_()
    call = torch.compile(lambda t: layer(t, t, t), backend="aot_eager", fullgraph=True)
    with DEVICE.recording() as calls:
        call(x).sum().backward()
        call(x).sum().backward()
    draws = [(c["seed"], c["offset"]) for c in calls if "Dropout" in c["op"]]
    # A forward, that forward again, and its backward, twice.
    assert [len(set(some)) for some in (draws[:3], draws[3:], draws)] == [1, 1, 2]
    assert len(draws) == 6


def test_a_learnable_bias_learns_on_the_device():
    """The kernel never writes its gradient; a pass beside the calls does."""
    bias = pse.Dense(nn.Parameter(inputs(4, 12, 12).npu()))
    x = inputs(2, 12, 4, 16).npu()
    plan = ak.plan(x, x, x, pse=bias)
    assert (plan.backend, plan.bias_pass is None) == ("ascend", False)
    ak.attention(x, x, x, pse=bias).square().sum().backward()
    twin = pse.Dense(nn.Parameter(bias.tensor.detach().cpu()))
    ak.attention(*(3 * [x.cpu()]), pse=twin, backend="reference").square().sum().backward()
    # float32, its sums in another order: a few roundings of numbers near one.
    torch.testing.assert_close(bias.tensor.grad.cpu(), twin.tensor.grad, rtol=1e-4, atol=1e-5)


def test_decoding_with_a_cache():
    reference, ascend = twins()
    x = inputs(2, 7, 32)
    cache = KVCache()
    with torch.no_grad():
        steps = [ascend.attention(t.npu(), cache=cache).cpu() for t in x.split(1, dim=1)]
        near(torch.cat(steps, 1), reference.attention(x))


def test_static_decoding_is_one_call_of_the_version_that_graphs_capture(monkeypatch):
    torch.manual_seed(0)
    mask = masks.Causal() & masks.SlidingWindow(6)
    reference = MultiHeadAttention(32, 4, num_kv_heads=2, rotary=True, mask=mask)
    ascend = copy.deepcopy(reference).to("npu")
    ascend.attention.backend = "ascend"
    chosen, choose = [], launching.choose_version

    def recorded(*given: object) -> str:
        chosen.append(choose(*given))
        return chosen[-1]

    monkeypatch.setattr(launching, "choose_version", recorded)
    x, cache = inputs(2, 9, 32), StaticCache(16)
    with torch.no_grad():
        steps = [ascend(t.npu(), cache=cache).cpu() for t in x.split([3, 1, 1, 1, 1, 1, 1], dim=1)]
        near(torch.cat(steps, 1), reference(x))
    assert set(chosen) == {"v3"}
    assert cache.lengths == (9, 9)
