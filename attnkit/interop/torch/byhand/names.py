"""The calls of torch that attention written by hand is made of, each spelling under one name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "ASKS",
    "CONTINUES",
    "COPIES",
    "OUT_OF_PLACE",
    "PRODUCTS",
    "SIZED",
    "canonical",
    "writes",
]

T = Tensor

_SPELLINGS: dict[str, tuple[Any, ...]] = {
    "matmul": (torch.matmul, T.matmul, T.__matmul__, T.__rmatmul__, torch.bmm, T.bmm),
    "baddbmm": (torch.baddbmm, T.baddbmm),
    "einsum": (torch.einsum, torch.functional.einsum),
    "sdpa": (F.scaled_dot_product_attention,),
    "add": (torch.add, T.add, T.__add__, T.__radd__, T.add_, T.__iadd__),
    "rsub": (T.__rsub__, torch.rsub),
    "neg": (torch.neg, T.neg, T.__neg__, T.negative),
    "sub": (torch.sub, T.sub, T.__sub__, T.sub_, T.__isub__, torch.subtract, T.subtract),
    "mul": (torch.mul, T.mul, T.__mul__, T.__rmul__, T.mul_, T.__imul__, torch.multiply),
    "div": (torch.div, T.div, T.__truediv__, T.div_, T.__itruediv__, torch.true_divide),
    "masked_fill": (torch.masked_fill, T.masked_fill, T.masked_fill_),
    "where": (torch.where, T.where),
    "maximum": (torch.max, T.max, torch.maximum, T.maximum),
    "clamp": (torch.clamp, T.clamp, T.clamp_, torch.clip, T.clip, torch.clamp_min, T.clamp_min),
    "largest": (torch.amax, T.amax),
    "detach": (torch.detach, T.detach),
    "tanh": (torch.tanh, T.tanh, T.tanh_, F.tanh),
    "cast": (T.to, T.type, T.type_as, T.float, T.half, T.bfloat16, T.double),
    "same": (T.contiguous, T.clone, torch.clone),
    "softmax": (torch.softmax, T.softmax, F.softmax, torch.special.softmax),
    "dropout": (F.dropout, torch.dropout),
    "nan_to_num": (torch.nan_to_num, T.nan_to_num),
    "reshape": (
        *(T.view, T.reshape, torch.reshape, T.flatten, torch.flatten, T.unflatten),
        *(T.unsqueeze, torch.unsqueeze, T.squeeze, torch.squeeze, T.view_as, T.reshape_as),
    ),
    "permute": (
        *(T.permute, torch.permute, T.transpose, torch.transpose, T.swapaxes, torch.swapaxes),
        *(T.movedim, torch.movedim, T.swapdims, torch.swapdims),
        *(T.mT.__get__, T.T.__get__),  # type: ignore[attr-defined]
    ),
}

_NAMES: dict[Callable[..., Any], str] = {f: name for name, fs in _SPELLINGS.items() for f in fs}

PRODUCTS = frozenset(("matmul", "baddbmm", "einsum", "sdpa"))

CONTINUES = frozenset(_SPELLINGS) - PRODUCTS
"""What is recorded when it is done to scores that are not computed yet."""

SIZED: frozenset[Any] = frozenset((T.expand_as, T.view_as, T.reshape_as))
"""Calls that ask their second argument for its shape alone."""

COPIES: frozenset[Any] = frozenset((T.clone, torch.clone))

ASKS: frozenset[Any] = frozenset(
    (
        *(T.size, T.dim, T.numel, T.nelement, T.is_floating_point, T.is_complex, T.ndimension),
        *(T.stride, T.is_contiguous, T.element_size, T.get_device, T.__len__, T.storage_offset),
        *(torch.is_floating_point, torch.numel, torch.is_tensor, torch.is_complex),
        *(
            getattr(T, name).__get__
            for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta")
        ),
        *(
            getattr(T, name).__get__
            for name in ("requires_grad", "is_sparse", "is_quantized", "is_nested")
        ),
    )
)
"""Questions about a tensor that nobody has to compute it for."""


def canonical(func: Any) -> str | None:
    """Return the name of a call; None for any that is no part of attention."""
    return _NAMES.get(func)


def writes(func: Any) -> bool:
    """Whether a call changes its first argument."""
    name = getattr(func, "__name__", "")
    if name == "__setitem__" or (name.startswith("__i") and name in _IN_PLACE):
        return True
    return name.endswith("_") and not name.endswith("__")


_IN_PLACE = frozenset(
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or")
)

OUT_OF_PLACE: dict[Any, Any] = {
    T.add_: T.add,
    T.__iadd__: T.add,
    T.sub_: T.sub,
    T.__isub__: T.sub,
    T.mul_: T.mul,
    T.__imul__: T.mul,
    T.div_: T.div,
    T.__itruediv__: T.div,
    T.masked_fill_: T.masked_fill,
    T.clamp_: T.clamp,
    T.tanh_: T.tanh,
}
