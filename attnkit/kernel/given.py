"""The op's arguments by name, forward or backward: made into one record, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from attnkit.kernel.arguments import as_python
from attnkit.kernel.atten_mask import AttenMask
from attnkit.kernel.call import KernelCall
from attnkit.kernel.call_tensors import check_devices, check_tensors
from attnkit.kernel.launch import choose_version, device_product
from attnkit.kernel.legality import Target, Violation, contract_error, violations
from attnkit.kernel.mask_facts import mask_facts
from attnkit.kernel.rules.shapes import argument_type
from attnkit.kernel.sizes import TensorSpec

__all__ = ["checked_call", "described"]

_REQUIRED = ("query", "key", "value")
_OPTIONAL = ("pse", "atten_mask", "sink", "dropout_mask")

# What the forward of a call leaves for its backward, and what the output's gradient looks like.
_RESULTS = ("dy", "softmax_max", "softmax_sum", "attention_in")


def checked_call(given: Mapping[str, Any]) -> tuple[KernelCall, dict[str, Any]]:
    """Return the record of a call, and its tensors; raise one error with every broken rule.

    `given` are the parameters of `fusion_attention` by name, or those of its gradient, which
    alone have a "dy".
    """
    results = {name: given[name] for name in _RESULTS if "dy" in given}
    call = described(given)
    for name in (*results, *(["softmax_in"] if given.get("softmax_in") is not None else [])):
        TensorSpec.of(given[name], name)
    tensors = {name: given.get(name) for name in (*_REQUIRED, *_OPTIONAL)}
    check_devices({**tensors, **results})
    # The seeds of a backward are what the forward returned; rules about wishes do not apply.
    asked = replace(call, seed=0, offset=0) if results else call
    _check_rules(asked, tensors, backward=bool(results), silent=given["allow_silent"])
    stats = {name: call.stats for name in results if name.startswith("softmax")}
    check_tensors(results, {**dict.fromkeys(results, call.output), **stats})
    return call, tensors


def described(given: Mapping[str, Any]) -> KernelCall:
    """Make the record; parameters that are not fields of it are left aside."""
    arguments: dict[str, Any] = {}
    for name in (f.name for f in fields(KernelCall) if f.name in given):
        value = given[name]
        if name in _REQUIRED or (name in (*_OPTIONAL, "padding_mask") and value is not None):
            arguments[name] = TensorSpec.of(value, name)
        else:
            arguments[name] = as_python(name, value)
    if given["atten_mask"] is not None:
        arguments["atten_mask"] = AttenMask.of(given["atten_mask"])
    call = KernelCall(**arguments)
    wrong = argument_type.broken(call, Target())
    if wrong is not None:
        raise contract_error([Violation(argument_type, wrong)])
    return call


def _check_rules(
    call: KernelCall, tensors: Mapping[str, Any], *, backward: bool, silent: bool
) -> None:
    query = tensors["query"]
    product = device_product(query.device) if query.device.type == "npu" else "emulator"
    training = backward or any(_wants_grad(tensors[name]) for name in (*_REQUIRED, "sink"))
    on = Target(choose_version(call), product, training, _wants_grad(tensors["pse"]))
    found = violations(call, on)
    if not found and not silent:
        # Content is looked at last: it makes sense only for shapes that are in order.
        found = violations(call, replace(on, mask=mask_facts(call, tensors["atten_mask"])))
    blocking = [v for v in found if not (silent and v.layer == "silent")]
    if blocking:
        raise contract_error(blocking)


def _wants_grad(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
