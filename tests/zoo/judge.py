"""When two runs of a model count as equal."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

__all__ = ["GRADIENTS", "OUTPUTS", "STRUCTURE", "differences", "tensors"]

OUTPUTS, GRADIENTS = 2e-5, 2e-4
STRUCTURE = "other tensors"  # one run has tensors that the other has not
# Handed through, not computed by attention; caches are seen in the steps that read them.
PASSED = ("past_key_values", "attentions", "cache", "position_embeddings", "idx_")


def tensors(out: Any, name: str = "out") -> dict[str, Tensor]:
    """Return every tensor of an output, by its path."""
    if isinstance(out, Tensor):
        return {name: out}
    found: dict[str, Tensor] = {}
    if isinstance(out, Mapping):
        for key, value in out.items():
            if not any(word in str(key) for word in PASSED):
                found |= tensors(value, f"{name}.{key}")
    elif isinstance(out, (list, tuple)):
        for number, value in enumerate(out):
            found |= tensors(value, f"{name}.{number}")
    return found


def differences(want: Mapping[str, Tensor], got: Mapping[str, Tensor], most: float) -> str | None:
    """Return where two runs differ by more than `most` of the largest number, or None."""
    if want.keys() != got.keys():
        return f"{STRUCTURE}: {sorted(want.keys() ^ got.keys())[:4]}"
    worst, where = 0.0, ""
    floor = floor_of(want)
    for name, right in want.items():
        here = got[name]
        if right.shape != here.shape:
            return f"{name}: shape {tuple(here.shape)} for {tuple(right.shape)}"
        if not right.numel():
            continue
        if not right.is_floating_point():
            if not torch.equal(right, here):
                return f"{name}: {int((right != here).sum())} of {right.numel()} differ"
            continue
        right, here = right.double(), here.double()
        if not bool(here.isfinite().all()):
            return f"{name}: not finite"
        error = float((right - here).abs().max() / scale_of(name, want).clamp_min(floor))
        if error > worst:
            worst, where = error, name
    return f"{where}: {worst:.1e}" if worst > most else None


def scale_of(name: str, want: Mapping[str, Tensor]) -> Tensor:
    """Return the number that an error is compared with: the largest of the tensor.

    A bias of keys changes no softmax, and where values are nearly equal the scores change
    little: such a gradient is what is left when large numbers cancel. A bias is therefore
    compared with its weight's gradient, and both with a hundredth of those of their module.
    """
    found = [want[name].double().abs().max()]
    if (
        name.endswith("bias")
        and (weight := want.get(name.removesuffix("bias") + "weight")) is not None
    ):
        found.append(weight.double().abs().max())
    module = ".".join(name.split(".")[:-2])
    if module and name.endswith(("weight", "bias")):
        beside = [t for other, t in want.items() if other.startswith(module + ".") and t.numel()]
        found.append(1e-2 * torch.stack([t.double().abs().max() for t in beside]).max())
    return torch.stack(found).max()


def floor_of(want: Mapping[str, Tensor]) -> float:
    """Return the number below which a tensor counts as zero.

    A gradient that is 0 in theory, of the queries of a row with one key, say, is rounding alone.
    """
    largest = [float(t.abs().max()) for t in want.values() if t.is_floating_point() and t.numel()]
    return max(1e-6, 1e-2 * median(largest)) if largest else 1e-6
