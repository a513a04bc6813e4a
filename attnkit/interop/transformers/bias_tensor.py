"""`BiasTensor`: a bias from a table, in the form in which models pass biases around."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnkit.errors import CompositionError
from attnkit.interop.transformers.site import calling_module, site_of
from attnkit.pse import Pse

__all__ = ["BiasTensor"]

_aten = torch.ops.aten


class BiasTensor(Tensor):
    """Looks like a position bias ``[1, n, s_q, s_kv]``, and holds the `pse` that it follows from.

    The layers of a model pass it to each other, and to checkpoints. Whatever else is done with it
    gets the numbers, through which gradients flow; that is counted at the module that does it.
    """

    pse: Pse

    @staticmethod
    def __new__(
        cls, pse: Pse, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> BiasTensor:
        """Make one of a bias of ``shape[2] x shape[3]`` cells."""
        made: BiasTensor = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=device
        )
        made.pse = pse
        return made

    def cells(self) -> Tensor:
        """Return a plain tensor of it; gradients flow to the table."""
        size, place = self.shape, (self.dtype, self.device)
        return self.pse.materialize(size[2], size[3], dtype=place[0], device=place[1])

    @classmethod
    def __torch_function__(
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _SAME:
            one = args[0]
            return BiasTensor(one.pse, one.shape, one.dtype, one.device)
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        module = calling_module()
        if module is not None:
            site_of(module).dense[f"{getattr(func, '__name__', func)} of a bias"] += 1
        return func(*_plain(args), **_plain(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (_aten.detach.default, _aten.alias.default):
            one = args[0]
            return BiasTensor(one.pse, one.shape, one.dtype, one.device)
        raise CompositionError(
            f"{func} reached a bias that attnkit.interop.transformers made below autograd, where "
            "its gradient would be lost; call .cells() on it first"
        )

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"BiasTensor({list(self.shape)}, {self.pse!r})"


_SAME = (Tensor.detach, Tensor.clone, Tensor.contiguous)
_FACTS = frozenset(
    (
        *(
            getattr(Tensor, name).__get__
            for name in ("shape", "dtype", "device", "requires_grad", "ndim", "grad_fn", "is_leaf")
        ),
        *(
            getattr(Tensor, name)
            for name in ("size", "dim", "numel", "stride", "is_floating_point")
        ),
        Tensor.__len__,
        Tensor.__repr__,
    )
)


def _plain(value: Any) -> Any:
    if isinstance(value, BiasTensor):
        return value.cells()
    if isinstance(value, tuple | list):
        return type(value)(_plain(one) for one in value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value
