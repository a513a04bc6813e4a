"""Agreement: how far a result may be from the exact one, said once for every test."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_TIMES = 8
"""Another order of the same sums errs by a few times as much, never by ten."""


def agree(
    found: Mapping[str, Tensor], exact: Mapping[str, Tensor], rounded: Mapping[str, Tensor]
) -> None:
    """Assert that results are as near to the exact ones as their dtype allows.

    `exact` is the definition in float64, `rounded` the definition in a lower precision. Its
    error, in units of its own epsilon, says what rounding costs here; `found` may err by a few
    times as many of its epsilons. What should be NaN or infinite must be it, and nothing else.
    """
    assert found.keys() == exact.keys() == rounded.keys()
    size = max((_largest(t) for t in exact.values()), default=0.0)
    for name, meant in exact.items():
        got, low = found[name].detach(), rounded[name].detach()
        assert got.shape == meant.shape, f"{name}: {list(got.shape)}, not {list(meant.shape)}"
        wide, meant = got.double(), meant.detach().double()
        finite = meant.isfinite()
        torch.testing.assert_close(
            wide[~finite], meant[~finite], equal_nan=True, rtol=0, atol=0, msg=f"{name}: no number"
        )
        cost = _largest((low.double() - meant)[finite]) / torch.finfo(low.dtype).eps
        limit = _TIMES * (cost + _largest(meant) + size / 64) * torch.finfo(got.dtype).eps
        error = (wide - meant)[finite].abs().max().item() if finite.any() else 0.0
        assert error <= limit, f"{name}: off by {error:.3g}, {limit:.3g} is what rounding explains"


def _largest(tensor: Tensor) -> float:
    numbers = tensor.detach()[tensor.isfinite()]
    return numbers.abs().max().item() if numbers.numel() else 0.0
