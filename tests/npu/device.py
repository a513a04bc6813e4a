"""The stand-in device: executes decoded aclnn calls with attnkit's emulator.

A call arrives as the arguments that torch_npu's host code passed to CANN, after its checks, its
defaults and its renaming. It becomes a `KernelCall` again, is judged by the contract's rules as
CANN would, computed, and written into the outputs that the host code allocated.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch

from attnkit.kernel import AttenMask, KernelCall, TensorSpec, dropout_mask, emulate, emulate_grad
from tests.npu import blocks
from tests.npu.memory import view

__all__ = ["DEVICE", "Device", "inside_rig"]

Call = dict[str, Any]

DTYPES = {
    0: torch.float32,
    1: torch.float16,
    27: torch.bfloat16,
    2: torch.int8,
    4: torch.uint8,
    12: torch.bool,
    9: torch.int64,
    3: torch.int32,
}
"""torch's names of the aclDataType numbers that the decoded calls use."""

LISTS = ("prefix", "actual_seq_qlen", "actual_seq_kvlen", "q_start_idx", "kv_start_idx")
OPTIONAL = ("pse", "sink", "dropout_mask")
FAILED = 561000

# True of what the binding does with a caller's dropout bits; here it has done it already.
ABOUT_THE_BINDING = {"dropout-mask-numels", "seed-overwritten"}


def inside_rig() -> bool:
    """Return whether the libraries that CANN's names lead to are the stand-ins."""
    try:
        return hasattr(ctypes.CDLL("libopapi.so"), "rig_set_callback")
    except OSError:
        return False


class Device:
    """Answers the stand-in libopapi; keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def connect(self) -> None:
        """Become the device of this process."""
        self._runtime = ctypes.CDLL("libascendcl.so")
        self._callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)(self._answer)
        ctypes.CDLL("libopapi.so").rig_set_callback(self._callback)

    @contextmanager
    def recording(self) -> Iterator[list[Call]]:
        """Collect the calls that arrive inside the block."""
        start, found = len(self.calls), []
        yield found
        found += self.calls[start:]

    def _answer(self, text: bytes) -> int:
        try:
            call: Call = json.loads(text)
            self.calls.append(call)
            with torch.no_grad():
                self._execute(call)
        # torch_npu sees a status; the text reaches the user through the runtime's last error.
        except Exception as error:
            self._runtime.rig_set_error(f"{type(error).__name__}: {error}".encode())
            return FAILED
        return 0

    def _execute(self, call: Call) -> None:
        op = call["op"]
        if op.startswith("aclnnDropoutGenMaskV2"):
            _generate(call)
        elif op.startswith("aclnnBlockSparseAttention"):
            blocks.execute(call, _needed, _write)
        elif "Grad" in op:
            _backward(call)
        else:
            _forward(call)


def _tensor(call: Call, name: str) -> torch.Tensor | None:
    spec = call.get(name)
    if spec is None:
        return None
    dtype = DTYPES[spec["dtype"]]
    return view(spec["storage"], dtype, spec["shape"], spec["stride"], spec["offset"])


def _needed(call: Call, name: str) -> torch.Tensor:
    tensor = _tensor(call, name)
    if tensor is None:
        raise ValueError(f"{call['op']} was not given {name} (161001)")
    return tensor


def _read(call: Call) -> tuple[KernelCall, dict[str, torch.Tensor | None]]:
    """Return the call as attnkit describes it, and its tensors."""
    if any(call.get(name) for name in ("padding_mask", "query_rope", "key_rope")):
        raise NotImplementedError(f"{call['op']} with a padding mask or rope tensors")
    needed = {name: _needed(call, name) for name in ("query", "key", "value")}
    optional = {name: _tensor(call, name) for name in (*OPTIONAL, "atten_mask")}
    mask = optional["atten_mask"]
    numbers = {f.name for f in fields(KernelCall)} - {*needed, *OPTIONAL, *LISTS, "padding_mask"}
    arguments: dict[str, Any] = {n: call[n] for n in numbers if n in call}
    # The host code writes a missing list as an empty one, and renames the statistics' order.
    arguments |= {name: tuple(call.get(name) or ()) or None for name in LISTS}
    arguments["softmax_layout"] = "TND" if call.get("softmax_layout") == "same_as_input" else ""
    arguments["atten_mask"] = None if mask is None else AttenMask.of(mask, read=True)
    for name, tensor in (needed | {n: optional[n] for n in OPTIONAL}).items():
        arguments[name] = None if tensor is None else TensorSpec.of(tensor)
    return KernelCall(**arguments), needed | optional


def _judge(call: KernelCall, op: str, training: bool) -> None:
    """Reject what CANN rejects, and what it would compute wrongly without a word."""
    broken = call.violations(version=_version(call), training=training)
    broken = [v for v in broken if v.code not in ABOUT_THE_BINDING]
    if broken:
        raise ValueError(f"{op} breaks the kernel's contract: " + "; ".join(map(str, broken)))


def _version(call: KernelCall) -> str:
    return "v1" if call.pse_type == 1 and call.q_start_idx is None else "v2"


def _forward(record: Call) -> None:
    call, tensors = _read(record)
    _judge(call, record["op"], training=False)
    results = emulate(call, **tensors)  # type: ignore[arg-type]
    names = ("attention_out", "softmax_max", "softmax_sum")
    for name, result in zip(names, results, strict=True):
        _write(record, name, result)


def _backward(record: Call) -> None:
    call, tensors = _read(record)
    _judge(call, record["op"], training=True)
    names = ("dy", "softmax_max", "softmax_sum", "attention_in")
    grads = emulate_grad(call, **tensors, **{n: _needed(record, n) for n in names})  # type: ignore[arg-type]
    for name, grad in zip(("dq", "dk", "dv", "dpse", "dsink"), grads, strict=True):
        if grad is not None:
            _write(record, name, grad)


def _write(record: Call, name: str, result: torch.Tensor) -> None:
    target = _needed(record, name)
    if target.shape != result.shape or target.dtype != result.dtype:
        raise ValueError(
            f"the host code allocated {name} as {TensorSpec.of(target)}; the kernel writes "
            f"{TensorSpec.of(result)}"
        )
    target.copy_(result)


def _generate(record: Call) -> None:
    """Write the dropout decisions; a function of seed and offset, so backward gets them again."""
    seed, offset = record["seed"], record["offset"]
    if isinstance(seed, dict):
        seed = int(_needed(record, "seed"))
        offset = int(_needed(record, "offset")) + record["shift"]
    out = _needed(record, "out")
    count = torch.Size(record["shape"]).numel()
    bits = dropout_mask(count, 1.0 - record["drop_prob"], seed=seed, offset=offset)
    out.zero_()[: len(bits)] = bits


DEVICE = Device()
