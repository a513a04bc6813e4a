"""Derivatives that cannot be differentiated again, and say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit.errors import KernelContractError

__all__ = ["first_order"]

Grads = tuple[Tensor | None, ...]


def first_order(make: Callable[[], Grads], *given: Tensor | None) -> Grads:
    """Return the gradients that `make` computes; differentiating them is an error.

    `given` is everything that they depend on. torch's own `once_differentiable` looks only at
    the gradients that arrive: where those are constants, second derivatives would silently lack
    whatever flows through the saved tensors.

    >>> x = torch.ones(1, requires_grad=True)
    >>> (slope,) = first_order(lambda: (2 * x.detach(),), x)
    >>> slope.sum().backward()
    Traceback (most recent call last):
    ...
    attnkit.errors.KernelContractError: the fused kernel's backward has no derivative: second \
derivatives need backend='tiled' or backend='reference'
    """
    if not torch.is_grad_enabled():
        return make()
    found: Grads = _FirstOrder.apply(make, *given)  # type: ignore[no-untyped-call]
    return found


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Callable[[], Grads], *given: Tensor | None) -> Grads:
        return make()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> Any:
        raise KernelContractError(
            "the fused kernel's backward has no derivative: second derivatives need "
            "backend='tiled' or backend='reference'",
            ["second-derivative"],
        )
