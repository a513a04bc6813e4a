"""Every rule of the contract: at least one call that keeps it and one that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import reload

import pytest
import torch

from attnkit.errors import CompositionError, KernelContractError, KernelContractTypeError
from attnkit.geometry import Region, Slice
from attnkit.kernel import RULES, AttenMask, KernelCall, MaskFacts, TensorSpec, dropout_bytes
from attnkit.kernel.legality import LAYERS, SOURCES, contract_error, known_rules
from attnkit.kernel.legality import rule as make_rule
from attnkit.kernel.rules import shapes

HALF = torch.float16


def spec(*shape: int, dtype: torch.dtype = HALF) -> TensorSpec:
    return TensorSpec(shape, dtype)


def dense(sq: int = 8, skv: int = 8, batch: int = 2, heads: int = 4, **arguments) -> KernelCall:
    key = spec(batch, 2, skv, 16)
    made = KernelCall(spec(batch, heads, sq, 16), key, key, heads, "BNSD")
    return replace(made, **arguments)


def packed(q=(4, 8), kv=(4, 8), **arguments) -> KernelCall:
    """Arguments are cumulative lengths."""
    key = spec(max(kv), 2, 16)
    made = KernelCall(
        spec(max(q), 4, 16), key, key, 4, "TND", actual_seq_qlen=q, actual_seq_kvlen=kv
    )
    return replace(made, **arguments)


def longer(**arguments) -> KernelCall:
    """More queries and keys than the lists speak of."""
    return packed(query=spec(9, 4, 16), key=spec(9, 2, 16), value=spec(9, 2, 16), **arguments)


def square(mode: int, make: Callable[..., KernelCall] = dense, **arguments) -> KernelCall:
    """A call whose mode reads its compressed mask."""
    mask = AttenMask.prefix() if mode == 6 else AttenMask.causal()
    return make(sparse_mode=mode, atten_mask=mask, **arguments)


def drawn(*slices: Slice, shape=(8, 8), make=dense, **arguments) -> KernelCall:
    """A mode-0 call whose mask allows some slices."""
    return make(atten_mask=AttenMask.full(shape, [Region.of(*slices)]), **arguments)


def dense_2048(**arguments) -> KernelCall:
    return dense(2048, 2048, **arguments)


def packed_2048(**arguments) -> KernelCall:
    return packed((2048, 4096), (2048, 4096), **arguments)


CAUSAL = Slice(0, 8, 0, 8, hi=0)
EYE = Slice(0, 8, 0, 8, lo=0, hi=0)
LATE = Slice(2, 8, 0, 8, hi=0)
SLOPES = spec(4, dtype=torch.float32)
LONG = {"sq": 2000, "skv": 2000, "batch": 1}


@dataclass
class Case:
    """A broken call, one that keeps the rule, and how both are asked."""

    bad: KernelCall
    good: KernelCall
    asked: dict[str, object] = field(default_factory=dict)
    good_asked: dict[str, object] | None = None


def compressed_bias(**arguments) -> KernelCall:
    return dense(**LONG, pse=spec(1, 4, 1024, 2000), pse_type=0, **arguments)


def drop(make=dense, size: int | None = None, **arguments) -> KernelCall:
    call = make(keep_prob=0.9, **arguments)
    size = dropout_bytes(call.numels) if size is None else size
    return replace(call, dropout_mask=spec(size, dtype=torch.uint8))


CASES: dict[str, list[Case]] = {
    # -- shapes --
    "argument-type": [
        Case(dense(scale="1"), dense(scale=1)),
        Case(dense(pre_tokens=1.5), dense(pre_tokens=1)),
        Case(packed(actual_seq_qlen=(4.0, 8)), packed()),
        *[
            Case(replace(dense(), **{name: wrong}), dense())
            for name, values in {
                "input_layout": (None, 3, ("BSH",)),
                "softmax_layout": (None, 3),
                "actual_seq_qlen": (5, [4, 8], (4, None), torch.tensor([4, 8]), "48"),
                "prefix": ((2**63,), (True,), 3.5),
                "pre_tokens": (-(2**63) - 1, 2**63, None, True),
                "seed": (None, 2**63),
                "scale": (None, 10**400, 1j),
                "sync": (None, "no", 1),
                "gen_mask_parallel": ([], 0.0),
            }.items()
            for wrong in values
        ],
        Case(dense(sync=0), dense(sync=True, seed=2**63 - 1, pre_tokens=-(2**63))),
    ],
    "layout-unknown": [Case(dense(input_layout="BSNH"), dense(input_layout="bnsd"))],
    "rank": [
        Case(dense(input_layout="BSH"), dense()),
        Case(dense(value=spec(8, 2, 16)), dense()),
    ],
    "head-num": [
        Case(dense(head_num=8), dense()),
        Case(dense(head_num=0), dense()),
        Case(
            KernelCall(*[spec(2, 8, 60)] * 3, head_num=8, input_layout="BSH"),
            KernelCall(*[spec(2, 8, 64)] * 3, head_num=8, input_layout="BSH"),
        ),
    ],
    "kv-heads": [
        Case(dense(heads=3), dense(heads=6)),
        Case(
            KernelCall(spec(2, 8, 64), spec(2, 8, 24), spec(2, 8, 24), 4, "BSH"),
            KernelCall(spec(2, 8, 64), spec(2, 8, 32), spec(2, 8, 32), 4, "BSH"),
        ),
    ],
    "varlen-lists": [
        Case(packed(actual_seq_qlen=None), packed()),
        Case(packed(actual_seq_kvlen=()), packed()),
        Case(packed(actual_seq_kvlen=(8,)), packed()),
    ],
    "varlen-dense": [Case(dense(actual_seq_qlen=(8,)), packed())],
    "dtype-mixed": [Case(dense(key=spec(2, 2, 8, 16, dtype=torch.float32)), dense())],
    "dtype": [
        Case(
            KernelCall(*[spec(1, 1, 4, 8, dtype=torch.float64)] * 3, 1, "BNSD"),
            KernelCall(*[spec(1, 1, 4, 8, dtype=torch.float64)] * 3, 1, "BNSD"),
            good_asked={"product": "emulator"},
        ),
        Case(KernelCall(*[spec(1, 1, 4, 8, dtype=torch.int8)] * 3, 1, "BNSD"), dense()),
    ],
    "batch-mismatch": [Case(dense(key=spec(1, 2, 8, 16), value=spec(1, 2, 8, 16)), dense())],
    "key-value-shape": [Case(dense(value=spec(2, 2, 9, 16)), dense(value=spec(2, 2, 8, 8)))],
    "head-dim-equal": [Case(dense(key=spec(2, 2, 8, 8)), dense())],
    "value-dim": [Case(dense(value=spec(2, 2, 8, 17)), dense(value=spec(2, 2, 8, 16)))],
    "head-dim-limit": [
        Case(
            KernelCall(*[spec(1, 1, 4, 769)] * 3, 1, "BNSD"),
            KernelCall(*[spec(1, 1, 4, 768)] * 3, 1, "BNSD"),
        ),
        Case(KernelCall(*[spec(1, 1, 4, 0)] * 3, 1, "BNSD"), dense()),
        Case(dense(value=spec(2, 2, 8, 0)), dense(value=spec(2, 2, 8, 1))),
    ],
    "heads-limit": [Case(dense(heads=258), dense(heads=256))],
    "batch-limit": [
        Case(
            packed(tuple(range(1, 2050)), tuple(range(1, 2050))),
            packed(tuple(range(1, 2049)), tuple(range(1, 2049))),
        ),
        Case(dense(batch=0), dense(batch=1)),
    ],
    "length-limit": [
        Case(dense(skv=1_000_001, batch=1), dense(skv=1_000_000, batch=1)),
    ],
    "varlen-total": [
        Case(packed(query=spec(7, 4, 16)), packed()),
        Case(packed(key=spec(7, 2, 16), value=spec(7, 2, 16)), packed()),
    ],
    "varlen-tail": [
        Case(packed(query=spec(9, 4, 16)), packed(q=(4, 8, 0), kv=(4, 8, 0))),
        Case(
            longer(q=(4, 8, 0), kv=(4, 8, 8)),
            longer(q=(4, 8, 0), kv=(4, 8, 0)),
        ),
        Case(longer(), packed(q=(4, 8, 0), kv=(4, 8, 8), query=spec(9, 4, 16))),
    ],
    "varlen-decreasing": [
        Case(packed(q=(4, 3), kv=(4, 8)), packed(q=(4, 4, 8, 0, 0), kv=(4, 5, 8, 0, 0))),
        Case(packed(q=(-1, 8), kv=(4, 8)), packed(q=(0, 8), kv=(0, 8))),
    ],
    # -- masks --
    "sparse-mode-range": [
        Case(dense(sparse_mode=7), square(6, prefix=(8, 8))),
        Case(dense(sparse_mode=-1), dense()),
        Case(packed(sparse_mode=5), square(6, packed, prefix=(4, 4))),
        Case(square(8, packed, input_layout="tnd"), square(8, packed, next_tokens=0)),
        Case(packed(sparse_mode=9), packed()),
    ],
    "mode-without-mask": [Case(dense(sparse_mode=3), dense(sparse_mode=1))],
    "window-without-mask": [Case(dense(next_tokens=0), dense(pre_tokens=8, next_tokens=8))],
    "mask-dtype": [
        Case(
            dense(atten_mask=AttenMask("full", (8, 8), None, torch.float32)),
            dense(atten_mask=AttenMask("full", (8, 8), None, torch.uint8)),
        )
    ],
    "mask-shape": [
        Case(
            dense(atten_mask=AttenMask.full((2, 1, 1, 8))),
            dense(atten_mask=AttenMask.full((2, 1, 8, 8))),
        ),
        Case(
            dense(atten_mask=AttenMask.full((1, 4, 8, 8))),
            dense(atten_mask=AttenMask.full((2, 4, 8, 8))),
        ),
        Case(packed(atten_mask=AttenMask.full((8, 4))), packed(atten_mask=AttenMask.full((4, 4)))),
        *[
            Case(
                packed(atten_mask=AttenMask.full((*bad, 4, 4))),
                packed(atten_mask=AttenMask.full((*good, 4, 4))),
            )
            for bad, good in (((1, 2), (1, 1)), ((3, 1), (2, 1)), ((1, 4), (2, 4)), ((1,), ()))
        ],
    ],
    "mask-compressed-shape": [
        Case(dense(sparse_mode=2, atten_mask=AttenMask.full((8, 8))), square(2)),
        Case(
            dense(sparse_mode=6, atten_mask=AttenMask.causal(), prefix=(1, 1)),
            square(6, prefix=(1, 1)),
        ),
        *[
            Case(
                make(sparse_mode=2, atten_mask=AttenMask.full((*lead, 2048, 2048))),
                long(sparse_mode=2, atten_mask=AttenMask.full((*lead, 2048, 2048))),
            )
            for make, long in ((dense, dense_2048), (packed, packed_2048))
            for lead in ((1, 1), (2, 1), (2, 4))
        ],
        Case(
            dense_2048(sparse_mode=2, atten_mask=AttenMask.full((1, 4, 2048, 2048))),
            dense_2048(sparse_mode=2, atten_mask=AttenMask.full((2, 4, 2048, 2048))),
        ),
    ],
    "mask-content": [
        Case(square(2), square(2), {"mask_facts": MaskFacts(is_canonical=False)}, {}),
        Case(
            dense(sparse_mode=2, atten_mask=AttenMask.full((2048, 2048), [Region.of(CAUSAL)])),
            dense(
                sparse_mode=2,
                atten_mask=AttenMask.full((2048, 2048), [AttenMask.causal().allowed()]),
            ),
        ),
    ],
    "mask-values": [
        Case(square(2), square(2), {"mask_facts": MaskFacts(is_binary=False)}, {}),
        Case(
            drawn(CAUSAL),
            drawn(CAUSAL),
            {"mask_facts": MaskFacts(is_binary=False)},
            {"mask_facts": MaskFacts(is_binary=True)},
        ),
    ],
    "mask-outside-window": [
        Case(drawn(CAUSAL, pre_tokens=6, next_tokens=0), drawn(CAUSAL, next_tokens=0)),
        Case(
            dense(atten_mask=AttenMask.full((8, 8)), pre_tokens=1),
            dense(atten_mask=AttenMask.full((8, 8)), pre_tokens=1),
            {"mask_facts": MaskFacts(cells_outside_window=3)},
            {"mask_facts": MaskFacts(cells_outside_window=0)},
        ),
    ],
    "rows-masked-packed": [
        Case(
            drawn(Slice(1, 4, 0, 4), shape=(4, 4), make=packed),
            drawn(Slice(0, 4, 0, 4), shape=(4, 4), make=packed),
        )
    ],
    "rows-averaged": [Case(drawn(LATE), drawn(LATE, inner_precise=2))],
    "mask-total-lengths": [
        Case(packed(atten_mask=AttenMask.full((8, 8))), packed(atten_mask=AttenMask.full((4, 4))))
    ],
    "mask-4d-packed": [
        Case(
            packed(atten_mask=AttenMask.full((1, 1, 4, 4))),
            packed(atten_mask=AttenMask.full((4, 4))),
        )
    ],
    "mode-5-mask": [
        Case(
            dense(sparse_mode=5, atten_mask=AttenMask.full((8, 8)), prefix=(3, 3)),
            dense(sparse_mode=5, atten_mask=AttenMask.full((2, 1, 8, 8)), prefix=(3, 3)),
        ),
        *[
            # Without a usable prefix the mode is not even looked at.
            Case(
                dense(sparse_mode=5, atten_mask=AttenMask.full((8, 8)), prefix=(3, 3)),
                dense(sparse_mode=5, atten_mask=AttenMask.full((8, 8)), prefix=prefix),
            )
            for prefix in (None, (3,), (3, 9))
        ],
    ],
    "window-dense": [
        Case(square(4, pre_tokens=-1, next_tokens=0), square(4, pre_tokens=-1, next_tokens=1)),
        Case(square(4, pre_tokens=3, next_tokens=-4), square(4, pre_tokens=4, next_tokens=-4)),
        Case(square(4, next_tokens=-8), square(4, next_tokens=-7)),
        Case(square(4, pre_tokens=-8), square(4, pre_tokens=-7)),
        Case(square(4, pre_tokens=-1, next_tokens=-1), square(4)),
        Case(drawn(EYE, pre_tokens=-8), drawn(EYE)),
    ],
    "window-packed": [
        Case(
            drawn(Slice(0, 4, 0, 4, hi=0), shape=(4, 4), make=packed, next_tokens=-1),
            drawn(Slice(0, 4, 0, 4, hi=0), shape=(4, 4), make=packed, next_tokens=0),
        ),
        Case(square(3, packed, kv=(3, 8)), square(3, packed, kv=(4, 9))),
        Case(square(4, packed, pre_tokens=-1), square(4, packed, pre_tokens=1)),
        Case(
            square(4, packed, kv=(4, 9), pre_tokens=5, next_tokens=-1),
            square(4, packed, kv=(5, 10), pre_tokens=5, next_tokens=-1),
        ),
        Case(
            square(4, packed, kv=(9, 18), pre_tokens=2, next_tokens=-3),
            square(4, packed, kv=(9, 18), pre_tokens=3, next_tokens=-3),
        ),
    ],
    "window-cut": [
        Case(square(7, packed, next_tokens=1), square(7, packed, next_tokens=0)),
        Case(
            square(7, packed, next_tokens=0, pre_tokens=3),
            square(7, packed, next_tokens=0, pre_tokens=4),
        ),
        Case(square(7, packed, kv=(3, 8), next_tokens=0), square(7, packed, next_tokens=0)),
        Case(square(8, packed, next_tokens=-1), square(8, packed, kv=(5, 9), next_tokens=-1)),
        # The cut sequence has no keys: mode 7 skips it, mode 8 does not.
        Case(
            square(7, packed, kv=(4, 4), next_tokens=1), square(7, packed, kv=(4, 4), next_tokens=0)
        ),
        Case(
            square(8, packed, kv=(0, 4), next_tokens=0), square(8, packed, kv=(0, 4), next_tokens=4)
        ),
        # Without a mask the mode means nothing.
        *[
            Case(square(mode, packed, next_tokens=1, pre_tokens=0), packed(sparse_mode=mode))
            for mode in (7, 8)
        ],
    ],
    "window-backward": [
        Case(
            square(4, packed, pre_tokens=0, next_tokens=0),
            square(4, packed, pre_tokens=0, next_tokens=0),
            {"training": True},
            {},
        ),
        Case(
            square(8, packed, pre_tokens=4, next_tokens=-4),
            square(8, packed, pre_tokens=5, next_tokens=-4),
            {"training": True},
        ),
        Case(
            square(4, pre_tokens=2, next_tokens=-3),
            square(4, pre_tokens=3, next_tokens=-3),
            {"training": True},
        ),
        # Mode 4 is anchored top-left first: -next may exceed Sq, but not Skv; -pre not Sq.
        Case(
            square(4, sq=3, skv=9, pre_tokens=12, next_tokens=-10),
            square(4, sq=3, skv=9, pre_tokens=8, next_tokens=-5),
            {"training": True},
        ),
        Case(
            square(4, sq=3, skv=9, pre_tokens=-4, next_tokens=5),
            square(4, sq=3, skv=9, pre_tokens=-3, next_tokens=5),
            {"training": True},
        ),
        # Empty sequences are looked at as well.
        Case(
            square(4, packed, q=(3, 3, 6), kv=(4, 4, 9), pre_tokens=5, next_tokens=-1),
            square(4, packed, q=(3, 6), kv=(4, 9), pre_tokens=5, next_tokens=-1),
            {"training": True},
        ),
        Case(
            drawn(EYE, make=packed, shape=(4, 4), q=(4, 4), kv=(4, 4), pre_tokens=-1),
            drawn(EYE, make=packed, shape=(4, 4), pre_tokens=-1),
            {"training": True},
        ),
    ],
    "prefix-count": [
        Case(square(6, prefix=(3,)), square(6, prefix=(3, 3))),
        Case(square(6), square(3)),
    ],
    "prefix-count-mode-5": [
        Case(
            dense(sparse_mode=5, atten_mask=AttenMask.full((2, 1, 8, 8)), prefix=prefix),
            dense(sparse_mode=5, atten_mask=AttenMask.full((2, 1, 8, 8)), prefix=(3, 3)),
        )
        for prefix in (None, (), (3,), (3, 3, 3))
    ],
    "prefix-unused": [
        *[Case(square(mode, prefix=(3, 3)), square(6, prefix=(3, 3))) for mode in (2, 3, 4)],
        Case(dense(prefix=(3, 3)), dense(prefix=())),
        Case(drawn(CAUSAL, prefix=(3, 3)), dense(sparse_mode=5, prefix=(3, 3))),
    ],
    "prefix-range": [
        Case(square(6, sq=4, prefix=(3, 4)), square(6, sq=4, prefix=(4, 8))),
        Case(square(6, prefix=(9, 9)), square(6, sq=9, prefix=(0, 8))),
    ],
    "prefix-range-mode-5": [
        Case(
            dense(sparse_mode=5, atten_mask=AttenMask.full((2, 1, 8, 8)), prefix=(9, 3)),
            dense(sparse_mode=5, atten_mask=AttenMask.full((2, 1, 8, 8)), prefix=(8, 3)),
        )
    ],
    "prefix-batch": [
        Case(square(6, batch=33, prefix=(8,) * 33), square(6, batch=32, prefix=(8,) * 32)),
        Case(
            square(6, batch=33, prefix=(8,) * 33),
            dense(sparse_mode=6, batch=33, prefix=(8,) * 33),
        ),
    ],
    # -- biases --
    "pse-type-range": [Case(dense(pse_type=4, pse=spec(1, 4, 8, 8)), dense())],
    "pse-missing": [Case(dense(pse_type=0), dense(pse_type=1)), Case(dense(pse_type=2), dense())],
    "pse-dtype": [
        Case(dense(pse=spec(1, 4, 8, 8, dtype=torch.float32)), dense(pse=spec(1, 4, 8, 8))),
        Case(dense(pse=spec(4), pse_type=2), dense(pse=SLOPES, pse_type=2)),
    ],
    "slopes-shape": [
        Case(dense(pse=replace(SLOPES, shape=(2,)), pse_type=2), dense(pse=SLOPES, pse_type=3)),
        Case(
            dense(pse=replace(SLOPES, shape=(4, 2)), pse_type=3),
            dense(pse=replace(SLOPES, shape=(2, 4)), pse_type=3),
        ),
    ],
    "pse-shape": [
        Case(dense(pse=spec(1, 1, 8, 8)), dense(pse=spec(2, 4, 8, 8))),
        Case(dense(pse=spec(1, 4, 1024, 8)), dense(pse=spec(1, 4, 1, 8))),
        Case(square(3, packed, pse=spec(1, 4, 4, 4)), square(3, packed, pse=spec(2, 4, 1024, 4))),
    ],
    "pse-compressed": [
        Case(
            compressed_bias(),
            compressed_bias(sparse_mode=3, atten_mask=AttenMask.causal()),
        ),
        Case(
            compressed_bias(sparse_mode=4, atten_mask=AttenMask.causal()),
            compressed_bias(atten_mask=AttenMask.full((2000, 2000)), next_tokens=0),
        ),
        # Packed, the widest window of mode 4 that ends on the diagonal is causal.
        *[
            Case(
                square(4, packed, pse=spec(1, 4, 1024, 4), **window),
                square(4, packed, pse=spec(1, 4, 1024, 4), pre_tokens=4, next_tokens=0),
            )
            for window in (
                {"pre_tokens": 3, "next_tokens": 0},
                {"pre_tokens": 4, "next_tokens": 1},
            )
        ],
    ],
    "slopes-square": [Case(dense(sq=7, pse=SLOPES, pse_type=2), dense(pse=SLOPES, pse_type=2))],
    "pse-packed-square": [
        Case(packed(kv=(5, 9), pse=SLOPES, pse_type=2), packed(pse=SLOPES, pse_type=2)),
        Case(
            packed(kv=(5, 9), pse=SLOPES, pse_type=2, sparse_mode=8),
            packed(pse=SLOPES, pse_type=2, sparse_mode=8),
        ),
    ],
    "pse-empty-sequence": [
        Case(packed(q=(4, 4), kv=(4, 4), pse=SLOPES, pse_type=2), packed(pse=SLOPES, pse_type=2))
    ],
    "pse-mode-7": [
        Case(
            square(7, packed, next_tokens=0, pse=SLOPES, pse_type=2),
            square(8, packed, next_tokens=0, pse=SLOPES, pse_type=2),
        ),
        Case(
            square(7, packed, next_tokens=0, pse=SLOPES, pse_type=2),
            packed(sparse_mode=7, pse=SLOPES, pse_type=2),
        ),
    ],
    "pse-mode-8": [
        Case(
            square(8, packed, q=(3, 7), next_tokens=0, pse=SLOPES, pse_type=2),
            square(
                8,
                packed,
                q=(3, 7),
                next_tokens=0,
                pse=SLOPES,
                pse_type=2,
                q_start_idx=(1,),
                kv_start_idx=(0,),
            ),
        ),
        Case(
            square(8, packed, q=(3, 7), next_tokens=0, pse=SLOPES, pse_type=2),
            packed(q=(3, 7), sparse_mode=8, pse=SLOPES, pse_type=2),
        ),
    ],
    "start-pair": [
        Case(
            dense(pse=SLOPES, pse_type=2, q_start_idx=(3,)),
            dense(pse=SLOPES, pse_type=2, q_start_idx=(3,), kv_start_idx=(0,)),
        )
    ],
    "start-length": [
        Case(
            dense(pse=SLOPES, pse_type=2, q_start_idx=(3, 4), kv_start_idx=(0, 0)),
            dense(pse=SLOPES, pse_type=2, q_start_idx=(3,), kv_start_idx=(0,)),
        )
    ],
    "start-unused": [
        Case(
            dense(pse=spec(1, 4, 8, 8), q_start_idx=(3,), kv_start_idx=(0,)),
            dense(pse=SLOPES, pse_type=2, q_start_idx=(3,), kv_start_idx=(0,)),
        )
    ],
    "start-empty-first": [
        Case(
            square(
                8,
                packed,
                q=(0, 8),
                kv=(0, 8),
                next_tokens=0,
                pse=SLOPES,
                pse_type=2,
                q_start_idx=(1,),
                kv_start_idx=(1,),
            ),
            square(
                8,
                packed,
                next_tokens=0,
                pse=SLOPES,
                pse_type=2,
                q_start_idx=(1,),
                kv_start_idx=(1,),
            ),
        )
    ],
    "pse-backward-shape": [
        Case(dense(pse=spec(1, 4, 1, 8)), dense(pse=spec(2, 4, 1, 8)), {"training": True}),
        Case(dense(pse=spec(1, 4, 1, 8)), dense(pse=spec(1, 4, 1, 8)), {"training": True}, {}),
    ],
    "pse-learnable": [
        Case(dense(pse=spec(1, 4, 8, 8)), dense(pse=spec(1, 4, 8, 8)), {"learnable_bias": True}, {})
    ],
    # -- the rest --
    "keep-prob-range": [
        Case(dense(keep_prob=0), dense(keep_prob=0), {}, {"version": "mindspeed"}),
        Case(dense(keep_prob=1.1), dense(keep_prob=0.5)),
        Case(dense(keep_prob=float("nan")), dense()),
    ],
    "scale-finite": [
        Case(dense(scale=float(wrong)), dense(scale=-3e38)) for wrong in ("nan", "inf", "-1e39")
    ],
    "padding-mask": [Case(dense(padding_mask=spec(2, 8)), dense())],
    "inner-precise": [Case(dense(inner_precise=3), dense(inner_precise=1))],
    "softmax-layout": [
        Case(dense(softmax_layout="TND"), packed(softmax_layout="TND")),
        Case(packed(softmax_layout="BNSD"), packed()),
    ],
    "softmax-layout-ignored": [
        Case(packed(softmax_layout="TND"), packed(softmax_layout="TND"), {}, {"version": "v1"}),
        Case(packed(softmax_layout="TND"), packed(softmax_layout="TND", sink=SLOPES)),
        Case(packed(softmax_layout="TND"), packed(softmax_layout="TND"), {}, {"product": "950"}),
    ],
    "sink-shape": [Case(dense(sink=replace(SLOPES, shape=(2,))), dense(sink=SLOPES))],
    "sink-dtype": [Case(dense(sink=spec(4)), dense(sink=SLOPES))],
    "sink-product": [Case(dense(sink=SLOPES), dense(sink=SLOPES), {"product": "950"}, {})],
    "dropout-mask": [Case(drop(size=16), drop()), Case(drop(packed, size=1), drop(packed))],
    "dropout-mask-unused": [Case(replace(drop(), keep_prob=1.0), drop())],
    "dropout-mask-numels": [
        Case(drop(), drop(), {"training": True}, {}),
        Case(drop(), drop(packed), {"training": True}),
    ],
    "dropout-count": [
        Case(
            packed(q=(0, 1, 1, 0), kv=(0, 2, 2, 7), keep_prob=0.9),
            packed(q=(0, 1, 1, 0), kv=(0, 2, 2, 0), keep_prob=0.9),
        ),
        Case(
            packed(q=(0, 1, 1, 0), kv=(0, 2, 2, 7), keep_prob=0.9),
            packed(q=(0, 1, 1, 0), kv=(0, 2, 2, 7)),
        ),
    ],
    "seed-overwritten": [
        Case(dense(keep_prob=0.9, seed=1), dense(seed=1)),
        Case(dense(keep_prob=0.9, seed=1), drop(seed=1)),
        Case(
            dense(keep_prob=0.9, seed=1),
            dense(keep_prob=0.9, seed=1),
            {},
            {"product": "950"},
        ),
    ],
    "mindspeed-dropout": [
        Case(dense(keep_prob=0.9), dense(keep_prob=0.9), {"version": "mindspeed"}, {})
    ],
    "version-cannot-express": [
        Case(dense(pse=SLOPES, pse_type=2), dense(pse=SLOPES, pse_type=2), {"version": "v1"}, {}),
        Case(dense(sink=SLOPES), dense(sink=SLOPES), {"version": "mindspeed"}, {"version": "v3"}),
        Case(drop(), drop(), {"version": "v3"}, {"version": "v1"}),
    ],
    "version-product": [
        Case(dense(), dense(), {"version": "v3", "product": "950"}, {"version": "v3"})
    ],
}


def test_every_rule_has_a_case():
    codes = [rule.code for rule in RULES]
    assert len(set(codes)) == len(codes)
    assert set(CASES) == set(codes)


def test_every_rule_says_what_must_hold_and_where_that_was_read():
    for rule in RULES:
        assert rule.layer in LAYERS, rule.code
        assert rule.source in SOURCES, rule.code
        assert rule.sentence[0].isupper(), rule.code
        assert rule.remedy.endswith("."), rule.code
    assert RULES[0].code == "argument-type"


def test_a_module_of_rules_that_is_reloaded_makes_them_again():
    reload(shapes)
    assert known_rules() == RULES
    assert [v.code for v in dense(head_num=0).violations()] == ["head-num"]


def test_a_code_is_given_to_one_rule():
    def rank(call, on):
        yield from ()

    with pytest.raises(CompositionError, match="'rank' is registered already"):
        make_rule(layer="torch", remedy="Nothing.")(rank)


@pytest.mark.parametrize("code", CASES)
def test_rule(code: str):
    for case in CASES[code]:
        broken = case.bad.violations(**case.asked)
        assert code in [v.code for v in broken], [str(v) for v in broken]
        asked = case.asked if case.good_asked is None else case.good_asked
        kept = case.good.violations(**asked)
        assert code not in [v.code for v in kept], [str(v) for v in kept]


def test_no_other_rule_is_asked_where_a_type_is_wrong():
    for case in CASES["argument-type"]:
        assert [v.code for v in case.bad.violations(training=True)] == ["argument-type"]
    huge = dense(head_num=10**5000, input_layout=["BSH"] * 10**5, prefix=(2**70,) * 10**5)
    (violation,) = huge.violations()
    assert len(str(violation)) < 700


def test_mode_5_reads_its_prefix_until_it_finds_a_fault():
    """An empty prefix turns the handling of empty rows on, unless one before it is out of range."""
    mask = AttenMask.full((2, 1, 8, 5))
    for prefix, wanted in (((0, 5), True), ((0, 9), True), ((9, 0), False), ((0,), False)):
        call = dense(skv=5, sparse_mode=5, atten_mask=mask, prefix=prefix)
        assert call.invalid_line == wanted, prefix
        assert (call.visited() is None) == (prefix != (0, 5)), prefix


def test_what_a_violation_says():
    (violation,) = dense(sparse_mode=3).violations()
    assert violation.layer == "silent"
    text = str(violation)
    for part in ("sparse_mode=3", "full attention", "Pass the 2048 x 2048", "[mode-without-mask]"):
        assert part in text


def test_one_error_carries_all_rules():
    broken = dense(sparse_mode=3, inner_precise=7, padding_mask=spec(1)).violations()
    error = contract_error(broken)
    assert isinstance(error, KernelContractError)
    assert isinstance(error, ValueError)
    assert not isinstance(error, TypeError)
    assert set(error.codes) == {"mode-without-mask", "inner-precise", "padding-mask"}
    error = contract_error(dense(pse=SLOPES).violations())
    assert isinstance(error, KernelContractTypeError)
    assert isinstance(error, TypeError)


def test_an_unknown_version_is_named():
    with pytest.raises(KernelContractError, match="'v9' is not one of v1, v2, v3, mindspeed"):
        dense().violations(version="v9")


def test_ordinary_calls_are_legal_everywhere():
    ordinary = [
        dense(),
        square(2),
        square(3, skv=12),
        square(4, pre_tokens=3, next_tokens=0),
        square(6, prefix=(3, 5)),
        packed(),
        square(3, packed, kv=(4, 12)),
        drawn(CAUSAL, next_tokens=0),
        dense(keep_prob=0.9),
    ]
    for call in ordinary:
        for version, product in (("v1", "A2"), ("v2", "A3"), ("v2", "950"), ("v3", "A2")):
            found = call.violations(version=version, product=product, training=True)
            assert not found, [str(v) for v in found]
