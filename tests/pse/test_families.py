"""What every family keeps: cells as its formula says, cuts, gradients, text, copies, equality."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from attnkit import pse
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.pse.base import rebound
from tests.pse.families import BATCH, FAMILIES, HEADS, KV, Family, Q, lengths_of

EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
SHAPE = (BATCH, HEADS)
WIDE = {"dtype": torch.float64}


def by_formula(family: Family, bias: pse.Pse, q_len: int, kv_len: int) -> Tensor:
    cells = torch.zeros(*SHAPE, q_len, kv_len, dtype=torch.float64)
    with torch.no_grad():
        for at in itertools.product(*map(range, cells.shape)):
            cells[at] = float(family.cell(bias, *at, q_len, kv_len))
    return cells


def wide(bias: pse.Pse) -> pse.Pse:
    """Return the bias with its numbers in float64, so that nothing is rounded."""
    twins = [
        t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for t in bias.tensors
    ]
    return rebound(bias, twins)


@EVERY
def test_cells_are_the_formula(family: Family) -> None:
    bias = wide(family.make())
    for lengths in lengths_of(bias):
        found = bias.materialize(*lengths, batch=BATCH, heads=HEADS, **WIDE)
        assert found.shape[0] == (bias.batch or 1)
        meant = by_formula(family, bias, *lengths)
        assert torch.allclose(found.expand(meant.shape), meant, rtol=1e-14, atol=1e-15)
        for number in range(BATCH):
            one = bias.materialize(*lengths, batch_index=number, **WIDE)
            assert torch.equal(one, found[number if bias.batch else 0][None])


@EVERY
def test_every_rectangle_is_its_part_of_the_whole(family: Family) -> None:
    bias = family.make()
    for q_len, kv_len in {(Q, KV), (5, 3)} & set(lengths_of(bias)):
        whole = bias.materialize(q_len, kv_len)
        lengths = {"q_len": q_len, "kv_len": kv_len}
        spans = [[(a, b) for a in range(n) for b in range(a, n + 1)] for n in (q_len, kv_len)]
        for rows, keys in itertools.product(*spans):
            meant = whole[..., slice(*rows), slice(*keys)]
            part = bias.cut(rows, keys, **lengths)
            assert torch.equal(bias.rectangle(rows, keys, **lengths), meant)
            check_part(bias, part, meant)
            if bias.anchored and None in bias.extent:
                with pytest.raises(CompositionError, match="q_len= and kv_len="):
                    bias.cut(rows, keys)
            else:
                check_part(bias, bias.cut(rows, keys), meant)


def check_part(bias: pse.Pse, part: pse.Pse, meant: Tensor) -> None:
    size = meant.shape[-2:]
    assert torch.equal(part.materialize(*size), meant)
    assert (part.heads, part.batch) == (bias.heads, bias.batch)
    assert all(own in (None, n) for own, n in zip(part.extent, size, strict=True))
    assert part.tensor_names == bias.tensor_names


@EVERY
def test_distances_are_those_of_the_cells(family: Family) -> None:
    bias = wide(family.make())
    for q_len, kv_len in lengths_of(bias) if bias.toeplitz else ():
        whole = bias.materialize(q_len, kv_len, **WIDE)[0]
        if q_len and kv_len:
            found = bias.diagonals(q_len, kv_len, **WIDE)
            order = torch.arange(kv_len) - torch.arange(q_len)[:, None] + q_len - 1
            assert torch.equal(found[:, order], whole)
    other = pse.PerKey | pse.Indexed | pse.PerCell | None
    assert bias.toeplitz == (not any(isinstance(part.structure, other) for part in bias.parts))


@EVERY
def test_gradients_are_those_of_the_formula(family: Family) -> None:
    bias = wide(family.make())
    trained = [t for t in bias.tensors if t.requires_grad]
    assert bias.requires_grad == bool(trained)
    weights = torch.rand(*SHAPE, Q, KV, dtype=torch.float64)

    def total(*tensors: Tensor) -> Tensor:
        given = dict(zip(map(id, trained), tensors, strict=True))
        now = rebound(bias, [given.get(id(t), t) for t in bias.tensors])
        return (now.materialize(Q, KV, **WIDE) * weights).sum()

    assert not trained or torch.autograd.gradcheck(total, trained)
    for tensor in trained:
        part = bias.cut((1, 3), (0, 2), q_len=Q, kv_len=KV).materialize(2, 2, **WIDE)
        whole = bias.materialize(Q, KV, **WIDE)[..., 1:3, 0:2]
        found, meant = (torch.autograd.grad(cells.sum(), tensor)[0] for cells in (part, whole))
        assert torch.equal(found, meant)


@EVERY
def test_it_is_a_value(family: Family) -> None:
    bias, twin = family.make(), family.make()
    assert bias == twin == pickle.loads(pickle.dumps(bias)) == copy.deepcopy(bias) == bias.copy()
    assert copy.copy(bias) == bias
    assert hash(bias) == hash(twin) == hash(bias.copy())
    assert bias.key() == twin.key() == copy.deepcopy(bias).key()
    assert [name for name, other in FAMILIES.items() if other.make() == bias] == [
        name for name, other in FAMILIES.items() if other is family
    ]
    assert bias != "bias"
    for k in range(len(bias.tensors)):
        other = bias.copy()
        other.tensors[k].data += 1
        assert other != bias
        assert other.key() == bias.key()


@EVERY
def test_a_copy_has_tensors_of_its_own(family: Family) -> None:
    bias = family.make()
    for own, twin in zip(bias.tensors, bias.copy().tensors, strict=True):
        assert twin is not own
        assert twin.data_ptr() != own.data_ptr()
        assert type(twin) is type(own)
        assert twin.requires_grad == own.requires_grad
    assert len(bias.tensor_names) == len(bias.tensors) == len(set(bias.tensor_names))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.text])
def test_text_is_read_back(name: str) -> None:
    bias = FAMILIES[name].make()
    assert pse.parse(str(bias)) == bias == pse.parse(f" ({bias!r}) ")


@EVERY
def test_every_dtype_is_rounded_once(family: Family) -> None:
    bias = family.make()
    exact = bias.materialize(Q, KV)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(bias.materialize(Q, KV, dtype=dtype), exact.to(dtype))
    with pytest.raises(CompositionTypeError, match="float"):
        bias.materialize(Q, KV, dtype=torch.int8)


@EVERY
def test_what_does_not_fit_is_refused(family: Family) -> None:
    bias = family.make()
    for own, sizes in (
        (bias.extent[0], (Q + 1, KV)),
        (bias.extent[1], (Q, KV + 1)),
        (bias.heads, (Q, KV, None, HEADS + 1)),
        (bias.batch, (Q, KV, BATCH + 1)),
    ):
        if own is None:
            bias.check(*sizes)
        else:
            with pytest.raises(CompositionError, match=rf"{own}"):
                bias.check(*sizes)
    if bias.tensors:
        with pytest.raises(CompositionError, match=r"cpu.* meta; move it"):
            bias.materialize(Q, KV, device="meta")


def test_layers_share_a_bias_and_copies_are_apart() -> None:
    import attnkit as ak

    shared = pse.T5Relative(HEADS)
    layers = nn.ModuleList(
        ak.Attention(HEADS, 4, pse=bias) for bias in (shared, shared, shared.copy())
    )
    assert list(dict(layers.named_parameters())) == ["0.pse_table", "2.pse_table"]
    both = ak.Attention(HEADS, 4, pse=pse.ALiBi(HEADS, learnable=True) + pse.ALiBi(HEADS) + shared)
    assert list(dict(both.named_parameters())) == ["pse_0_slopes", "pse_2_table"]


def test_a_state_that_numbers_tensors_loads_by_their_names() -> None:
    import attnkit as ak

    def layer() -> nn.Module:
        bias = pse.Dense(torch.zeros(4, 4)) + pse.T5Relative(HEADS)
        return nn.Sequential(ak.Attention(HEADS, 4, pse=bias))

    one, other = layer(), layer()
    assert list(one.state_dict()) == ["0.pse_1_table"]
    table = torch.randn(32, HEADS)
    other.load_state_dict({"0.pse_1": table})
    assert torch.equal(other[0].pse.tensors[1], table)
    one.load_state_dict(other.state_dict())
    assert torch.equal(one[0].pse.tensors[1], table)


def test_a_bias_per_key_may_say_never_and_not_nan() -> None:
    assert pse.KeyBias(torch.tensor([0.0, -torch.inf])).materialize(1, 2)[..., 1] == -torch.inf
    with pytest.raises(CompositionError, match=r"KeyBias\(float32\[2\]\) holds NaN; .*masks.Padd"):
        pse.KeyBias(torch.tensor([0.0, torch.nan]))
    pse.KeyBias(torch.tensor([torch.nan]), validate=False)


@pytest.mark.parametrize("make", [pse.KeyBias, lambda keys: pse.Dense(keys[None])])
def test_values_that_stand_for_others_are_not_read(make: Callable[[Tensor], pse.Pse]) -> None:
    keys = torch.randn(3, 5)
    found = torch.func.vmap(lambda one: make(one).materialize(1, 5))(keys)
    assert torch.equal(found, keys[:, None, None, None])
    with FakeTensorMode():
        assert make(torch.zeros(5)).materialize(1, 5).shape == (1, 1, 1, 5)
        assert pse.T5Relative(2).structure.starts[:2] == (-128, -90)
