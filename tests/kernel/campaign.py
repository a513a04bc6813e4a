"""Random kernel calls, legal and illegal, against the contract's second statement.

    python -m tests.kernel.campaign --count 20000 --seed 1

Every call is drawn from its own seed, ``SEED:NUMBER``, which a failure names and ``--only NUMBER``
repeats. A legal call must give the output, the statistics, the gradients (by autograd, and by
`fusion_attention_grad` from its own and from merged statistics) of `tests.kernel.oracle`; an
illegal one must name exactly the rules that the oracle names, in the forward and in the gradient,
and nothing may raise anything but an error of the contract.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
import torch

from attnkit.errors import KernelContractError
from attnkit.kernel import RULES, fusion_attention, fusion_attention_grad
from tests.kernel import oracle
from tests.kernel.oracle import Call, Sizes

__all__ = ["check"]

TENSORS = ("query", "key", "value")
STEPPED = [-(2**63), -(2**40), -9, -3, -2, -1, 0, 1, 2, 3, 5, 9, 2**31 - 1, 2**63 - 1]
TRIU, PREFIX = oracle.CAUSAL, oracle.PREFIX


# -- drawing -----------------------------------------------------------------------------


class Draw:
    """One call, drawn from a seed."""

    def __init__(self, seed: str) -> None:
        self.rng = random.Random(seed)
        self.torch = torch.Generator().manual_seed(self.rng.getrandbits(40))

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def pick(self, *options: Any) -> Any:
        return self.rng.choice(options)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(shape, generator=self.torch, dtype=torch.float64).to(dtype)

    def bits(self, share: float, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.torch) < share

    def length(self, scale: int) -> int:
        return self.rng.randint(scale // 2 + 1, scale + scale // 2)

    def window(self, size: int) -> int:
        if self.chance(0.3):
            return self.pick(2**31 - 1, 2**63 - 1, size)
        return self.rng.randint(-2 if self.chance(0.2) else 0, size + 2)

    def call(self) -> Call:
        """Draw a call that is likely to be legal."""
        call = oracle.defaults()
        layout = self.pick("BSH", "SBH", "BSND", "BNSD", "TND", "TND", "TND")
        scale = self.pick(*[5] * 60, *[9] * 36, 150, 300, 700, 1100)
        small = scale < 100
        kv_heads, group = (self.rng.randint(1, 3), self.rng.randint(1, 3)) if small else (1, 2)
        heads, dim = kv_heads * group, self.rng.randint(1, 8)
        value_dim = self.pick(dim, dim, self.rng.randint(1, dim))
        pairs, batch = self.lengths(layout, scale)
        double = torch.float64
        dtype = self.pick(*[double] * 44, *[torch.float32] * 4, torch.float16, torch.bfloat16)
        side = [(heads, dim, 0), (kv_heads, dim, 1), (kv_heads, value_dim, 1)]
        for name, (n, d, k) in zip(TENSORS, side, strict=True):
            tensor = self.normal(*_shape(layout, batch, pairs, n, d, k), dtype=dtype)
            call[name] = self.strided(tensor * (20 if dtype == double and self.chance(0.05) else 1))
        call |= {"head_num": heads, "input_layout": layout}
        if layout == "TND":
            zeros = [0] * self.rng.randint(1, 2) if self.chance(0.2) else []
            for k, name in enumerate(("actual_seq_qlen", "actual_seq_kvlen")):
                call[name] = [int(n) for n in np.cumsum([pair[k] for pair in pairs])] + zeros
            pairs = pairs + [(0, 0)] * len(zeros)
            if zeros and self.chance(0.5):
                for name in TENSORS:
                    spare = self.normal(self.rng.randint(1, 3), *call[name].shape[1:], dtype=dtype)
                    call[name] = torch.cat([call[name], spare])
        elif self.chance(0.1):
            call["input_layout"] = layout.lower()
        call["scale"] = self.pick(1.0, 1, 0.25, 0.5, -0.5, 0.0, 3e-3)
        call["inner_precise"] = self.pick(0, 0, 0, 1, 2)
        self.add_mask(call, oracle.sizes_of(call))
        self.add_bias(call, oracle.sizes_of(call))
        self.add_rest(call, oracle.sizes_of(call))
        return call

    def strided(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the same numbers, sometimes far apart in memory."""
        return torch.stack([tensor, -tensor], -1)[..., 0] if self.chance(0.15) else tensor

    def lengths(self, layout: str, scale: int) -> tuple[list[tuple[int, int]], int]:
        if layout != "TND":
            sq = self.length(scale)
            skv = self.pick(sq, sq, self.length(scale))
            batch = self.rng.randint(1, 3) if scale < 100 else 1
            return [(sq, skv)], 33 if scale == 5 and self.chance(0.02) else batch
        pairs = []
        for _ in range(self.rng.randint(1, 4) if scale < 100 else 2):
            q = self.length(scale)
            longer = q + self.length(scale) // 2
            pairs.append((q, self.pick(q, q, q, longer, longer, self.length(scale))))
        if self.chance(0.3):
            b = self.rng.randrange(len(pairs) + 1)
            pairs.insert(b, self.pick((0, 0), (0, 3), (2, 0)))
        elif self.chance(0.5):
            pairs = [(q, q) for q, _ in pairs]
        return pairs, 1

    def add_mask(self, call: Call, s: Sizes) -> None:
        mode = self.pick(*((0, 1, 2, 3, 4, 6, 7, 8) if s.packed else (0, 1, 2, 3, 4, 5, 6)))
        if self.chance(0.2):
            call["sparse_mode"] = self.pick(0, 0, 0, 1, mode)
            return
        call["sparse_mode"] = mode
        pre, nxt = self.window(s.skv), self.window(s.skv)
        if mode in (0, 4) or self.chance(0.2):
            call |= {"pre_tokens": pre, "next_tokens": nxt}
        if mode in (7, 8):
            call["pre_tokens"] = self.pick(2**31 - 1, s.skv, s.skv + 1)
            call["next_tokens"] = self.rng.randint(-2, 0 if mode == 7 else 3)
        if mode in (5, 6):
            ranges = [(max(0, kv - q), kv) for q, kv in s.pairs]
            call["prefix"] = [self.rng.randint(*ends) for ends in ranges]
        if mode in (2, 3, 4, 7, 8):
            call["atten_mask"] = TRIU
        elif mode == 6:
            call["atten_mask"] = PREFIX
        else:
            call["atten_mask"] = ~self.cells(call, s)
        if self.chance(0.2):
            call["atten_mask"] = call["atten_mask"].to(torch.uint8)

    def cells(self, call: Call, s: Sizes) -> torch.Tensor:
        """Cells that a mask of mode 0, 1 or 5 allows, most likely some in every row."""
        b, n, mode = len(s.pairs), s.heads, call["sparse_mode"]
        lead = () if s.packed else self.pick((), (1, 1), (b, 1), (b, n))
        if mode == 5 and self.chance(0.9):
            lead = self.pick((b, 1), (b, n))
        allowed = self.bits(self.pick(0.3, 0.6, 1.0), *lead, s.sq, s.skv)
        if self.chance(0.9):
            allowed[..., 0] = True
        ahead = torch.arange(s.skv) - torch.arange(s.sq)[:, None]
        if mode == 0 and self.chance(0.9):
            pre, nxt = (max(-(2**40), min(2**40, call[x])) for x in ("pre_tokens", "next_tokens"))
            inside = (ahead >= -pre) & (ahead <= nxt)
            if self.chance(0.8):
                # A cell of each row that has any, so that short windows leave no row empty.
                allowed |= inside & (inside.cumsum(-1) == 1)
            allowed &= inside
        return allowed

    def add_bias(self, call: Call, s: Sizes) -> None:
        unequal = s.packed and any(q != kv or not q for q, kv in s.pairs)
        if self.chance(0.9 if unequal and call["sparse_mode"] != 8 else 0.4):
            return
        dtype, kind, b = call["query"].dtype, self.pick(0, 1, 2, 3), len(s.pairs)
        call["pse_type"] = kind
        lead = self.pick(1, b)
        if kind in (2, 3):
            shape = self.pick((s.heads,), (b, s.heads))
            call["pse"] = self.normal(*shape).abs().to(torch.float32) / 4
            moved = s.pairs[0][1] - s.pairs[0][0] if call["sparse_mode"] == 8 else None
            if moved or self.chance(0.3):
                start = self.rng.randint(-3, 9)
                call["kv_start_idx"] = [start]
                call["q_start_idx"] = [start + (moved or self.rng.randint(-4, 4))]
            if moved and not self.chance(0.9):
                call["q_start_idx"][0] += 1
        elif s.packed or s.sq > 1024:
            distance = torch.arange(1024)[:, None] - torch.arange(s.skv) + s.skv - 1024
            values = self.normal(lead, s.heads, s.skv + 1024)
            call["pse"] = values[:, :, distance + 1024 * (distance < 0)].to(dtype)
        else:
            rows = self.pick(s.sq, s.sq, 1)
            call["pse"] = self.normal(lead, s.heads, rows, s.skv, dtype=dtype)

    def add_rest(self, call: Call, s: Sizes) -> None:
        if self.chance(0.2):
            call["sink"] = self.normal(s.heads, dtype=torch.float32)
        if s.packed and self.chance(0.3):
            call["softmax_layout"] = "TND"
        if self.chance(0.25):
            call["keep_prob"] = self.pick(0.3, 0.5, 0.9, np.float32(0.75))
            if self.chance(0.3):
                count = oracle.decisions(call, s)
                size = -(-max(count, 0) // 128) * 16
                packed = torch.randint(0, 256, (size,), generator=self.torch, dtype=torch.uint8)
                call["dropout_mask"] = packed

    # -- spoiling ------------------------------------------------------------------------

    def spoil(self, call: Call) -> None:
        """Change something, most often to what is not allowed."""
        self.pick(
            *[self.spoil_numbers] * 5,
            *[self.spoil_mask] * 4,
            *[self.spoil_bias] * 4,
            *[self.spoil_lists] * 3,
            *[self.spoil_shapes] * 3,
            self.spoil_rest,
            self.spoil_rest,
        )(call)

    def spoil_numbers(self, call: Call) -> None:
        name, values = self.pick(
            ("pre_tokens", STEPPED),
            ("pre_tokens", STEPPED),
            ("next_tokens", STEPPED),
            ("next_tokens", STEPPED),
            ("sparse_mode", list(range(-1, 11))),
            ("sparse_mode", list(range(9))),
            ("pse_type", [-1, 0, 1, 2, 3, 4]),
            ("inner_precise", [-1, 0, 1, 2, 3]),
            ("keep_prob", [0, 0.0, 1.5, -1.0, float("nan"), float("inf"), 0.5]),
            ("scale", [float("nan"), float("inf"), float("-inf"), 1e300]),
            ("seed", [1, -(2**63), 2**63 - 1]),
            ("offset", [4]),
            ("head_num", [-1, 0, 1, 2, 3, 4, 257]),
            ("softmax_layout", ["", "TND", "BNSD", "tnd"]),
            ("input_layout", ["BSH", "SBH", "BNSD", "BSND", "TND", "tnd", "", "BNS"]),
        )
        call[name] = self.pick(*values)

    def spoil_mask(self, call: Call) -> None:
        mask, s = call["atten_mask"], oracle.sizes_of(call)
        b, n = len(s.pairs), s.heads
        if s.packed and self.chance(0.2):
            totals = (sum(q for q, _ in s.pairs), sum(kv for _, kv in s.pairs))
            call |= {"atten_mask": torch.zeros(totals).bool(), "sparse_mode": self.pick(0, 1)}
        elif mask is None or self.chance(0.5):
            leads = [(), (1, 1), (b, 1), (b, n), (1, n), (b,), (2, 2)]
            sides = [(s.sq, s.skv), (1, s.skv), (s.skv, s.sq), (s.sq, s.skv + 1)]
            sides.append((sum(q for q, _ in s.pairs), sum(kv for _, kv in s.pairs)))
            shape = (*self.pick(*leads), *self.pick(sides[0], *sides))
            call["atten_mask"] = self.pick(None, ~self.bits(0.8, *shape), TRIU, PREFIX)
        elif self.chance(0.3):
            call["atten_mask"] = mask.to(self.pick(torch.float16, torch.int32, torch.float32))
        elif self.chance(0.4):
            call["atten_mask"] = mask.to(torch.uint8) * self.pick(2, 255)
        else:
            changed = mask.clone()
            place = tuple(self.rng.randrange(size) for size in mask.shape)
            changed[place] = 1 - int(changed[place])
            call["atten_mask"] = self.pick(changed, mask.logical_not())

    def spoil_bias(self, call: Call) -> None:
        s, dtype = oracle.sizes_of(call), call["query"].dtype
        b, n = len(s.pairs), s.heads
        what = self.rng.randrange(5)
        if what == 0:
            shape = self.pick(
                (b, n, s.sq, s.skv), (1, n, s.sq, s.skv), (1, n, 1, s.skv), (b, n, 1, s.skv),
                (1, 1, s.sq, s.skv), (1, n, 1024, s.skv), (b, n, 1024, s.skv), (n, s.sq, s.skv),
                (n,), (b, n), (n, b), (b + 1, n), (1, n, s.sq, s.skv + 1),
            )  # fmt: skip
            # Rows that are all the same depend on the distance, and on nothing.
            call["pse"] = torch.ones(shape, dtype=self.pick(dtype, dtype, torch.float32))
        elif what == 1 and call["pse"] is not None:
            dtypes = (torch.float16, torch.float32, torch.float64, torch.bfloat16)
            call["pse"] = call["pse"].to(self.pick(*dtypes))
        elif what == 2:
            names = ("q_start_idx", "kv_start_idx")
            call[self.pick(*names)] = self.pick(None, [], [0], [3], [1, 2], [-(2**40)])
        elif what == 3 and call["pse"] is not None:
            call["pse"] = call["pse"].clone().requires_grad_()
        else:
            call["pse"] = None

    def spoil_lists(self, call: Call) -> None:
        s = oracle.sizes_of(call)
        b = len(s.pairs)
        if self.chance(0.4):
            prefix = [self.rng.randint(-1, s.skv + 1) for _ in range(self.pick(b, b, b + 1, 1))]
            call["prefix"] = self.pick(None, [], prefix, prefix, prefix)
            return
        if s.packed and self.chance(0.35):
            # One list ends in a zero and the other does not: the count of decisions turns.
            call["actual_seq_qlen"] = [*call["actual_seq_qlen"], 0]
            ends = call["actual_seq_kvlen"]
            call["actual_seq_kvlen"] = [*ends, ends[-1] + self.rng.randint(0, 2)]
            call["keep_prob"] = 0.5
            call["key"], call["value"] = (
                torch.cat([t, t.new_zeros(2, *t.shape[1:])]) for t in (call["key"], call["value"])
            )
            return
        name = self.pick("actual_seq_qlen", "actual_seq_kvlen")
        given = list(call[name] or [s.sq])
        place = self.rng.randrange(len(given))
        changed = [*given]
        changed[place] += self.pick(-2, -1, 1, 2, -1000)
        longer = [*given, self.pick(0, given[-1], given[-1] + 1)]
        call[name] = self.pick(None, [], changed, changed, longer, given[:-1], [0, *given])

    def spoil_shapes(self, call: Call) -> None:
        name = self.pick(*TENSORS)
        tensor = call[name]
        axis = self.rng.randrange(tensor.dim())
        what = self.rng.randrange(5) if tensor.numel() else 4
        if what == 0:
            call[name] = tensor.narrow(axis, 0, tensor.shape[axis] - 1)
        elif what == 1:
            call[name] = torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
        elif what == 2:
            call[name] = tensor.to(self.pick(torch.float16, torch.float32, torch.int32))
        elif what == 3:
            call[name] = self.pick(tensor[None], tensor[0], tensor.flatten())
        else:
            for name in TENSORS:
                call[name] = call[name].narrow(axis % 3, 0, 0)

    def spoil_rest(self, call: Call) -> None:
        s = oracle.sizes_of(call)
        what = self.rng.randrange(3)
        if what == 0:
            shape = self.pick((s.heads,), (s.heads + 1,), (1, s.heads), ())
            call["sink"] = torch.zeros(shape, dtype=self.pick(torch.float32, torch.float16))
        elif what == 1:
            size = self.pick(16, 32, 0, (8, 2))
            dtype = self.pick(torch.uint8, torch.bool)
            call["dropout_mask"] = torch.zeros(size, dtype=dtype)
        else:
            call["padding_mask"] = torch.zeros(2, 2)

    def wrong_type(self, call: Call) -> None:
        """Change something to what no binding takes."""
        names, values = self.pick(
            (("query", "key", "value"), [None, 3, [[1.0]], "q"]),
            (("pse", "atten_mask", "sink", "padding_mask"), [3, "no", [1, 2], np.zeros(2)]),
            (("head_num", "sparse_mode", "pre_tokens", "next_tokens"), [None, 1.5, "3", 2**63]),
            (("pse_type", "inner_precise", "seed", "offset"), [None, [1], 1j, -(2**63) - 1]),
            (("scale", "keep_prob"), [None, "1", [1.0], 10**400, 1j]),
            (("input_layout", "softmax_layout"), [None, 3, ["BSH"], b"BSH"]),
            (("prefix", "actual_seq_qlen", "q_start_idx"), [3, "34", [1.5], [None], {3, 4}]),
            (("actual_seq_kvlen", "kv_start_idx"), [torch.tensor([3]), [2**63], {}, 0.5]),
            (("sync", "gen_mask_parallel"), [None, "no", 2, [], torch.zeros(3)]),
        )
        call[self.pick(*names)] = self.pick(*values)


def _shape(
    layout: str, batch: int, pairs: list[tuple[int, int]], n: int, d: int, side: int
) -> tuple[int, ...]:
    s = pairs[0][side]
    return {
        "BSH": (batch, s, n * d),
        "SBH": (s, batch, n * d),
        "BSND": (batch, s, n, d),
        "BNSD": (batch, n, s, d),
        "TND": (sum(pair[side] for pair in pairs), n, d),
    }[layout]


# -- judging -----------------------------------------------------------------------------


def attempt(run: Any, call: Call) -> tuple[Any, set[str]]:
    """Return a result, or the codes of the rules that were named instead."""
    try:
        return run(**call), set()
    except KernelContractError as error:
        told, codes = str(error), set(error.codes)
    assert codes, f"an error without a code: {told}"
    assert len(told) < 6000, "the message is too long"
    return None, codes


def close(name: str, found: torch.Tensor, wanted: torch.Tensor, rounding: float) -> None:
    """Compare relative to the largest number; those that mark rows without a key, by ratio."""
    assert found.shape == wanted.shape, f"{name} is {found.shape}, not {wanted.shape}"
    if not found.numel():
        return
    found, wanted = found.detach().double(), wanted.detach().double()
    marks = wanted.abs() > 1e30
    largest = wanted.abs().masked_fill(marks, 0.0).max()
    size = torch.where(marks, wanted.abs(), 1 + largest)
    gap = float(((found - wanted).abs() / size).max())
    assert gap <= rounding, f"{name} is off by {gap:.3g}, allowed are {rounding:.3g}"


def rounding_of(dtype: torch.dtype) -> float:
    """What rounding may do: a few dozen steps lie between inputs and results."""
    return 1e-11 if dtype == torch.float64 else 256 * torch.finfo(dtype).eps


def compare(call: Call, out: Any, names: list[str], draw: Draw) -> None:
    """Compare a legal call with the oracle: outputs, statistics, gradients."""
    dtype, sizes = call["query"].dtype, oracle.sizes_of(call)
    single = 1e-4 if dtype != torch.float64 else 1e-11
    exact = {**call} | {name: call[name].detach().double().requires_grad_() for name in names}
    wanted, peak, total = oracle.attention(exact, out.seed, out.offset)
    close("attention_out", out.attention_out, wanted, rounding_of(dtype))
    for name, want in (("softmax_max", peak), ("softmax_sum", total)):
        copies = getattr(out, name)
        assert copies.shape[-1] == 8, name
        assert torch.equal(copies, copies[..., :1].expand_as(copies)), f"copies of {name} differ"
        close(name, copies[..., 0], want, single)
    assert out.numels == oracle.decisions(call, sizes), "numels"
    dy = draw.strided(draw.normal(*wanted.shape, dtype=dtype))
    inputs = [exact[name] for name in names]
    found = torch.autograd.grad(wanted, inputs, dy.double(), materialize_grads=True)
    gradients = dict(zip(names, found, strict=True))
    if out.attention_out.requires_grad:
        found = torch.autograd.grad(out.attention_out, [call[name] for name in names], dy)
        close_gradients("autograd", dict(zip(names, found, strict=True)), gradients, dtype)
    if call["dropout_mask"] is None:
        compare_grad_op(call, out, dy, gradients)


def close_gradients(
    way: str, found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    for name, want in wanted.items():
        # A float32 sink beside float64 operands has a gradient of float32.
        rounding = max(rounding_of(dtype), rounding_of(found[name].dtype))
        close(f"the gradient of {name} by {way}", found[name], want, rounding)


def compare_grad_op(
    call: Call, out: Any, dy: torch.Tensor, gradients: dict[str, torch.Tensor]
) -> None:
    """Compare the grad op, from statistics of both kinds; it has rules of its own."""
    given = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in call.items()}
    del given["dropout_mask"]
    given |= {"seed": out.seed, "offset": out.offset, "numels": out.numels}
    given |= {"dy": dy, "attention_in": out.attention_out.detach()}
    rules = oracle.broken({**call, "seed": 0, "offset": 0}, training=True)
    lse = out.softmax_max + out.softmax_sum.log()
    statistics = [(out.softmax_max, out.softmax_sum)]
    # Rows without a key have no logarithm that would do.
    if not ((out.softmax_sum == 0) | (out.softmax_sum > 1e30)).any():
        statistics.append((lse, torch.ones_like(lse)))
    for peak, total in statistics:
        stats = {"softmax_max": peak, "softmax_sum": total}
        found, codes = attempt(fusion_attention_grad, {**given, **stats})
        assert codes == rules, f"the grad op names {sorted(codes)}, not {sorted(rules)}"
        if not codes:
            close_gradients("the grad op", found._asdict(), gradients, dy.dtype)


def check(seed: str) -> tuple[str, set[str]]:
    """Draw a call, run it and judge it; returns its kind, and the rules that it breaks."""
    draw = Draw(seed)
    call = draw.call()
    wrong_type = draw.chance(0.05)
    if wrong_type:
        draw.wrong_type(call)
    else:
        for _ in range(draw.pick(0, 0, 0, 0, 1, 2)):
            if not oracle.structure(call):
                draw.spoil(call)
    training = draw.chance(0.7)
    names = [n for n in (*TENSORS, "sink") if isinstance(call[n], torch.Tensor)]
    if training:
        trained = [n for n in names if call[n].is_floating_point()]
        training = bool(trained)
        for name in trained:
            call[name] = call[name].detach().clone().requires_grad_()
    expected = {"argument-type"} if wrong_type else oracle.broken(call, training)
    torch.manual_seed(draw.rng.getrandbits(30))
    out, codes = attempt(fusion_attention, call)
    assert codes == expected, f"names {sorted(codes)}, not {sorted(expected)}"
    if not codes:
        compare(call, out, names, draw)
        return f"legal {'packed' if call['input_layout'] == 'TND' else 'dense'}", codes
    # What is silent is computed when asked for; whatever comes, nothing foreign is raised.
    attempt(fusion_attention, {**call, "allow_silent": True})
    dummy = torch.zeros(1)
    stats = dict.fromkeys(("dy", "softmax_max", "softmax_sum", "attention_in"), dummy)
    plain = {n: v for n, v in call.items() if n != "dropout_mask"} | stats
    _, named = attempt(fusion_attention_grad, plain)
    if wrong_type:
        assert named == {"argument-type"}, f"the grad op names {sorted(named)}"
        return "wrong type", codes
    # The gradient draws nothing, so the rules about seeds and bits are not its own.
    given = {**call, "seed": 0, "offset": 0, "dropout_mask": None}
    rules = oracle.broken(given, training=True)
    if rules:
        assert named == rules, f"the grad op names {sorted(named)}, not {sorted(rules)}"
    return "illegal", codes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="the first number")
    parser.add_argument("--only", type=int, help="repeat one call, with its traceback")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.only is not None:
        print(check(f"{given.seed}:{given.only}"))
        return 0
    kinds: Counter[str] = Counter()
    rules: Counter[str] = Counter()
    begun = time.monotonic()
    for done, number in enumerate(range(given.start, given.start + given.count)):
        if done and done % 500 == 0:
            print(f"{done} done: {dict(kinds)}", file=sys.stderr, flush=True)
        try:
            kind, codes = check(f"{given.seed}:{number}")
            kinds[kind] += 1
            rules.update(codes)
        except Exception as error:
            kinds["WRONG"] += 1
            text = str(error).splitlines()[0] if str(error) else ""
            print(f"{given.seed}:{number}: {type(error).__name__}: {text}", flush=True)
    print(f"seed {given.seed}: {dict(kinds)} in {time.monotonic() - begun:.0f} s")
    never = sorted({rule.code for rule in RULES} - rules.keys())
    print(f"{len(rules)} rules were broken; none of {', '.join(never)}")
    return int(bool(kinds["WRONG"]))


if __name__ == "__main__":
    sys.exit(main())
