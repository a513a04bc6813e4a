"""Fitting the planner's price weights to measured times, by least squares.

The planner's estimate is linear in what it counts: floating-point operations, bytes moved,
launches and small launches. Its coefficients, turned over for the first two, are the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from attnkit.planner.price import chip

__all__ = ["Fit", "fit_weights", "samples_of"]

_NAMES = ("flops_per_ns", "bytes_per_ns", "launch_ns", "small_launch_ns")
_RATES = ("flops_per_ns", "bytes_per_ns")

Sample = tuple[Mapping[str, float], float]


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


def samples_of(timings: Iterable[Any]) -> list[Sample]:
    """Return (counts, nanoseconds) of every form of the kernel that was timed."""
    found = []
    for timing in timings:
        pairs = ((timing.plan_counts, timing.plan), (timing.dense_counts, timing.dense))
        found += [(counts, taken) for counts, taken in pairs if taken]
    return found


def fit_weights(samples: Sequence[Sample]) -> Fit | None:
    """Return the weights that explain the samples best; None where there are too few.

    Errors count relative to the measured time, so that short calls weigh as much as long ones.
    A weight that comes out negative is one that the samples do not tell: it stays what it is.
    """
    known = {name: float(getattr(chip(), name)) for name in _NAMES}
    if len(samples) < len(_NAMES) + 1:
        return None
    rows = torch.tensor([_features(counts) for counts, _ in samples], dtype=torch.float64)
    times = torch.tensor([taken for _, taken in samples], dtype=torch.float64)
    found = torch.tensor([_coefficient(n, known[n]) for n in _NAMES], dtype=torch.float64)
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
