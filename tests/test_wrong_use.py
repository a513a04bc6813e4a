"""Whatever is given in the place of an argument is accepted or an error of ours, nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch

import attnkit as ak
from attnkit import layouts, masks, pse
from attnkit.errors import AttnkitError
from attnkit.layouts import BSH, BSND, TND, Layout
from attnkit.layouts.names import doubt
from attnkit.rotary import Rotary, positions

X = torch.zeros(2, 5, 16)
HEADS = torch.zeros(2, 5, 4, 4)
PLACES = torch.arange(5)


def things() -> dict[str, object]:
    """Return one of everything that a slip of the hand may put somewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its quantised tensors
        quantised = torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)
    tensors = {
        "few numbers": torch.zeros(3),
        "few ints": torch.arange(3),
        "few bools": torch.ones(3) > 0,
        "one number": torch.tensor(3),
        "no numbers": torch.empty(0),
        "x": X,
        "x in float64": X.double(),
        "x in float16": X.half(),
        "x in int32": X.int(),
        "x in complex64": X.to(torch.complex64),
        "x on meta": X.to("meta"),
        "x sparse": X.to_sparse(),
        "x mkldnn": X.to_mkldnn(),
        "x quantised": quantised,
        "heads": HEADS,
        "heads in float64": HEADS.double(),
        "heads on meta": HEADS.to("meta"),
        "heads sparse": HEADS.to_sparse(),
    }
    numbers = (None, True, 1.5, float("nan"), float("inf"), -1, 0, 1, 2**40, 2**63, 10**400)
    words = ("x", b"xy", "y" * 10**5)
    lists = ([], [1], ["a"], [-1], [2**63], [float("nan")], [np.int64(3)], {}, {1, 2}, slice(1))
    arrays = (np.ones((2, 2)), np.int64(3), np.array([3, 5]), np.array(["a"]))
    objects = (object(), len, int, range(10**13), torch.int8, torch.float64, torch.device("meta"))
    ours = (masks.Causal(), pse.ALiBi(4), ak.KVCache(), ak.SeqLens([5, 5]), Rotary(), BSND)
    values = (*numbers, *words, *lists, *arrays, *objects, *ours)
    return tensors | {f"{k}: {value!r}"[:60]: value for k, value in enumerate(values)}


THINGS = things()
CAUSAL = ak.MultiHeadAttention(16, 4, mask=masks.Causal())
CROSSING = ak.MultiHeadAttention(16, 4, kv_dim=16)


def used() -> ak.KVCache:
    cache = ak.KVCache()
    cache.append(HEADS, HEADS)
    return cache


def built(name: str) -> Callable[[object], object]:
    def build(value: object) -> object:
        given = {"dim": 16, "num_heads": 4, name: value}
        return ak.MultiHeadAttention(given.pop("dim"), given.pop("num_heads"), **given)

    return build


def called(name: str, method: str = "forward", **more: object) -> Callable[[object], object]:
    @torch.no_grad()
    def call(value: object) -> object:
        layer = CROSSING if "context" in more else CAUSAL
        cache = {"cache": ak.KVCache()} if "cache" in more else {}
        return getattr(layer, method)(**{"x": X, **more, **cache, name: value})

    return call


PLACES_OF_THINGS: dict[str, Callable[[object], object]] = {
    **{
        f"MultiHeadAttention.{name}": built(name)
        for name in (
            *("dim", "num_heads", "num_kv_heads", "head_dim", "kv_dim", "bias", "rotary", "mask"),
            *("pse", "dropout", "sink", "layout", "device", "dtype"),
        )
    },
    **{f"forward.{name}": called(name) for name in ("x", "context", "mask", "pse", "cache")},
    **{f"step.{name}": called(name, cache=True) for name in ("x", "context", "mask", "pse")},
    **{f"crossing.{name}": called(name, context=X, cache=True) for name in ("x", "context", "pse")},
    **{f"explain.{name}": called(name, "explain") for name in ("x", "mask", "pse", "seqlens")},
    "KVCache": lambda v: ak.KVCache(v).append(HEADS, HEADS),
    "append key": lambda v: ak.KVCache().append(v, HEADS),
    "append value": lambda v: used().append(HEADS, v),
    "append both": lambda v: ak.KVCache().append(v, v),
    "seal": lambda v: ak.KVCache().seal(v, HEADS),
    "truncate": lambda v: used().truncate(v),
    "answered": lambda v: used().answered(v),
    "Rotary.base": lambda v: Rotary(v).rotate(HEADS, PLACES),
    "Rotary.rotary_dim": lambda v: Rotary(rotary_dim=v).dims(8),
    "Rotary.pairing": lambda v: Rotary(pairing=v),
    "dims": lambda v: Rotary().dims(v),
    "rotate heads": lambda v: Rotary().rotate(v, PLACES),
    "rotate by": lambda v: Rotary().rotate(HEADS, v),
    "positions": positions,
    "positions from": lambda v: positions([3, 2], v),
    "positions on": lambda v: positions([3], 0, v),
    "SeqLens": ak.SeqLens,
    "SeqLens.kv": lambda v: ak.SeqLens([3], v),
    "from_cu_seqlens": ak.SeqLens.from_cu_seqlens,
    "from_cu_seqlens.kv": lambda v: ak.SeqLens.from_cu_seqlens([0, 3], v),
    "check_totals": lambda v: ak.SeqLens([3]).check_totals(v, 3),
    "get": layouts.get,
    "register": layouts.register,
    "Layout.name": lambda v: Layout(v, "b s n d"),
    "Layout.pattern": lambda v: Layout("X", v),
}
for form in (BSND, BSH, TND):
    shape = (2, 4, 16, 8)[: form.rank]
    PLACES_OF_THINGS |= {
        f"{form.name}.sizes": lambda v, form=form: form.sizes(v, 4),
        f"{form.name}.sizes heads": lambda v, form=form, s=shape: form.sizes(s, v),
        f"{form.name}.sizes dim": lambda v, form=form, s=shape: form.sizes(s, head_dim=v),
        f"{form.name}.shape": lambda v, form=form: form.shape(v),
        f"{form.name}.doubt": lambda v, form=form: doubt(form, v, v),
        f"{form.name}.to_bnsd": lambda v, form=form: form.to_bnsd(v, 4),
        f"{form.name}.from_bnsd": lambda v, form=form: form.from_bnsd(v),
        f"{form.name}.to_tnd": lambda v, form=form: form.to_tnd(v, 4),
        f"{form.name}.from_tnd": lambda v, form=form: form.from_tnd(v),
        f"{form.name}.from_tnd batch": lambda v, form=form: form.from_tnd(HEADS[0], v),
        f"{form.name}.split": lambda v, form=form: form.split(HEADS[0], v),
        f"{form.name}.join": lambda v, form=form: form.join(v),
        f"{form.name}.join one": lambda v, form=form: form.join([v]),
    }


@pytest.mark.parametrize("place", PLACES_OF_THINGS.values(), ids=PLACES_OF_THINGS.keys())
def test_everything_is_accepted_or_an_error_of_ours(place: Callable[[object], object]):
    refused = 0
    for name, value in THINGS.items():
        try:
            place(value)
        except AttnkitError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    assert refused >= len(THINGS) - 14  # what is right in its place
