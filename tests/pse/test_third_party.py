"""A bias that nobody here knows: its cells alone run everywhere, its structure goes further."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends.tiled.bias import bind
from attnkit.backends.tiled.terms import Diagonals, Stored
from attnkit.cache import KVCache
from attnkit.planner import Composition, read_request
from tests.backends.flex.eager import EagerFlex, registered
from tests.pse.families import BATCH, HEADS, KV, Loud, NearOrFar, Recency, Steep, Waves, numbers
from tests.pse.test_families import wide

FAMILIES = [Waves, Recency, Steep, NearOrFar, Loud]
CAUSAL = masks.Causal()


@pytest.fixture(scope="module", autouse=True)
def eager_backend() -> Iterator[None]:
    with registered():
        yield


def leaves(q_len: int = KV, kv_len: int = KV) -> list[Tensor]:
    sizes = [(q_len, HEADS), (kv_len, 1), (kv_len, 1)]
    return [numbers(BATCH, *size, 8).sin().requires_grad_() for size in sizes]


def run(backend: str, bias: pse.Pse, given: list[Tensor], **how: object) -> list[Tensor]:
    """Return output, log-sum-exp and all gradients."""
    found = ak.attention(*given, pse=bias, backend=backend, return_stats=True, **how)
    wanted = [*given, *(t for t in bias.tensors if t.requires_grad)]
    total = found.output.sin().sum() + found.stats.lse.cos().sum()
    return [found.output, found.stats.lse, *torch.autograd.grad(total, wanted)]


@pytest.mark.parametrize("backend", ["tiled", "emulated", EagerFlex.name])
@pytest.mark.parametrize("mask", [CAUSAL, masks.SlidingWindow(2) | masks.Prefix(1)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_reference(family: Callable[[], pse.Pse], mask: masks.Mask, backend: str) -> None:
    bias, given = wide(family()), leaves()
    found, meant = (run(name, bias, given, mask=mask) for name in (backend, "reference"))
    near = 1e-5 if backend == EagerFlex.name else 1e-11
    for one, other in zip(found, meant, strict=True):
        torch.testing.assert_close(one, other, rtol=near, atol=near)


@pytest.mark.parametrize("backend", ["tiled", "reference", "emulated"])
@pytest.mark.parametrize("family", [Waves, Recency, Steep, NearOrFar])
def test_it_decodes(family: Callable[[], pse.Pse], backend: str) -> None:
    bias = wide(family())
    for tensor in bias.tensors:
        tensor.requires_grad_(bias.structure is not None)
    how = {"mask": CAUSAL, "pse": bias, "dtype": torch.float64, "backend": backend}
    layer = ak.MultiHeadAttention(8, HEADS, **how)
    x, cache = numbers(1, 9, 8).sin(), KVCache()
    with torch.no_grad():
        whole = layer(x)
        steps = [layer(part, cache=cache) for part in x.tensor_split([4, 5, 7], dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("family", [Waves, Recency, Steep, NearOrFar])
def test_it_is_packed(family: Callable[[], pse.Pse]) -> None:
    bias, lens = wide(family()), ak.SeqLens([3, 5, 1], [4, 5, 6])
    given = [numbers(n, h, 8).sin().requires_grad_() for n, h in ((9, HEADS), (15, 1), (15, 1))]
    how = {"mask": CAUSAL, "layout": "TND", "seqlens": lens}
    found, meant = (run(name, bias, given, **how) for name in ("tiled", "reference"))
    for one, other in zip(found, meant, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def planned(bias: pse.Pse, length: int) -> ak.Plan:
    x = torch.empty(1, length, HEADS, 16, device="meta")
    plan = ak.plan(x, x, x, mask=CAUSAL, pse=bias, backend="emulated")
    plan.verify()
    return plan


def test_the_planner_reads_structure() -> None:
    waves, steep = Waves(), Steep()
    for bias in (waves, steep):
        bias.tensors[0].requires_grad_(False)
    for bias, length, kind, shape in (
        (steep, 64, 2, (HEADS,)),
        (waves, 64, 0, (1, HEADS, 64, 64)),
        (Recency(), 64, 1, (1, HEADS, 64, 64)),
        (Recency(), 4096, 1, (1, HEADS, 1024, 4096)),
    ):
        (call,) = planned(bias, length).calls
        assert (call.pse_type, call.pse.shape) == (kind, shape)
    for bias in (Steep(), NearOrFar()):
        plan = planned(bias, 2048)
        assert plan.route is not None
        assert all(call.pse is None for call in plan.calls)


def test_tiles_read_structure() -> None:
    given = leaves()
    for family, form, size in (
        (Waves, Stored, HEADS * KV * KV),
        (Recency, Diagonals, 2 * KV - 1),
        (Steep, Diagonals, HEADS * (2 * KV - 1)),
        (Loud, Stored, BATCH * KV),
    ):
        bias = family()
        composed = Composition(CAUSAL, bias, "BSND", None, 0.0, None)
        (term,) = bind(read_request(composed, *given), bias, torch.device("cpu"))
        assert (type(term), term.tensor.numel()) == (form, size)


def test_structure_is_of_what_is_added_after_the_scale() -> None:
    """A family that says both is computed as a matrix, which has its scale."""

    class Early(Steep):
        @property
        def before_scale(self) -> bool:
            return True

    bias, given = Early(nn.Parameter(numbers(HEADS), requires_grad=False)), leaves()
    for backend in ("tiled", "emulated", EagerFlex.name):
        found, meant = (run(name, bias, given, mask=CAUSAL) for name in (backend, "reference"))
        torch.testing.assert_close(found[0], meant[0], rtol=1e-5, atol=1e-5)
