"""The real op: arguments by keyword, spelled as the installed schema spells them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attnkit.errors import KernelContractError, Refusal
from attnkit.kernel.atten_mask import AttenMask
from attnkit.kernel.call import KernelCall
from attnkit.kernel.emulator import Gradients
from attnkit.kernel.legality import Product
from attnkit.kernel.sizes import TensorSpec
from attnkit.kernel.versions import OP_VERSIONS

__all__ = ["choose_version", "device_product", "expressing_versions", "launch", "launch_grad"]

_SPELLINGS = {
    "pre_tokens": "pre_tockens",
    "next_tokens": "next_tockens",
    "pre_tockens": "pre_tokens",
    "next_tockens": "next_tokens",
}


def expressing_versions(call: KernelCall) -> tuple[str, ...]:
    """Return the versions that have every argument the call needs, oldest first.

    >>> spec, slopes = TensorSpec((1, 2, 4, 8), torch.float16), TensorSpec((2,), torch.float32)
    >>> expressing_versions(KernelCall(spec, spec, spec, 2, "BNSD", pse=slopes, pse_type=2))
    ('v2', 'mindspeed')
    """
    return tuple(name for name in OP_VERSIONS if call.inexpressible(name) is None)


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


def _values(
    arguments: Mapping[str, object], tensors: Mapping[str, torch.Tensor | None]
) -> dict[str, object]:
    """Put tensors where the call has descriptions, and lists where it has tuples."""
    out: dict[str, object] = {}
    for name, value in arguments.items():
        if isinstance(value, TensorSpec | AttenMask):
            out[name] = tensors[name]
        else:
            out[name] = list(value) if isinstance(value, tuple) else value
    return out


def _installed(op: Any, name: str, arguments: dict[str, object]) -> dict[str, object]:
    """Spell arguments as the installed schema does; an argument it lacks is an error."""
    known = {argument.name for argument in op.default._schema.arguments}
    spelled = {n if n in known else _SPELLINGS.get(n, n): v for n, v in arguments.items()}
    foreign = [n for n in spelled if n not in known]
    if foreign:
        raise KernelContractError(
            f"the installed {name} has no argument {', '.join(foreign)}; it has "
            f"{', '.join(sorted(known))}. Use a newer torch_npu, or a call without it",
            ["version-cannot-express"],
        )
    return spelled


def launch(
    call: KernelCall, tensors: Mapping[str, torch.Tensor | None], *, ops: Any = None
) -> tuple[Any, ...]:
    """Call the op; `ops` stands in for ``torch.ops.npu``. Returns what the op returns."""
    version = choose_version(call)
    arguments = call.arguments_for(version)
    if isinstance(arguments, Refusal):
        raise KernelContractError(str(arguments), [arguments.code])
    name = OP_VERSIONS[version].op
    op = getattr(torch.ops.npu if ops is None else ops, name)
    return tuple(op(**_installed(op, name, _values(arguments, tensors))))


def launch_grad(
    call: KernelCall,
    tensors: Mapping[str, torch.Tensor | None],
    extra: Mapping[str, object],
    *,
    ops: Any = None,
) -> Gradients:
    """Call the grad op of a call; `extra` are its own arguments (dy, statistics, seeds)."""
    version = OP_VERSIONS[choose_version(call)]
    arguments = call.arguments_for(version.name)
    if isinstance(arguments, Refusal):
        raise KernelContractError(str(arguments), [arguments.code])
    # The grad op regenerates dropout from the forward's seed, offset and numels, in `extra`.
    drawn = ("dropout_mask", "seed", "offset")
    values = _values({n: v for n, v in arguments.items() if n not in drawn}, tensors)
    if "scale" in values:
        values[version.grad_scale] = values.pop("scale")
    op = getattr(torch.ops.npu if ops is None else ops, version.grad_op)
    out = op(**_installed(op, version.grad_op, {**values, **extra}))
    # Releases differ in how many gradients they return; the first four have always been these.
    # Without a sink the op returns an empty tensor in its place, or nothing.
    sink = None if call.sink is None else out[version.grad_outputs.index("dsink")]
    return Gradients(out[0], out[1], out[2], out[3], sink)
