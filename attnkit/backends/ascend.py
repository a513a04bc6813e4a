"""The Ascend backend: the real op through torch_npu.

Which version of the op is called, and how it spells its arguments, is read off the schema
that is installed; a version that cannot express a call is a refusal, not a surprise.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from attnkit.backends.base import register
from attnkit.backends.bias_pass import Bits
from attnkit.backends.block_sparse import blocks_backward, blocks_forward
from attnkit.backends.fused import Fused
from attnkit.backends.merged import Answer, Drawn
from attnkit.errors import KernelContractError, Refusal
from attnkit.kernel import BlockSparseCall, Gradients, KernelCall
from attnkit.kernel.block_sparse import OP
from attnkit.kernel.block_sparse_op import lacks_block_sparse
from attnkit.kernel.dropout import read_bits
from attnkit.kernel.launch import choose_version, device_product, launch, launch_grad, rehearse
from attnkit.kernel.legality import Product
from attnkit.planner import Launch, Plan, Request, lower
from attnkit.planner.biases import lacking
from attnkit.planner.calls import Solution
from attnkit.planner.price import time_of_definition

__all__ = ["Ascend"]

_DRAWS = "_npu_dropout_gen_mask"
"""The operator that the op itself draws its dropout by: packed bits, from a seed and an offset."""


class Ascend(Fused):
    """Calls ``npu_fusion_attention`` (v1) or ``npu_fusion_attention_v2`` on NPU tensors.

    `ops` stands in for ``torch.ops.npu`` in tests; `device` is the device type it serves.
    """

    name = "ascend"
    auto = 10

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
        if reasons:  # searching for calls that cannot be made would cost every plan on a CPU
            lacks = lacking(request)
            return reasons + [replace(reason, subject=self.name) for reason in lacks]
        reasons += super().refusals(request)
        if not reasons:
            found = self.lowered(request)
            told = (self._against(step, request.needs_grad) for step in found.steps)
            reasons += dict.fromkeys(reason for some in told for reason in some)
            if found.bias_pass is not None and request.dropout and not hasattr(self.ops, _DRAWS):
                reason = (
                    f"the installed torch_npu has no {_DRAWS}, by which the gradient of the bias "
                    "would know what dropout kept"
                )
                reasons.append(Refusal("op-version", reason, self.name))
        return reasons

    def lowered(self, request: Request) -> Plan:
        """Return the plan before the backend takes it, and why there are no block-sparse calls."""
        lacks = lacks_block_sparse(self.ops, request.needs_grad)
        product = self._product()
        if lacks is None and product not in ("A2", "A3"):
            lacks = f"the block-sparse op is for Atlas A2 and A3, and this is Ascend {product}"
        return lower(request, True if lacks is None else Refusal("op-version", lacks, OP))

    def yields(self, plan: Plan) -> Refusal | None:
        """Return why the definition is cheaper than a bias on a route, if the estimates say so.

        Channels and levels cost launches, which a small score matrix does not repay.
        """
        if plan.route is None:
            return None
        # A pass for the bias's gradient is not for the forward, which is compared here.
        ours, plainly = Solution(plan.steps).price.nanoseconds, time_of_definition(plan.request)
        if ours <= plainly:
            return None
        reason = (
            f"{plan.route} would take {ours / 1e3:,.0f} microseconds by estimate, and whole score "
            f"matrices {plainly / 1e3:,.0f}; backend='ascend' runs it all the same"
        )
        return Refusal("dearer", reason, self.name)

    def forward(self, call: KernelCall, tensors: dict[str, Any]) -> Answer:
        """Make one call; the op draws its own dropout seed and tells it."""
        if isinstance(call, BlockSparseCall):
            return blocks_forward(call, tensors, self.ops)
        out = launch(call, tensors, ops=self.ops)
        numels = out[6] if len(out) > 6 else 0  # which v3 does not tell
        return Answer(out[0], out[1], out[2], (out[4], out[5], numels))

    def backward(
        self, call: KernelCall, tensors: dict[str, Any], dy: Tensor, merged: Answer
    ) -> Gradients:
        """Make one grad call."""
        if isinstance(call, BlockSparseCall):
            return blocks_backward(call, tensors, dy, merged, self.ops)
        seed, offset, numels = merged.random
        extra = {
            "dy": dy,
            "softmax_max": merged.peak,
            "softmax_sum": merged.total,
            "attention_in": merged.out,
            "seed": seed,
            "offset": offset,
            "numels": numels,
        }
        return launch_grad(call, tensors, extra, ops=self.ops)

    def decisions(self, call: KernelCall, random: Drawn, query: Tensor) -> Bits:
        """Draw the bits of a call again, as its grad op does, from the same numbers."""
        seed, offset, numels = random
        draw = getattr(self.ops, _DRAWS)
        how = {"parallel": call.gen_mask_parallel, "sync": call.sync}
        packed = draw(query, [numels], 1.0 - call.keep_prob, seed, offset, **how)
        return partial(read_bits, packed)

    def _against(self, step: Launch, needs_grad: bool) -> list[Refusal]:
        """Return why the installed op, or this very chip, cannot make a call."""
        call = step.call
        if isinstance(call, BlockSparseCall):  # is planned where it is installed alone
            return []
        try:
            rehearse(call, training=needs_grad, ops=self.ops)
        except KernelContractError as error:
            return [Refusal("op-version", str(error), self.name)]
        product = self._product()
        if product == "A2":  # what the planner has judged the call for
            return []
        version = choose_version(call)
        broken = call.violations(version=version, product=product, training=needs_grad)
        return [Refusal(v.code, f"on Ascend {product}: {v.found}", self.name) for v in broken]

    def _product(self) -> Product:
        """Return what the planner has judged calls for, or the chip that is there."""
        real = self.device == "npu" and hasattr(torch, "npu")
        return device_product(torch.device(self.device)) if real else "A2"


register(Ascend())
