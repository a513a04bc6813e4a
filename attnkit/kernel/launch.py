"""The real op: arguments by keyword, spelled as the installed schema spells them."""

from __future__ import annotations

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


def choose_version(call: KernelCall) -> str:
    """Return the oldest torch_npu version that has every argument the call needs."""
    usable = [name for name in expressing_versions(call) if name in ("v1", "v2")]
    return usable[0] if usable else "v2"


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
            given[name] = list(value)
    return given


def _run(ops: Any, name: str, arguments: dict[str, object]) -> tuple[Any, ...]:
    """Call an op, spelled as its installed schema is; an argument that it lacks is an error."""
    op = getattr(torch.ops.npu if ops is None else ops, name)
    known = {argument.name for argument in op.default._schema.arguments}
    spelled = {n if n in known or n not in _OLD else _OLD[n]: v for n, v in arguments.items()}
    foreign = [n for n in arguments if not known & {n, _OLD.get(n, n)}]
    if foreign:
        raise KernelContractError(
            f"the installed {name} has no argument {', '.join(foreign)}; it has "
            f"{', '.join(sorted(known))}. Use a newer torch_npu, or a call without it",
            ["version-cannot-express"],
        )
    return tuple(op(**spelled))


def launch(
    call: KernelCall, tensors: Mapping[str, torch.Tensor | None], *, ops: Any = None
) -> tuple[Any, ...]:
    """Call the op; `ops` stands in for ``torch.ops.npu``. Returns what the op returns."""
    version = OP_VERSIONS[choose_version(call)]
    return _run(ops, version.op, _arguments(call, version, tensors))


def launch_grad(
    call: KernelCall,
    tensors: Mapping[str, torch.Tensor | None],
    extra: Mapping[str, object],
    *,
    ops: Any = None,
) -> Gradients:
    """Call the grad op of a call; `extra` are its own arguments (dy, statistics, seeds)."""
    version = OP_VERSIONS[choose_version(call)]
    # The grad op regenerates dropout from the forward's seed, offset and numels, in `extra`.
    values = _arguments(call, version, tensors, without=("dropout_mask", "seed", "offset"))
    if "scale" in values:
        values[version.grad_scale] = values.pop("scale")
    out = _run(ops, version.grad_op, {**values, **extra})
    # Releases differ in how many gradients they return; the first four have always been these.
    # Without a sink the op returns an empty tensor in its place, or nothing.
    sink = None if call.sink is None else out[version.grad_outputs.index("dsink")]
    return Gradients(out[0], out[1], out[2], out[3], sink)
