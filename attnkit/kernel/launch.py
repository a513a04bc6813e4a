"""The real op: arguments by keyword, spelled as the installed schema spells them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from attnkit.errors import KernelContractError
from attnkit.kernel.atten_mask import AttenMask
from attnkit.kernel.call import KernelCall
from attnkit.kernel.emulator import Gradients
from attnkit.kernel.legality import Product
from attnkit.kernel.sizes import TensorSpec
from attnkit.kernel.versions import OP_VERSIONS, OpVersion

__all__ = [
    "arguments_for",
    "choose_version",
    "device_product",
    "expressing_versions",
    "launch",
    "launch_grad",
    "rehearse",
]

_OLD = OP_VERSIONS["v1"].spelling


def expressing_versions(call: KernelCall) -> tuple[str, ...]:
    """Return the versions that have every argument the call needs, oldest first.

    >>> spec, slopes = TensorSpec((1, 2, 4, 8), torch.float16), TensorSpec((2,), torch.float32)
    >>> expressing_versions(KernelCall(spec, spec, spec, 2, "BNSD", pse=slopes, pse_type=2))
    ('v2', 'mindspeed')
    """
    return tuple(name for name in OP_VERSIONS if call.inexpressible(name) is None)


arguments_for = KernelCall.arguments_for


def choose_version(call: KernelCall, ops: Any = None, device: torch.device | None = None) -> str:
    """Return the oldest torch_npu version that has every argument the call needs.

    A call whose mask comes with it is one that a captured graph may replay, for any mask. Of the
    versions v3 alone can be captured, so such a call is v3's, where it is installed and made for
    the device.
    """
    mask, v3 = call.atten_mask, OP_VERSIONS["v3"]
    if mask is not None and mask.with_call and call.inexpressible("v3") is None:
        product = "A2" if device is None else device_product(device)
        if _op_of(ops, v3.op) is not None and product in v3.products:
            return "v3"
    return "v1" if call.inexpressible("v1") is None else "v2"


def device_product(device: torch.device) -> Product:
    """Return the product family of an NPU from its name."""
    npu: Any = getattr(torch, "npu", None)
    name = str(npu.get_device_name(device)) if npu is not None else ""
    if "950" in name:
        return "950"
    return "A3" if "910_93" in name or "A3" in name else "A2"


def _arguments(
    call: KernelCall,
    version: OpVersion,
    tensors: Mapping[str, torch.Tensor | None],
    without: tuple[str, ...] = (),
) -> dict[str, object]:
    """Return what a call says, tensors in the place of descriptions, and lists of tuples."""
    reason = call.inexpressible(version.name)
    if reason is not None:
        raise KernelContractError(reason, ["version-cannot-express"])
    given = {n: value for n, value in call.non_default_arguments().items() if n not in without}
    for name, value in given.items():
        if isinstance(value, TensorSpec | AttenMask):
            given[name] = tensors[name]
        elif isinstance(value, tuple):
            given[name] = torch.tensor(value) if name in version.as_tensors else list(value)
    return given


def _grad_arguments(
    call: KernelCall, version: OpVersion, tensors: Mapping[str, torch.Tensor | None]
) -> dict[str, object]:
    """Return the same for the grad op, which regenerates dropout from its forward's numbers."""
    given = _arguments(call, version, tensors, without=("dropout_mask", "seed", "offset"))
    return {version.grad_scale if name == "scale" else name: v for name, v in given.items()}


def _op_of(ops: Any, name: str) -> Any:
    """Return an installed op, or None; `ops` stands in for ``torch.ops.npu``."""
    return getattr(torch.ops.npu if ops is None else ops, name, None)


def _spelled(ops: Any, name: str, arguments: Mapping[str, object]) -> tuple[Any, dict[str, object]]:
    """Return an op, and arguments as its installed schema spells them; what it lacks is an error.

    `ops` stands in for ``torch.ops.npu``.
    """
    op = _op_of(ops, name)
    if op is None:
        reason = f"the installed torch_npu has no {name}; a newer release does"
        raise KernelContractError(reason, ["version-cannot-express"])
    known = {argument.name for argument in op.default._schema.arguments}
    spelled = {n if n in known or n not in _OLD else _OLD[n]: v for n, v in arguments.items()}
    foreign = [n for n in arguments if not known & {n, _OLD.get(n, n)}]
    if foreign:
        raise KernelContractError(
            f"the installed {name} has no argument {', '.join(foreign)}; it has "
            f"{', '.join(sorted(known))}. Use a newer torch_npu, or a call without it",
            ["version-cannot-express"],
        )
    return op, spelled


def launch(
    call: KernelCall, tensors: Mapping[str, torch.Tensor | None], *, ops: Any = None
) -> tuple[Any, ...]:
    """Call the op; `ops` stands in for ``torch.ops.npu``. Returns what the op returns."""
    query = tensors.get("query")
    version = OP_VERSIONS[choose_version(call, ops, None if query is None else query.device)]
    op, arguments = _spelled(ops, version.op, _arguments(call, version, tensors))
    return tuple(op(**arguments))


def rehearse(call: KernelCall, *, training: bool, ops: Any = None) -> None:
    """Spell a call, and in training its grad call, without making them.

    Raises `KernelContractError` where the installed op cannot be called like that.
    """
    version, nothing = OP_VERSIONS[choose_version(call, ops)], defaultdict[str, None](lambda: None)
    _spelled(ops, version.op, _arguments(call, version, nothing))
    if training:
        _spelled(ops, version.grad_op, _grad_arguments(call, version, nothing))


def launch_grad(
    call: KernelCall,
    tensors: Mapping[str, torch.Tensor | None],
    extra: Mapping[str, object],
    *,
    ops: Any = None,
) -> Gradients:
    """Call the grad op of a call; `extra` are its own arguments (dy, statistics, seeds)."""
    version = OP_VERSIONS[choose_version(call)]
    given = {**_grad_arguments(call, version, tensors), **extra}
    op, arguments = _spelled(ops, version.grad_op, given)
    out = op(**arguments)
    # Releases differ in how many gradients they return; the first four have always been these.
    # Without a sink the op returns an empty tensor in its place, or nothing.
    sink = None if call.sink is None else out[version.grad_outputs.index("dsink")]
    return Gradients(out[0], out[1], out[2], out[3], sink)
