"""The Ascend backend: the real op through torch_npu.

Which version of the op is called, and how it spells its arguments, is read off the schema
that is installed; a version that cannot express a call is a refusal, not a surprise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnkit.backends.base import register
from attnkit.backends.fused import CallTensors, Fused
from attnkit.errors import BackendRefused, Refusal
from attnkit.kernel import KernelCall
from attnkit.planner import Request, lower

__all__ = ["Ascend"]

# v1 and v3 spell two arguments differently from v2, whose names `KernelCall` has.
_OLD_SPELLING = {"pre_tokens": "pre_tockens", "next_tokens": "next_tockens"}

_TENSORS = ("query", "key", "value", "atten_mask", "pse", "sink")


class Ascend(Fused):
    """Calls ``npu_fusion_attention`` (v1) or ``npu_fusion_attention_v2`` on NPU tensors.

    `ops` stands in for ``torch.ops.npu`` in tests; `device` is the device type it serves.
    """

    name = "ascend"

    def __init__(self, ops: Any = None, device: str = "npu") -> None:
        self._given = ops
        self.device = device

    @cached_property
    def ops(self) -> Any:
        """``torch.ops.npu`` once torch_npu has been imported; None where it cannot be."""
        if self._given is not None:
            return self._given
        try:
            import torch_npu  # noqa: F401
        except (ImportError, RuntimeError, OSError):
            return None
        return torch.ops.npu

    def refusals(self, request: Request) -> list[Refusal]:
        """Return why the device, the installed op or the kernel cannot run the request."""
        reasons = []
        if request.device != self.device:
            reasons.append(
                Refusal("device", f"the tensors are on {request.device}, not on an NPU", self.name)
            )
        elif self.ops is None:
            reason = "torch_npu does not import; install it with CANN (pip install attnkit[npu])"
            reasons.append(Refusal("torch-npu", reason, self.name))
        if request.dtype == torch.float64:
            reason = "the kernel computes float16, bfloat16 and float32, not float64"
            reasons.append(Refusal("dtype", reason, self.name))
        reasons += super().refusals(request)
        best = lower(request).best
        if not reasons and best is not None:
            missing = self._missing(best.call)
            if missing:
                reasons.append(Refusal("op-version", missing, self.name))
        return reasons

    def launch(self, call: KernelCall, tensors: CallTensors) -> tuple[Tensor, Tensor, Tensor]:
        """Make the call, arguments by keyword."""
        missing = self._missing(call)
        if missing:
            raise BackendRefused(missing, [Refusal("op-version", missing, self.name)])
        op = self._op(call)
        known = _argument_names(op)
        arguments = call.non_default_arguments() | {
            name: getattr(tensors, name) for name in _TENSORS if getattr(tensors, name) is not None
        }
        outputs = op(
            **{
                _spelled(name, known): list(value) if isinstance(value, tuple) else value
                for name, value in arguments.items()
            }
        )
        return outputs[0], outputs[1], outputs[2]

    def _op(self, call: KernelCall) -> Callable[..., Any]:
        """Return v2 where a bias type or start index needs it, v1 (in every release) elsewhere."""
        name = "npu_fusion_attention"
        if call.pse_type != 1 or call.q_start_idx is not None:
            name += "_v2"
        op: Callable[..., Any] = getattr(self.ops, name, None) or _absent(name)
        return op

    def _missing(self, call: KernelCall) -> str:
        """Say what the installed op lacks for a call; empty if it lacks nothing."""
        op = self._op(call)
        if isinstance(op, _Absent):
            return f"the installed torch_npu has no {op.name}; a newer release does"
        known = _argument_names(op)
        unknown = [n for n in call.non_default_arguments() if _spelled(n, known) not in known]
        if not unknown:
            return ""
        return (
            f"the installed op takes no {', '.join(unknown)}; a newer torch_npu does "
            "(sink: 7.3.0, start indices: 7.1.0)"
        )


class _Absent:
    """Stands for an op that the installed release does not have."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self) -> None:
        raise BackendRefused(f"the installed torch_npu has no {self.name}")


def _absent(name: str) -> Callable[..., Any]:
    return _Absent(name)


def _argument_names(op: Any) -> frozenset[str]:
    schema = getattr(op, "default", op)._schema
    return frozenset(argument.name for argument in schema.arguments)


def _spelled(name: str, known: frozenset[str]) -> str:
    old = _OLD_SPELLING.get(name, name)
    return old if name not in known and old in known else name


register(Ascend())
