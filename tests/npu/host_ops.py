"""Ordinary tensor operators of the stand-in device, computed by torch's CPU kernels.

What is under test is attention; sums, copies and matrix products around it only have to be
right. Every aten operator that torch_npu implements, memory and views aside, is given a kernel
that sees the same memory as CPU tensors. Operators of torch_npu itself (``npu::...``) keep
theirs: they reach the decoders, or fail.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from tests.npu.memory import on_host

__all__ = ["install"]

# torch_npu's own: allocation, views, ways between devices, and its lowering of attention.
KEPT = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"),
    *("as_strided", "view", "_reshape_alias", "alias", "unfold", "set_", "is_set_to"),
    *("unsqueeze", "squeeze"),
    *("view_as_real", "view_as_complex", "resize_as_", "_has_compatible_shallow_copy_type"),
    *("to", "_to_copy", "_copy_from", "_copy_from_and_resize", "_local_scalar_dense"),
    *("record_stream", "is_pinned", "pin_memory", "_pin_memory", "data"),
    *("scaled_dot_product_attention", "_scaled_dot_product_fused_attention_overrideable"),
}
# Given kernels of their own below.
WRITTEN = {"copy_", "matmul_backward"}


def install() -> torch.library.Library:
    """Register the kernels; they last as long as what is returned."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # Replacing torch_npu's kernels is the point.
        warnings.simplefilter("ignore")
        for name in torch._C._dispatch_get_all_op_names():
            namespace, _, rest = name.partition("::")
            base, _, overload = rest.partition(".")
            if namespace != "aten" or base in KEPT | WRITTEN:
                continue
            op = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
            if op and torch._C._dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1"):
                library.impl(rest, _kernel(op), "PrivateUse1")
        library.impl("copy_", _copy, "PrivateUse1")
        library.impl("matmul_backward", _matmul_backward, "PrivateUse1")
    return library


def _kernel(op: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        given: list[tuple[torch.Tensor, torch.Tensor]] = []

        def down(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.device.type == "npu":
                given.append((value, on_host(value)))
                return given[-1][1]
            if isinstance(value, torch.device):
                return torch.device("cpu")
            return value

        def up(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            for npu, host in given:
                if value is host:
                    if host.shape != npu.shape:
                        raise NotImplementedError(f"{op} resized a tensor of the stand-in device")
                    return npu
            result = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="npu"
            )
            on_host(result).copy_(value)
            return result

        args, kwargs = tree_map(down, (args, kwargs))
        return tree_map(up, op(*args, **kwargs))

    return kernel


def _copy(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    target, values = (on_host(t) if t.device.type == "npu" else t for t in (self, source))
    target.copy_(values)
    return self


def _matmul_backward(
    grad: torch.Tensor, self: torch.Tensor, other: torch.Tensor, mask: list[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """torch_npu's own formula node for matmul; CPU has none. For operands of two axes or more."""
    left = (grad @ other.mT).sum_to_size(self.shape) if mask[0] else None
    right = (self.mT @ grad).sum_to_size(other.shape) if mask[1] else None
    return left, right
