"""Selected blocks on every backend: the dense definition, and no index read on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import attnkit as ak
from attnkit.backends import selected, selected_tiles
from attnkit.errors import BackendRefused
from attnkit.masks import SelectedBlocks
from attnkit.planner import selected as planner
from attnkit.planner.lower import lower
from tests.selections import every_selection, some_selection

BACKENDS = ["emulated", "tiled", "reference"]

CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "not causal": {"causal": False},
    "gated": {"gated": True},
    "counted": {"counted": True},
    "counted, not causal": {"counted": True, "causal": False},
    "all of it": {"gated": True, "counted": True, "causal": False, "sink": True},
    "a sink": {"sink": True},
    "one selection for all heads": {"selects": 1},
    "by query heads": {"selects": 4, "gated": True},
    "larger query blocks": {"q_block": 16, "kv_block": 8, "gated": True},
    "queries at the end": {"kv_len": 76, "gated": True},
    "narrow values": {"value_dim": 4},
    "wide values": {"value_dim": 12, "gated": True},
    "one selection for a batch": {"alike": True, "gated": True},
    "a decoding step": {"q_len": 1, "q_block": 1, "kv_len": 71, "k": 3},
    "heads first": {"layout": "BNSD"},
}


def tensors(
    *,
    q_len: int = 48,
    kv_len: int = 48,
    q_block: int = 8,
    kv_block: int = 16,
    k: int = 2,
    selects: int = 2,
    causal: bool = True,
    gated: bool = False,
    counted: bool = False,
    sink: bool = False,
    alike: bool = False,
    value_dim: int = 8,
    layout: str = "BSND",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[list[Tensor], SelectedBlocks, dict[str, Any]]:
    """Return query, key and value, the mask, and what else a call is given."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        found = torch.randn(shape, generator=generator, dtype=torch.float64)
        return found.to(dtype).requires_grad_()

    sizes = ((q_len, 4, 8), (kv_len, 2, 8), (kv_len, 2, value_dim))
    if layout == "BNSD":
        sizes = tuple((n, s, d) for s, n, d in sizes)  # type: ignore[assignment]
    inputs = [draw(2, *size) for size in sizes]
    shape = (1 if alike else 2, selects, q_len // q_block, k)
    indices = some_selection(shape, q_block, kv_block, kv_len, causal, seed)
    counts = torch.randint(0, k + 1, shape[:3], generator=generator) if counted else None
    gates = draw(*shape).float() if dtype != torch.float64 else draw(*shape)
    mask = SelectedBlocks(
        indices,
        q_block,
        kv_block,
        causal,
        gates.detach().requires_grad_() if gated else None,
        counts,
    )
    return inputs, mask, {"layout": layout, "sink": draw(4) if sink else None}


def results(
    backend: str, inputs: list[Tensor], mask: SelectedBlocks, given: dict[str, Any]
) -> dict[str, Tensor]:
    """Output, statistics and all gradients, of the log-sum-exp's too."""
    out, stats = ak.attention(*inputs, mask=mask, backend=backend, return_stats=True, **given)
    lse = stats.lse.masked_fill(stats.lse == -torch.inf, 0.0)
    waves = [torch.arange(t.numel()).double().mul(0.7).sin().view(t.shape) for t in (out, lse)]
    leaves = {"dq": inputs[0], "dk": inputs[1], "dv": inputs[2], "dsink": given["sink"]}
    leaves["dgates"] = mask.gates
    wanted = {name: t for name, t in leaves.items() if t is not None}
    loss = (out * waves[0]).sum() + (lse * waves[1]).sum()
    grads = torch.autograd.grad(loss, list(wanted.values()))
    return {"out": out, "lse": stats.lse, "max": stats.max, **dict(zip(wanted, grads, strict=True))}


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the largest difference; infinities must agree."""
    assert found.keys() == wanted.keys()
    far = []
    for name, want in wanted.items():
        here = found[name].double()
        assert here.shape == want.shape
        assert torch.equal(torch.isfinite(here), torch.isfinite(want)), name
        apart = torch.where(torch.isfinite(want), here - want.double(), 0.0)
        far.append(apart.abs().max().item())
    return max(far)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", ["emulated", "tiled"])
def test_numbers_are_those_of_the_dense_definition(backend: str, case: dict[str, Any]) -> None:
    given = tensors(**case)
    assert worst(results(backend, *given), results("reference", *given)) < 1e-13


@pytest.mark.parametrize("causal", [True, False])
def test_the_definition_is_a_dense_mask_and_a_bias(causal: bool) -> None:
    """The reference against the mask's own cells, and its gates as a bias of every cell."""
    inputs, mask, _ = tensors(causal=causal, gated=True)
    (found,) = (ak.attention(*inputs, mask=mask, backend="reference"),)
    allowed = mask.materialize(48, 48, 2, 4)
    scores = torch.einsum("bind,bjnd->bnij", inputs[0], inputs[1].repeat_interleave(2, 2)) * 8**-0.5
    bias = torch.zeros(2, 4, 6, 3, dtype=torch.float64)
    assert mask.gates is not None
    for b, h, i, c in torch.ones_like(mask.indices).nonzero().tolist():
        block = int(mask.indices[b, h, i, c])
        if block < 3:
            bias[b, 2 * h : 2 * h + 2, i, block] = mask.gates[b, h, i, c].detach()
    scores = scores + bias.repeat_interleave(8, 2).repeat_interleave(16, 3)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
    wanted = torch.einsum("bnij,bjnd->bind", weights, inputs[2].repeat_interleave(2, 2))
    assert (found - wanted).abs().max() < 1e-14


@pytest.mark.parametrize("backend", ["emulated", "tiled"])
@pytest.mark.parametrize(("q_block", "kv_block"), [(2, 2), (1, 2), (4, 2), (2, 3)])
def test_every_selection_of_a_tiny_size(backend: str, q_block: int, kv_block: int) -> None:
    q_blocks = 4 if q_block < 4 else 2
    length = q_block * q_blocks
    indices = every_selection(q_block, kv_block, q_blocks, length, 2, True)
    mask = SelectedBlocks(indices, q_block, kv_block, causal=True)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, length, 1, 4, generator=generator).double() for _ in range(3)]
    inputs = [t.expand(len(indices), -1, -1, -1).clone().requires_grad_() for t in inputs]
    given = {"sink": None}
    found = results(backend, inputs, mask, given)
    assert worst(found, results("reference", inputs, mask, given)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["emulated", "tiled"])
def test_low_precision(backend: str, dtype: torch.dtype) -> None:
    """A gate is written in two numbers of 16 bits, so that it is as exact as its score."""
    given = tensors(gated=True, counted=True, dtype=dtype)
    assert given[1].gates is not None
    given[1].gates.data.mul_(8.0)
    exact = [t.detach().double().requires_grad_() for t in given[0]]
    wanted = results("reference", exact, given[1], given[2])
    eps = torch.finfo(dtype).eps
    for name, found in results(backend, *given).items():
        most = 1.0 if name in ("lse", "max") else wanted[name].abs().max().item()
        assert (found.double() - wanted[name]).abs().max() < 24 * eps * most, name


# -- what is static, and what is not ------------------------------------------------------------


class NoRead(TorchDispatchMode):
    """Refuses operators whose result the host would wait for."""

    READS = ("item", "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.READS or (
            name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        ):
            raise AssertionError(f"{func} is read on the host")
        return func(*args, **(kwargs or {}))


@contextmanager
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Treat tensors as ones that nobody may look at."""
    with monkeypatch.context() as patched:
        patched.setattr(SelectedBlocks, "is_at_hand", False)
        yield


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_index_is_read_on_the_host(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors(gated=True, counted=True, sink=True)
    wanted = results("reference", *given)
    with as_on_a_device(monkeypatch), NoRead():
        found = results(backend, *given)
    assert worst(found, wanted) < 1e-13
    with pytest.raises(AssertionError, match="read on the host"), NoRead():
        results(backend, *given)  # on the host indices are looked at


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("asserts", [True, False])
def test_wrong_indices_on_a_device(
    backend: str, asserts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, mask, given = tensors()
    later = mask.indices.clone()
    later[0, 0, 3, 0] = 2
    wrong = SelectedBlocks(later, mask.q_block, mask.kv_block, True)
    monkeypatch.setattr(selected, "_asserts", lambda device: asserts)
    with as_on_a_device(monkeypatch):
        if asserts:
            with pytest.raises(RuntimeError, match="own or later block"):
                results(backend, inputs, wrong, given)
        else:
            out, stats = ak.attention(*inputs, mask=wrong, backend=backend, return_stats=True)
            assert out.isnan().all()
            assert stats.lse.isnan().all()
        right = results(backend, inputs, mask, given)
    assert worst(right, results("reference", inputs, mask, given)) < 1e-13


def test_two_selections_have_one_plan() -> None:
    layer = ak.Attention(4, 8, num_kv_heads=2, backend="emulated")
    (inputs, one, _), (_, two, _) = tensors(k=1, kv_block=8), tensors(k=1, kv_block=8, seed=1)
    plans = [layer.plan(*inputs, mask=mask) for mask in (one, two)]
    assert plans[0] is plans[1]
    assert ak.plan(*inputs, mask=two, backend="emulated") is ak.plan(
        *inputs, mask=one, backend="emulated"
    )
    outputs = [layer(*inputs, mask=mask) for mask in (one, two)]
    assert len(layer._plans) == 1
    for mask, out in zip((one, two), outputs, strict=True):
        assert (out - ak.attention(*inputs, mask=mask, backend="reference")).abs().max() < 1e-13
    assert (outputs[0] - outputs[1]).abs().max() > 0.1


@pytest.mark.parametrize("backend", ["emulated", "tiled"])
def test_fake_tensors_plan_and_run(backend: str) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 48, 4, 8, requires_grad=True)
        indices = torch.empty(2, 2, 6, 2, dtype=torch.int64)
        gates = torch.empty(2, 2, 6, 2, requires_grad=True)
        mask = SelectedBlocks(indices, 8, 16, causal=True, gates=gates)
        out = ak.attention(x, x, x, mask=mask, backend=backend)
        out.sum().backward()  # type: ignore[no-untyped-call]
    assert out.shape == (2, 48, 4, 8)
    assert gates.grad is not None
    assert gates.grad.shape == gates.shape


def test_meta_tensors_plan() -> None:
    x = torch.empty(2, 48, 4, 8, device="meta")
    mask = SelectedBlocks(torch.empty(2, 2, 6, 2, dtype=torch.int64, device="meta"), 8, 16, True)
    plan = ak.plan(x, x, x, mask=mask, backend="emulated")
    assert plan.calls[0].sparse_mode == 3
    plan.verify()


def test_a_compiled_layer_makes_its_mask_in_the_graph() -> None:
    layer = ak.Attention(4, 8, num_kv_heads=2, backend="emulated")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        means = (t.unflatten(1, (-1, 8)).mean((2, 3)) for t in (query, key))
        scores = torch.einsum("bid,bjd->bij", *means)[:, None]
        blocks = torch.arange(6)
        found = scores.masked_fill(blocks >= blocks[:, None], -torch.inf).topk(2)
        gates = found.values.masked_fill(found.values == -torch.inf, 0.0)
        counts = (found.values > -0.2).sum(-1)
        mask = SelectedBlocks(found.indices, 8, 8, causal=True, gates=gates, counts=counts)
        return layer(query, key, value, mask=mask)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for seed in range(2):  # one graph, whatever is selected
        inputs, _, _ = tensors(dtype=torch.float32, seed=seed)
        found, wanted = (
            torch.autograd.grad(run(*inputs).square().sum(), inputs) for run in (compiled, attend)
        )
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_a_graph_takes_masks_from_outside_and_biases_beside_them() -> None:
    layer = ak.Attention(4, 8, num_kv_heads=2, pse=ak.pse.ALiBi(4), backend="reference")

    def attend(inputs: list[Tensor], mask: SelectedBlocks) -> Tensor:
        return layer(*inputs, mask=mask)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        inputs, mask, _ = tensors(gated=True, counted=True, seed=seed)
        leaves = [*inputs, *([mask.gates] if mask.gates is not None else [])]
        found, wanted = (
            torch.autograd.grad(run(inputs, mask).square().sum(), leaves)
            for run in (compiled, attend)
        )
        assert max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True)) < 1e-13


# -- how it runs ----------------------------------------------------------------------------------


def test_more_than_one_call_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls on disjoint rows: folds apart, then query blocks apart; nothing is merged."""
    given = tensors(gated=True)
    wanted = results("reference", *given)
    for name, most, calls in (
        ("MOST_SEQUENCES", 13, 2),
        ("MOST_SEQUENCES", 4, 6),
        ("MOST_BYTES", 16_000, 8),
        ("MOST_TOKENS", 300, 4),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(planner, name, most)
            lower.cache_clear()
            ak.backends.make_plan.cache_clear()
            plan = ak.plan(*given[0], mask=given[1], backend="emulated")
            assert len(plan.calls) == calls, name
            assert worst(results("emulated", *given), wanted) < 1e-13
    lower.cache_clear()
    ak.backends.make_plan.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(selected_tiles, "CELLS", 600)
        assert worst(results("tiled", *given), wanted) < 1e-13


def test_nothing_gathered_is_kept_for_the_backward() -> None:
    inputs, mask, _ = tensors(k=3, kv_block=8)
    held: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        held.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ak.attention(*inputs, mask=mask, backend="emulated")
    assert max(held) <= max(t.numel() for t in inputs)


@pytest.mark.parametrize("selects", [1, 2, 4])
def test_deterministic_sums_are_the_same_sums(selects: int) -> None:
    given = tensors(gated=True, counted=True, selects=selects)
    wanted = results("emulated", *given)
    torch.use_deterministic_algorithms(True)
    try:
        found = results("emulated", *given)
    finally:
        torch.use_deterministic_algorithms(False)
    assert worst(found, wanted) < 1e-13


@pytest.mark.parametrize("backend", ["emulated", "tiled"])
def test_dropout_keeps_what_it_says(backend: str) -> None:
    """Of equal values the output is the share of weights that were kept, over what is expected."""
    inputs, mask, _ = tensors(k=2, kv_block=16, q_len=192, kv_len=192)
    inputs[2].data.fill_(1.0)
    out = ak.attention(*inputs, mask=mask, backend=backend, dropout=0.25)
    assert out.std() > 0.01
    assert abs(out.mean().item() - 1.0) < 0.02


@pytest.mark.parametrize("gated", [False, True])
def test_second_derivatives_on_tiles(gated: bool) -> None:
    """Torch's kernel has none: where it computes the first ones, the definition has the second."""
    inputs, mask, _ = tensors(q_len=4, kv_len=4, q_block=2, kv_block=2, k=1, gated=gated)
    leaves = [*inputs, *([mask.gates] if mask.gates is not None else [])]

    def attend(query: Tensor, key: Tensor, value: Tensor, *gates: Tensor) -> Tensor:
        again = SelectedBlocks(mask.indices, 2, 2, True, *gates)
        return ak.attention(query, key, value, mask=again, backend="tiled")

    torch.autograd.gradgradcheck(attend, leaves, atol=1e-6, fast_mode=True)


def test_statistics_of_tiles_are_made_where_somebody_looks() -> None:
    inputs, mask, _ = tensors()
    with torch.no_grad():
        _, stats = ak.attention(*inputs, mask=mask, backend="tiled", return_stats=True)
        _, wanted = ak.attention(*inputs, mask=mask, backend="reference", return_stats=True)
    assert (stats.max - wanted.max).abs().max() < 1e-13
    assert (stats.lse - wanted.lse).abs().max() < 1e-13
    assert (stats.sum - wanted.sum).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_that_nobody_selects_count_for_nothing(backend: str) -> None:
    inputs, _, given = tensors(causal=False)
    indices = torch.tensor([0, 2]).expand(2, 2, 6, 2)
    counts = torch.tensor([0, 1, 2, 2, 1, 0]).expand(2, 2, 6)
    mask = SelectedBlocks(indices, 8, 16, counts=counts)
    clean = results(backend, inputs, mask, given)
    for tensor in inputs[1:]:
        tensor.data[:, 16:32] = torch.nan
    assert worst(results(backend, inputs, mask, given), clean) == 0.0
    assert (clean["out"][:, :8] == 0).all()
    assert (clean["lse"][..., :8] == -torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_that_are_not_read_may_be_anything(backend: str) -> None:
    inputs, mask, given = tensors(gated=True, counted=True)
    clean = results(backend, inputs, mask, given)
    assert mask.gates is not None
    mask.gates.data.masked_fill_(~mask.live(48), torch.nan)
    assert worst(results(backend, inputs, mask, given), clean) == 0.0


def test_what_calls_cannot_have_is_refused_and_the_reference_computes_it() -> None:
    inputs, mask, _ = tensors()
    how = {"pse": ak.pse.ALiBi(4)}
    for backend in ("emulated", "tiled"):
        with pytest.raises(BackendRefused, match="positions are lost"):
            ak.attention(*inputs, mask=mask, backend=backend, **how)
    assert ak.plan(*inputs, mask=mask, **how).backend == "reference"
    assert ak.plan(*inputs, mask=mask).backend == "tiled"
    for backend in ("flex", "compiled", "cuda"):
        with pytest.raises(BackendRefused, match=r"come with each call|no union of slices"):
            ak.attention(*inputs, mask=mask, backend=backend)
    capped = [ak.attention(*inputs, mask=mask, backend=b, softcap=2.0) for b in BACKENDS[1:]]
    assert (capped[0] - capped[1]).abs().max() < 1e-14
