"""Numbers that others keep in tensors, and that a plan needs on the host.

On the CPU they are read at each call. To read them off another device makes the host wait for
it, so there they are read once for each tensor and version of its content, which torch counts:
all layers of a step share one wait. Lists of numbers from where the batch is built need none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdRef

from attnkit.arguments import check_ints, check_readable, holds_integers
from attnkit.constants import constant
from attnkit.errors import CompositionTypeError, shown

__all__ = ["IntsOnHost", "ints_on_host", "on_host"]

IntsOnHost = Sequence[int] | Tensor


def ints_on_host(name: str, values: IntsOnHost) -> tuple[int, ...]:
    """Return a list of integers, or those of a tensor with one axis.

    >>> import torch
    >>> ints_on_host("cu_seqlens_q", torch.tensor([0, 3, 8], dtype=torch.int32))
    (0, 3, 8)
    >>> ints_on_host("cu_seqlens_q", [0, 3.0])
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionTypeError: cu_seqlens_q[1]=3.0 is of type float; it must be an int \
>= 0
    """
    if isinstance(values, Tensor):
        if values.ndim != 1 or not holds_integers(values):
            raise CompositionTypeError(
                f"{name}={shown(values)}; give a list of integers, or a tensor of them with one "
                "axis"
            )
        values = on_host(name, values)
    return check_ints(name, values, 0)


def on_host(name: str, tensor: Tensor) -> Any:
    """Return the numbers of a small tensor, as its `tolist` has them.

    >>> import torch
    >>> on_host("alibi_slopes", torch.tensor([[0.5, 0.25]]))
    [[0.5, 0.25]]
    """
    check_readable(name, tensor)
    if tensor.device.type == "cpu" or tensor.is_inference():  # these count no versions
        return tensor.detach().tolist()
    return _read(WeakIdRef(tensor), tensor._version)


@constant
def _read(tensor: Any, version: int) -> Any:
    return tensor().detach().tolist()
