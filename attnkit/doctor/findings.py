"""What a machine has: versions, devices, the installed ops' arguments, backends' refusals."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import attnkit
from attnkit.backends import BACKENDS
from attnkit.doctor.screen import NoDevice, UsageError
from attnkit.doctor.suite import make_request
from attnkit.errors import Refusal
from attnkit.kernel import OP_VERSIONS
from attnkit.layouts import Sizes
from attnkit.masks import Causal, SlidingWindow
from attnkit.planner import Composition

__all__ = [
    "GPU_BACKENDS",
    "Machine",
    "backends_of",
    "find_machine",
    "findings",
    "npu_absence",
    "told_versions",
    "versions",
]


GPU_BACKENDS = ("cuda", "flex", "tiled", "reference")
"""What is tested on a CUDA device unless backends are named."""


@dataclass(frozen=True)
class Machine:
    """What the suite runs on: backends, a device, and a name that says whether it is real."""

    backends: tuple[str, ...]
    device: str
    label: str

    @property
    def is_hardware(self) -> bool:
        """Whether an NPU or a GPU computes, and no emulator."""
        return self.device.partition(":")[0] != "cpu" and "emulated" not in self.backends


def npu_absence() -> str | None:
    """Return why there is no NPU to be used; None where there is one."""
    try:
        importlib.import_module("torch_npu")
    except ModuleNotFoundError:
        return "torch_npu is not installed (pip install attnkit[npu])"
    except (ImportError, RuntimeError, OSError) as error:
        return f"torch_npu does not import: {_first_line(error)}"
    npu: Any = getattr(torch, "npu", None)
    try:
        if npu is None or not npu.is_available() or not npu.device_count():
            return "torch_npu sees no device (npu-smi info lists those that the driver sees)"
    except (RuntimeError, OSError) as error:
        return f"torch_npu cannot reach its driver: {_first_line(error)}"
    return None


def backends_of(device: str) -> tuple[str, ...]:
    """Return the backends that a device is tested with, unless some are named."""
    kind = device.partition(":")[0]
    return {"npu": ("ascend",), "cuda": GPU_BACKENDS}.get(kind, ("emulated",))


def find_machine(device: str, named: Sequence[str] = ()) -> Machine:
    """Return what is tested: the backends of a device, or those that are named, there.

    "auto" takes an NPU if there is one, else the CPU. Raises `NoDevice` or `UsageError` for a
    device that is not there.
    """
    absence = npu_absence()
    if device == "auto":
        device = "cpu" if absence else "npu"
    if device.partition(":")[0] == "npu" and absence:
        raise NoDevice(f"--device {device}: {absence}")
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        raise UsageError(f"--device {device}: no such device; try npu, npu:1, cuda, cpu") from None
    for name in named:
        _ = BACKENDS[name]  # or the error that says what names there are
    backends = tuple(dict.fromkeys(named)) or backends_of(kind)
    if kind not in ("cpu", "cuda", "npu"):
        raise UsageError(f"--device {device}: the doctor runs on npu, cuda and cpu")
    name = kind if kind == "cpu" else f"{kind}:{index}"
    told = "this machine" if kind == "cpu" else f"{name}, {_device_name(kind, index)}"
    if backends == ("emulated",):
        told = f"emulator, not hardware (on {device})"
    elif backends != backends_of(kind):
        told = f"{', '.join(backends)} on {told}"
    return Machine(backends, device if kind == "cpu" else name, told)


def _device_name(kind: str, index: int) -> str:
    """Return what a device calls itself; `NoDevice` where it is not there."""
    module: Any = getattr(torch, kind, None)
    count = module.device_count()
    if not count:
        sees = "a CUDA device" if kind == "cuda" else "an NPU"
        raise NoDevice(f"--device {kind}: torch {torch.__version__} does not see {sees}")
    if index >= count:
        there = f"{kind}:0" if count == 1 else f"{kind}:0 to {kind}:{count - 1}"
        raise NoDevice(f"--device {kind}:{index} is not there; this machine has {there}")
    try:
        return str(module.get_device_name(torch.device(f"{kind}:{index}")))
    except RuntimeError as error:  # it is listed, and its driver does not answer
        raise NoDevice(f"--device {kind}:{index}: {_first_line(error)}") from None


def findings(machine: Machine) -> dict[str, Any]:
    """Return what is installed and what each backend would say, as plain data."""
    absence = npu_absence()
    return {
        **versions(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "cann": None if absence else _cann_version(),
        "npu": absence or "usable",
        "devices": _devices(absence is None),
        "ops": {name: _arguments(op.op) for name, op in OP_VERSIONS.items() if "." not in op.op},
        "backends": _backends(machine.device),
    }


def versions() -> dict[str, str | None]:
    """Return the versions that a report needs; None is not installed."""
    return {
        "attnkit": attnkit.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch_npu": _version("torch_npu"),
    }


def told_versions() -> str:
    """Return `versions` as one line: ``attnkit 0.2.0, python 3.11.7, torch 2.13.0+cpu``."""
    return ", ".join(f"{name} {one}" for name, one in versions().items() if one is not None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cann_version() -> str | None:
    """Ask torch_npu, which has moved the question around between releases."""
    for module in ("torch_npu.npu.utils", "torch_npu.utils.collect_env"):
        try:
            found = importlib.import_module(module).get_cann_version()
        except (ImportError, AttributeError, RuntimeError, OSError):
            continue
        if found and found != "not known":  # collect_env's words for nothing
            return str(found)
    return None


def _devices(has_npu: bool) -> list[dict[str, str]]:
    kinds: dict[str, Any] = {"npu": getattr(torch, "npu", None)} if has_npu else {}
    found = [
        {"device": f"{kind}:{k}", "name": str(module.get_device_name(k))}
        for kind, module in (kinds | {"cuda": torch.cuda}).items()
        for k in range(module.device_count())
    ]
    cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    return [*found, {"device": "cpu", "name": cpu}]


def _arguments(op: str) -> list[str] | None:
    """Return the arguments of an installed op; None where it is not installed."""
    found = getattr(torch.ops.npu, op, None)
    return found and [argument.name for argument in found.default._schema.arguments]


def _backends(device: str) -> dict[str, list[dict[str, str]]]:
    # What nearly every model asks for.
    composed = Composition(Causal() & SlidingWindow(256))
    request = make_request(composed, [Sizes(2, 1024, 8, 64)] * 3, torch.bfloat16, device)
    found = {}
    for name, backend in BACKENDS.items():
        try:
            reasons = backend.refusals(request)
        except Exception as error:  # a backend that cannot even be asked is a finding
            reasons = [Refusal("broken", f"{type(error).__name__}: {_first_line(error)}")]
        found[name] = [{"code": r.code, "reason": r.reason} for r in reasons]
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
