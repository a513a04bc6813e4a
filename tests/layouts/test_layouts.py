"""Layouts against plain permutations, by enumeration; views, errors, value semantics."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnkit as ak
from attnkit import layouts
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.layouts import BNSD, BSH, BSND, LAYOUTS, SBH, TND, Layout, Sizes
from attnkit.layouts.names import doubt, twin

DENSE = [BSH, SBH, BNSD, BSND]
ALL = [*DENSE, TND]
NTD = Layout("NTD", "n t d")
TH = Layout("TH", "t (n d)")

# The definition, written without einops: how each layout is made from b n s d.
BY_HAND = {
    "BNSD": lambda x: x,
    "BSND": lambda x: x.permute(0, 2, 1, 3),
    "BSH": lambda x: x.permute(0, 2, 1, 3).flatten(2),
    "SBH": lambda x: x.permute(2, 0, 1, 3).flatten(2),
}


def counted(*shape: int) -> torch.Tensor:
    """Every element different, so that a wrong permutation cannot pass."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)


def test_the_five_layouts_are_registered_under_their_names():
    assert list(LAYOUTS) == ["BNSD", "BSH", "BSND", "SBH", "TND"]
    assert all(layouts.get(layout.name) is layout for layout in ALL)
    assert [layout.packed for layout in ALL] == [False] * 4 + [True]
    assert [layout.merges_heads for layout in ALL] == [True, True, False, False, False]
    assert [layout.rank for layout in ALL] == [3, 3, 4, 4, 3]


@pytest.mark.parametrize("layout", DENSE, ids=str)
def test_conversion_equals_the_permutation_written_by_hand(layout):
    for b, n, s, d in itertools.product((1, 2), (1, 3), (1, 4), (1, 2)):
        bnsd = counted(b, n, s, d)
        own = BY_HAND[layout.name](bnsd)
        assert layout.sizes(own.shape, n) == Sizes(b, s, n, d)
        assert layout.shape(Sizes(b, s, n, d)) == tuple(own.shape)
        assert torch.equal(layout.to_bnsd(own, n), bnsd)
        assert torch.equal(layout.from_bnsd(bnsd), own)
        rows = bnsd.permute(0, 2, 1, 3).reshape(b * s, n, d)
        assert torch.equal(layout.to_tnd(own, n), rows)
        assert torch.equal(layout.from_tnd(rows, batch=b), own)


@pytest.mark.parametrize("layout", DENSE, ids=str)
def test_to_bnsd_is_a_view_and_the_way_back_shares_memory(layout):
    own = counted(*layout.shape(Sizes(2, 5, 3, 4)))
    bnsd = layout.to_bnsd(own, 3)
    assert bnsd.data_ptr() == own.data_ptr()
    assert bnsd.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
    back = layout.from_bnsd(bnsd)
    assert back.data_ptr() == own.data_ptr()
    assert torch.equal(back, own)


@pytest.mark.parametrize("layout", [BSH, SBH], ids=str)
def test_to_bnsd_is_a_view_of_a_strided_projection_too(layout):
    fused = counted(*layout.shape(Sizes(2, 5, 3, 12)))  # q, k and v side by side
    for part in fused.chunk(3, dim=-1):
        bnsd = layout.to_bnsd(part, 3)
        assert bnsd.data_ptr() == part.data_ptr()


@pytest.mark.parametrize("layout", [BSH, BSND], ids=str)
def test_to_tnd_is_a_view_where_tokens_lie_in_order(layout):
    own = counted(*layout.shape(Sizes(2, 5, 3, 4)))
    assert layout.to_tnd(own, 3).data_ptr() == own.data_ptr()


def test_gradients_flow_through_conversions():
    x = torch.ones(2, 5, 12, requires_grad=True)
    (BSH.from_bnsd(BSH.to_bnsd(x, 3) * 2)).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))


def test_meta_tensors_convert_without_data():
    x = torch.empty(7, 2, 12, device="meta")
    assert SBH.to_bnsd(x, 3).shape == (2, 3, 7, 4)


@pytest.mark.parametrize("layout", [TND, NTD, TH], ids=str)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_split_and_join_invert_each_other(layout, lengths):
    rows = counted(sum(lengths), 3, 2)
    own = layout.from_tnd(rows)
    parts = layout.split(own, lengths, 3)
    assert [tuple(part.shape) for part in parts] == [(1, 3, length, 2) for length in lengths]
    start = 0
    for part, length in zip(parts, lengths, strict=True):
        assert torch.equal(part[0], rows[start : start + length].transpose(0, 1))
        start += length
    joined = layout.join(parts)
    assert torch.equal(joined, own)
    assert joined.is_contiguous()


def test_split_returns_views():
    own = counted(7, 3, 2)
    first, second = TND.split(own, (3, 4))
    assert first.data_ptr() == own.data_ptr()
    assert second.data_ptr() == own[3:].data_ptr()


def test_sizes_takes_heads_from_the_head_dim_where_they_are_merged():
    assert BSH.sizes((2, 7, 24), head_dim=8) == Sizes(2, 7, 3, 8)
    assert BSH.sizes((2, 7, 24), 3, head_dim=8) == Sizes(2, 7, 3, 8)
    assert BNSD.sizes((2, 3, 7, 8), head_dim=8) == Sizes(2, 7, 3, 8)
    assert TND.sizes((7, 3, 8)) == Sizes(1, 7, 3, 8)
    assert BSND.sizes((0, 0, 3, 8)) == Sizes(0, 0, 3, 8)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: BNSD.sizes((2, 7, 24), 3), ["[2, 7, 24]", "BNSD", "4 axes", "BSH, SBH, TND"]),
        (lambda: BSH.sizes((2, 3, 7, 8), 3, what="query"), ["query", "3 axes", "BNSD, BSND"]),
        (lambda: BSH.sizes((2, 7), 3), ["3 axes", "reshape"]),
        (lambda: BSH.sizes((2, 7, 24)), ["merges heads", "num_heads="]),
        (lambda: BSH.sizes((2, 7, 24), 5), ["24", "num_heads=5", "multiple of 5"]),
        (lambda: BSH.sizes((2, 7, 24), head_dim=7), ["head_dim=7"]),
        (lambda: BSH.sizes((2, 7, 24), 4, head_dim=8), ["head_dim=8", "holds 6"]),
        (lambda: BNSD.sizes((2, 3, 7, 8), 4), ["num_heads=4", "holds 3", "make them agree"]),
        (lambda: BSND.sizes((2, 3, 7, 8), 3), ["holds 7", "looks like BNSD: say layout='BNSD'"]),
        (lambda: BNSD.sizes((2, 7, 3, 8), 3, head_dim=8), ["looks like BSND"]),
        (lambda: BSH.sizes((2, 7, 24), 3, head_dim=7), ["head_dim=7"]),
        (lambda: BSND.sizes(8), ["a shape is a list of ints", "got 8"]),
        (lambda: BSND.sizes("abcd"), ["a shape is a list of ints"]),
        (lambda: BSND.sizes((2, 7, 3.0, 8)), ["a shape is a list of ints"]),
        (lambda: BSND.sizes((2, -7, 3, 8)), ["0 or more"]),
        (lambda: BSND.shape((2, 7, 3, 8)), ["shape takes Sizes(batch="]),
        (lambda: doubt(BSND, (7, 3), (7, 3)), ["doubt takes Sizes(batch="]),
        (lambda: BSND.sizes(range(10**12)), ["a shape is a list of ints"]),
        (lambda: BSND.from_tnd(counted(7, 3, 8), batch=None), ["batch", "None"]),
        (lambda: TND.split(counted(7, 3, 8), 7), ["lengths", "int"]),
        (lambda: TND.split(counted(7, 3, 8), (9, -2)), ["lengths[1]=-2", ">= 0"]),
        (lambda: TND.split(counted(7, 3, 8), ("a",)), ["lengths[0]='a'", "str"]),
        (lambda: TND.join(7), ["list of tensors"]),
        (lambda: TND.join([counted(1, 3, 7, 8), counted(1, 2, 7, 8)]), ["differ", "[1, 2, 7, 8]"]),
        (
            lambda: TND.join([counted(1, 3, 7, 8), counted(1, 3, 7, 8).half()]),
            ["differ", "float16"],
        ),
        (lambda: BSND.to_bnsd(counted(1, 3, 7, 8).to_sparse()), ["sparse", "to_dense"]),
        (lambda: layouts.get(None), ["by its name", "None"]),
        (lambda: layouts.get(["BSND"]), ["by its name", "list"]),
        (lambda: layouts.get(b"BSND"), ["by its name", "bytes"]),
        (lambda: BNSD.sizes((2, 0, 7, 8)), ["heads axis is empty"]),
        (lambda: BSH.sizes((2, 7, 0), 4), ["dim axis is empty"]),
        (lambda: BSH.sizes((2, 7, 24), 0), ["num_heads=0", ">= 1"]),
        (lambda: BSH.sizes((2, 7, 24), True), ["num_heads", "True"]),
        (lambda: BSH.sizes((2, 7, 24), 3.0), ["num_heads", "3.0"]),
        (lambda: TND.to_bnsd(counted(7, 3, 8)), ["packed", "split"]),
        (lambda: TND.from_bnsd(counted(1, 3, 7, 8)), ["packed", "join"]),
        (lambda: BSND.split(counted(1, 7, 3, 8), (7,)), ["not packed", "to_bnsd"]),
        (lambda: BSND.join([counted(1, 3, 7, 8)]), ["not packed", "from_bnsd"]),
        (lambda: TND.split(counted(7, 3, 8), (3, 5)), ["2 lengths", "sum to 8", "7 tokens"]),
        (lambda: TND.join([]), ["no sequences"]),
        (lambda: TND.join([counted(2, 3, 7, 8)]), ["[2, 3, 7, 8]", "[1, n, t, d]"]),
        (lambda: BSND.from_bnsd(counted(3, 7, 8)), ["[3, 7, 8]", "[b, n, s, d]"]),
        (lambda: BSND.from_tnd(counted(7, 3, 8), batch=2), ["7 tokens", "batch=2"]),
        (lambda: BSND.from_tnd(counted(7, 8)), ["[7, 8]", "[t, n, d]"]),
        (lambda: BSND.from_tnd(counted(7, 3, 8), batch=0), ["batch=0", ">= 1"]),
        (lambda: BSND.to_bnsd([[1.0]]), ["torch tensor", "list"]),
        (
            lambda: layouts.get("BSDN"),
            ["'BSDN'", "mean 'BSND'", "Known: BNSD, BSH, BSND"],
        ),
        (lambda: layouts.get("sbhd"), ["'sbhd'", "layout='SBH'", "tensor.flatten(2)"]),
        (lambda: BSH.convert(counted(2, 7, 24), TND, 3), ["BSH", "TND", "one of them is packed"]),
        (lambda: layouts.get(BSND), ["by its name", "Layout"]),
        (lambda: layouts.register("BNDS"), ["Layout(name, pattern)"]),
        (lambda: layouts.register(Layout("TND", "n t d")), ["'TND'", "registered already"]),
        (lambda: Layout("bnds", "b n d s"), ["upper-case", "'bnds'"]),
        (lambda: Layout("", "b n d s"), ["upper-case"]),
        (lambda: Layout("X", "b n d"), ["'b n d'", "once"]),
        (lambda: Layout("X", "b n d s s"), ["once"]),
        (lambda: Layout("X", "b (s n) d"), ["merge only '(n d)'"]),
        (lambda: Layout("X", "b s (n d"), ["once"]),
        (lambda: Layout("X", "b s n ) d"), ["once"]),
        (lambda: Layout("X", 3), ["einops string"]),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(call, words):
    with pytest.raises(CompositionError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_type_errors_are_type_errors():
    with pytest.raises(TypeError):
        layouts.get(None)
    with pytest.raises(CompositionTypeError):
        BSH.sizes((2, 7, 24), "3")


@pytest.mark.parametrize("layout", ALL, ids=str)
def test_a_layout_is_a_value(layout):
    assert pickle.loads(pickle.dumps(layout)) == layout == copy.deepcopy(layout)
    assert hash(pickle.loads(pickle.dumps(layout))) == hash(layout)
    assert eval(repr(layout), {"Layout": Layout}) == layout
    assert layout != NTD
    assert str(layout) == f"{layout.name} ({layout.pattern})"


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [
        *((word, BSND) for word in ("bsnd", "BSHD", "bshd", "btnh", "BMHK")),
        *((word, BNSD) for word in ("bnsd", "BHSD", "bnth")),
        *((word, TND) for word in ("tnd", "thd", "THD")),
        ("bsh", BSH),
        ("sbh", SBH),
    ],
)
def test_names_that_others_have_are_taken_and_normalised(spelled, meant):
    assert layouts.get(spelled) is meant
    layer = ak.Attention(3, 8, layout=spelled)
    assert layer.layout == layer.composition.layout == meant.name
    assert f"layout='{meant.name}'" in repr(layer)
    assert layer.composition == ak.Attention(3, 8, layout=meant.name).composition


def test_a_layout_of_others_may_have_aliases():
    layouts.register(Layout("SBND", "s b n d", ("SBHD",)))
    try:
        assert layouts.get("sbhd") is layouts.get("SBND")
        x = torch.randn(5, 2, 3, 8)
        found = ak.attention(x, x, x, layout="sbhd")
        y = x.flatten(2)
        meant = ak.attention(y, y, y, layout="sbh", num_heads=3)
        torch.testing.assert_close(found.flatten(2), meant)
    finally:
        LAYOUTS.remove("SBND")


@pytest.mark.parametrize("pair", list(itertools.product(DENSE, DENSE)), ids=str)
def test_convert_leads_from_any_layout_to_any_other_of_its_kind(pair):
    one, other = pair
    bnsd = counted(2, 3, 4, 5)
    own, its = (BY_HAND[form.name](bnsd) for form in pair)
    assert torch.equal(one.convert(own, other, 3), its)
    assert one.convert(own, one, 3) is own


def test_convert_packed_layouts():
    rows = counted(7, 3, 2)
    assert torch.equal(TND.convert(rows, NTD), rows.transpose(0, 1))
    assert torch.equal(TH.convert(rows.flatten(1), NTD, 3), rows.transpose(0, 1))


@pytest.mark.parametrize("layout", [*ALL, NTD, TH], ids=str)
def test_axes_say_where_everything_is(layout):
    own = layout.shape(Sizes(1, 7, 3, 4))
    assert layout.rank == len(layout.axes) == len(own)
    assert own[layout.length_axis] == 7
    known = {"b": 1, "s": 7, "t": 7, "n": 3, "d": 4, "n d": 12}
    assert layout.extents(own) == {axis: known[axis] for axis in layout.axes}
    view = layout.view(counted(*own), 3)
    assert view.shape == (1, 3, 7, 4)
    assert torch.equal(layout.restore(view), counted(*own))


def test_sizes_is_a_value():
    sizes = Sizes(1, 2, 3, 4)
    assert eval(repr(sizes)) == sizes == pickle.loads(pickle.dumps(sizes))
    assert len({sizes, Sizes(1, 2, 3, 4)}) == 1


def test_a_new_layout_is_one_registration():
    bnds = layouts.register(Layout("BNDS", "b n d s"))
    try:
        assert layouts.get("BNDS") is bnds
        assert torch.equal(bnds.from_bnsd(counted(2, 3, 4, 5)), counted(2, 3, 4, 5).mT)
    finally:
        LAYOUTS.remove("BNDS")


def test_more_heads_than_positions_are_doubted_where_another_layout_swaps_them():
    assert twin(BSND) == BNSD
    assert twin(BNSD) == BSND
    assert all(twin(form) is None for form in (BSH, SBH, TND))

    def doubted(form: Layout, query: tuple[int, int], key: tuple[int, int]) -> str | None:
        return doubt(form, *(Sizes(2, length, heads, 8) for length, heads in (query, key)))

    told = doubted(BSND, (4, 16), (4, 8))
    assert told is not None
    assert "4 heads and 16 positions, say layout='BNSD'" in told
    assert doubted(BNSD, (4, 16), (4, 16)) is not None
    # A text, a decoding step, a context: what is usual is never doubted.
    for query, key in [((64, 8), (64, 8)), ((1, 8), (64, 8)), ((1, 8), (64, 2)), ((0, 8), (0, 8))]:
        assert doubted(BSND, query, key) is None


def test_explain_tells_of_the_doubt_and_a_module_names_the_layout_that_fits():
    x = torch.zeros(2, 4, 16, 8)  # b n s d, under the default BSND
    assert "say layout='BNSD'" in " ".join(ak.plan(x, x, x).explain().split())
    assert "layout?" not in ak.plan(x, x, x, layout="BNSD").explain()
    with pytest.raises(CompositionError, match="this looks like BNSD: say layout='BNSD'"):
        ak.Attention(4, 8)(x, x, x)
