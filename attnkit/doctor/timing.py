"""How long plans take, beside the same call with a dense mask and beside torch's own function.

The contestants take turns, so that a machine that slows down slows all of them; the device is
synchronised around each run, and medians are told.

The planner's estimate is linear in what it counts: floating-point operations, bytes moved,
launches and small launches. Its coefficients, turned over for the first two, are its weights;
least squares fit them to measured times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit.backends import Operands, run_plan
from attnkit.doctor.cases import Case
from attnkit.doctor.clock import Clock, alternate
from attnkit.doctor.findings import Machine
from attnkit.doctor.suite import make_case_plan
from attnkit.errors import BackendRefused
from attnkit.kernel import AttenMask
from attnkit.masks import Causal, Columns, Documents, Full, Mask, PrefixLM, SlidingWindow
from attnkit.planner.calls import Solution
from attnkit.planner.price import chip

__all__ = ["Fit", "Timing", "fit_weights", "make_timing_cases", "samples_of", "time_case"]

_CAUSAL = Causal()
_NAMES = ("flops_per_ns", "bytes_per_ns", "launch_ns", "small_launch_ns")
_RATES = ("flops_per_ns", "bytes_per_ns")

Sample = tuple[Mapping[str, float], float]


@dataclass(frozen=True)
class Timing:
    """The median nanoseconds of a forward pass in each form, and what the plans count.

    `plan`, `dense` and `sdpa` are medians; None where a form could not run. `plan_counts` and
    `dense_counts` are the items of the planner's price.
    """

    name: str
    length: int
    rounds: int = 0
    plan: float | None = None
    dense: float | None = None
    sdpa: float | None = None
    plan_counts: dict[str, float] = field(default_factory=dict)
    dense_counts: dict[str, float] = field(default_factory=dict)
    calls: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def make_timing_cases(machine: Machine, quick: bool) -> Iterator[Case]:
    """Yield the compositions to time, at lengths that suit the machine."""
    real = machine.is_hardware
    lengths = (1024, 4096) if quick else (512, 1024, 2048, 4096, 8192)
    heads, dim = (8, 128) if real else (2, 32)
    for length in lengths if real else (128 if quick else 256,):
        window = _CAUSAL & SlidingWindow(length // 8)
        named: dict[str, Mask] = {
            "full": Full(),
            "causal": _CAUSAL,
            "window": window,
            "prefix": PrefixLM(length // 4),
            "documents": _CAUSAL & Documents([length // 4] * 4),
            "window-and-first-keys": window | (_CAUSAL & Columns(0, 64)),
        }
        for name, mask in named.items():
            yield Case(
                f"{name}-{length}",
                mask,
                batch=1,
                q_len=length,
                kv_len=length,
                heads=heads,
                kv_heads=heads,
                dim=dim,
                value_dim=dim,
                merges=name == "window-and-first-keys",
            )


def time_case(case: Case, machine: Machine) -> Timing:
    """Time a composition as planned, with a dense mask, and with torch's own function."""
    try:
        return _time(case, machine)
    except Exception as error:  # such as a device out of memory: the next may fit again
        return Timing(case.name, case.q_len, notes=(f"{type(error).__name__}: {error}",))


def _time(case: Case, machine: Machine) -> Timing:
    dtype, rounds = (torch.bfloat16, 20) if machine.is_hardware else (torch.float32, 3)
    given, device = case.inputs(dtype), machine.device
    q, k, v = (t.to(device) for t in (given.query, given.key, given.value))
    allowed = case.mask.materialize(case.q_len, case.kv_len).to(device)
    plans = {"plan": make_case_plan(case, given, machine.backends[0], device)}
    if plans["plan"].calls:  # where the kernel takes a mask of one entry per cell as well
        with suppress(BackendRefused):
            plans["dense"] = make_case_plan(_densely(case), given, machine.backends[0], device)
    forms: dict[str, Callable[[], object]] = {
        name: partial(run_plan, plan, Operands(q, k, v)) for name, plan in plans.items()
    }
    forms["sdpa"] = partial(_sdpa, q, k, v, allowed)
    with torch.no_grad():
        times, notes = alternate(forms, Clock(torch.device(device)), rounds)
    # A plan without calls of the fused kernel has nothing that its price counts.
    counts = {n: Solution(p.steps).price.to_dict() for n, p in plans.items() if p.steps}
    return Timing(
        case.name,
        case.q_len,
        rounds,
        *(times.get("plan"), times.get("dense"), times.get("sdpa")),
        *(counts.get("plan", {}), counts.get("dense", {})),
        tuple(step.label for step in plans["plan"].steps),
        notes,
    )


def _densely(case: Case) -> Case:
    """Return a case of one call that reads a mask of one entry per cell."""
    region = case.mask.region(case.q_len, case.kv_len)
    mask = AttenMask.full((case.q_len, case.kv_len), [region])
    rows = (("inner_precise", 2),) if region.empty_rows(case.q_len) else ()
    return replace(case, mask=Full(), call=(("atten_mask", mask), ("sparse_mode", 1), *rows))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    query, key, value = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)


@dataclass(frozen=True)
class Fit:
    """Weights as the planner's chip table holds them, and how well they explain the times.

    `kept` are the weights that these measurements do not tell, left as they were;
    `median_error` and `worst_error` are relative.
    """

    weights: dict[str, float]
    kept: tuple[str, ...]
    samples: int
    median_error: float
    worst_error: float


def samples_of(timings: Iterable[Timing]) -> list[Sample]:
    """Return (counts, nanoseconds) of every form of the kernel that was timed."""
    return [
        (counts, taken)
        for one in timings
        for counts, taken in ((one.plan_counts, one.plan), (one.dense_counts, one.dense))
        if taken
    ]


def fit_weights(samples: Sequence[Sample]) -> Fit | None:
    """Return the weights that explain the samples best; None where there are too few.

    Errors count relative to the measured time, so that short calls weigh as much as long ones.
    A weight that comes out negative is one that the samples do not tell: it stays what it is.
    """
    if len(samples) < len(_NAMES) + 1:
        return None
    rows = torch.tensor([_features(counts) for counts, _ in samples], dtype=torch.float64)
    times = torch.tensor([taken for _, taken in samples], dtype=torch.float64)
    known = [_coefficient(name, float(getattr(chip(), name))) for name in _NAMES]
    found = torch.tensor(known, dtype=torch.float64)
    free = [k for k in range(len(_NAMES)) if bool(rows[:, k].any())]
    while free:
        fixed = [k for k in range(len(_NAMES)) if k not in free]
        rest = times - rows[:, fixed] @ found[fixed]
        scaled = rows[:, free] / times[:, None]
        units = scaled.abs().amax(0)
        wanted = (rest / times)[:, None]
        solved = torch.linalg.lstsq(scaled / units, wanted, driver="gelsd").solution[:, 0] / units
        negative = [k for k, value in zip(free, solved, strict=True) if value <= 0]
        if not negative:
            found[free] = solved
            break
        free = [k for k in free if k not in negative]
    errors = ((rows @ found - times) / times).abs().tolist()
    weights = {n: _coefficient(n, float(c)) for n, c in zip(_NAMES, found, strict=True)}
    kept = tuple(name for k, name in enumerate(_NAMES) if k not in free)
    return Fit(weights, kept, len(samples), float(median(errors)), max(errors))


def _features(counts: Mapping[str, float]) -> list[float]:
    moved = sum(counts[name] for name in ("mask_traffic", "bias_bytes", "copy_bytes"))
    return [counts["flops"], moved, counts["launches"], counts["small_launches"]]


def _coefficient(name: str, value: float) -> float:
    """Turn a rate into a cost and back; other weights are costs already."""
    return 1.0 / value if name in _RATES else value
