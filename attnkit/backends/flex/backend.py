"""The flex backend: FlexAttention for whatever it can express.

Uncompiled, `flex_attention` builds the whole score matrix. Compiled, it is one fused kernel, and
the first call of each kind takes seconds. torch keeps at most a few compiled forms of one
function and then quietly runs it uncompiled, so every kind is a separate function here, and
`fullgraph` turns a form too many into an error.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from attnkit.backends.base import (
    AttentionOutput,
    Backend,
    Operands,
    Stats,
    register,
    without_cells,
)
from attnkit.backends.flex.blocks import Tables, request_tables
from attnkit.backends.flex.scores import ScoreMod, score_function
from attnkit.backends.rows import maxima
from attnkit.backends.unseen import without_unseen
from attnkit.errors import BackendRefused, CompositionTypeError, Refusal
from attnkit.planner import Plan, Request

__all__ = ["Flex", "FlexCall", "FlexPlan"]

_SMALLEST_HEAD = 16
_NO_LSE = "FlexAttention's CPU kernel does not return the log-sum-exp of its softmax"


class FlexPlan(Plan):
    """A plan with its block mask; a copy in another process makes it again."""

    @cached_property
    def tables(self) -> Tables:
        """What the mask function reads, on the host."""
        return request_tables(self.request)

    @cached_property
    def _masks(self) -> dict[torch.device, BlockMask]:
        return {}

    def mask(self, device: torch.device) -> BlockMask:
        """Return the block mask, its tensors on a device; the plan keeps it."""
        if device not in self._masks:
            with torch.inference_mode(False):  # so that it serves training later on
                self._masks[device] = self.tables.block_mask(device)
        return self._masks[device]


class FlexCall(NamedTuple):
    """One call on ``[b n s d]`` tensors; calls of one `kind` share their code."""

    query: Tensor
    key: Tensor
    value: Tensor
    score_mod: ScoreMod | None
    block_mask: BlockMask
    scale: float
    kind: tuple[Hashable, ...]


Kernel = Callable[[FlexCall], tuple[Tensor, Tensor | None]]
"""Output ``[b n s d]`` and log-sum-exp ``[b n s]``, natural log; None where there is none."""


def _run_compiled(call: FlexCall) -> tuple[Tensor, Tensor | None]:
    """Run a call compiled. The CPU's kernel returns no log-sum-exp.

    On the CPU it is compiled for known lengths, since open ones give wrong code or none.
    """
    tensors = call[:3]
    if call.query.device.type == "cpu":
        forms: tuple[Hashable, ...] = tuple((t.shape, t.stride()) for t in tensors)
        kind = (call.query.dtype, forms, *call.kind)
        return _compile(_without_lse, kind, False)(*call[:6]), None
    forms = tuple((t.shape[1], t.shape[3]) for t in tensors)
    kind = (call.query.device, call.query.dtype, forms, *call.kind)
    output, lse = _compile(_with_lse, kind, None)(*call[:6])
    return output, lse


def _without_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None,
    block_mask: BlockMask,
    scale: float,
    **request: Any,
) -> Any:
    grouped = query.shape[1] != key.shape[1]
    return flex_attention(query, key, value, score_mod, block_mask, scale, grouped, **request)


def _with_lse(*call: Any) -> tuple[Tensor, Tensor]:
    output, aux = _without_lse(*call, return_aux=AuxRequest(lse=True))
    return output, aux.lse


@lru_cache(maxsize=128)
def _compile(
    function: Callable[..., Any], kind: tuple[Hashable, ...], dynamic: bool | None
) -> Callable[..., Any]:
    """Return a compiled function that no other kind shares: torch's limits are per code object."""

    def attend(*call: Any) -> Any:
        return function(*call)

    attend.__code__ = attend.__code__.replace()
    return torch.compile(attend, fullgraph=True, dynamic=dynamic)


class Flex(Backend):
    """FlexAttention, compiled, on a block mask computed from the mask's runs of keys.

    The first call of a kind of composition compiles for some seconds, on the CPU again for each
    new length; masks of equally many runs per row share one kernel. The largest score of each row
    is computed from the definition where somebody looks. On the CPU it only infers, and has no
    log-sum-exp. It has not been run on CUDA hardware.
    """

    name = "flex"
    plan_type = FlexPlan

    def __init__(self, kernel: Kernel = _run_compiled) -> None:
        self._kernel = kernel

    def refusals(self, request: Request) -> list[Refusal]:
        """Return why the request is not for this backend."""
        return [*_refusals(request), *without_cells(request, self.name)]

    def plan(self, request: Request) -> FlexPlan:
        """Return the plan, its tables made unless the tensors are only shapes."""
        plan = FlexPlan(self.name, request)
        if request.device != "meta":
            _ = plan.tables
        return plan

    def run(self, plan: Plan, operands: Operands) -> AttentionOutput:
        """Attend by one call of FlexAttention; where it has no log-sum-exp, to look is refused."""
        if not isinstance(plan, FlexPlan):
            raise TypeError(f"the flex backend runs its own plans, not a {type(plan).__name__}")
        request = plan.request
        output, lse = self._attend(plan, operands)
        if lse is not None and request.seqlens is not None:
            lse = lse[0].transpose(0, 1)
        peak = partial(maxima, request, operands)
        return AttentionOutput(output, Stats(_refuse_lse if lse is None else lse, peak))

    def _attend(self, plan: FlexPlan, operands: Operands) -> tuple[Tensor, Tensor | None]:
        """Return the output in the request's layout, and the log-sum-exp ``[b n s]`` if known."""
        if isinstance(operands.query, FakeTensor):
            raise CompositionTypeError(
                "FlexAttention runs compiled code, and a fake tensor has no memory to run it on; "
                "for shapes alone ask for backend='reference'"
            )
        request, device = plan.request, operands.query.device
        query, key, value = operands.by_head(request)
        if not request.needs_grad:
            # FlexAttention asks whether a tensor could train, not whether it does now.
            query, key, value = query.detach(), key.detach(), value.detach()
        key, value = without_unseen(request, key, value)
        with torch.set_grad_enabled(request.needs_grad):
            scores, shape = score_function(request, operands.pse, device)
            kind = (request.layout, plan.tables.shape, shape, request.scale)
            mask = plan.mask(device)
            call = FlexCall(query, key, value, scores, mask, request.scale, kind)
            output, lse = self._kernel(call)
            if operands.sink is not None:
                output, lse = _with_sink(output, lse, operands.sink)
        return request.layout_of.restore(output), lse


def _with_sink(output: Tensor, lse: Tensor | None, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Let a logit per head join the denominator: a softmax over two, the keys and the sink."""
    if lse is None:
        raise BackendRefused(_NO_LSE, [Refusal("flex-sink-cpu", _NO_LSE, Flex.name)])
    logits = sink.to(lse.dtype)[None, :, None]
    share = torch.sigmoid(lse - logits)
    return (output * share[..., None]).to(output.dtype), torch.logaddexp(lse, logits)


def _refuse_lse() -> Tensor:
    reason = f"{_NO_LSE}; backend='tiled' has it"
    raise BackendRefused(reason, [Refusal("flex-stats-cpu", reason, Flex.name)])


def _refusals(request: Request) -> Iterator[Refusal]:
    """Yield all that FlexAttention cannot do."""
    yield from _lacking_anywhere(request, Flex.name)
    yield from _lacking_here(request, Flex.name)


def _lacking_anywhere(request: Request, name: str) -> Iterator[Refusal]:
    if request.dtype == torch.float64:
        reason = "FlexAttention's kernels compute in float32 at most, not float64"
        yield Refusal("flex-dtype", reason, name)
    if request.dropout:
        reason = (
            f"FlexAttention has no dropout (it is {request.dropout:g} here); backend='tiled' does"
        )
        yield Refusal("flex-dropout", reason, name)
    if not (request.batch and request.q_len and request.kv_len):
        reason = "FlexAttention takes no tensors without batch elements, queries or keys"
        yield Refusal("flex-empty", reason, name)
    opaque = [term.text for term in request.bias if not term.by_distance]
    if request.seqlens is not None and opaque:
        reason = (
            f"{' + '.join(opaque)} is a tensor for one sequence's score matrix, and a packed "
            "batch runs as one long sequence; biases that follow from distances alone "
            "(ALiBi, T5Relative) are known there"
        )
        yield Refusal("flex-packed-bias", reason, name)
    trained = [term.text for term in request.bias if term.requires_grad]
    trained += ["what score_fn reads"] if request.score_trains else []
    if request.deterministic and trained:
        reason = (
            f"FlexAttention adds up the gradient of {' and '.join(trained)} in any order, and "
            "deterministic is asked for"
        )
        yield Refusal("flex-deterministic", reason, name)


def _lacking_here(request: Request, name: str) -> Iterator[Refusal]:
    """Yield what FlexAttention lacks on the device of the tensors."""
    head = min(request.head_dim, request.value_dim)
    if request.device not in ("cpu", "cuda", "meta"):
        reason = f"FlexAttention has no kernel for device {request.device!r}"
        yield Refusal("flex-device", reason, name)
    if request.device == "cpu" and request.needs_grad:
        reason = (
            "FlexAttention has no backward on the CPU, and some tensor wants a gradient; "
            "backend='tiled' trains there, and torch.no_grad() asks for none"
        )
        yield Refusal("flex-backward-cpu", reason, name)
    if request.device == "cpu" and request.sink:
        reason = f"{_NO_LSE}, and a sink needs it; backend='tiled' has sinks"
        yield Refusal("flex-sink-cpu", reason, name)
    if request.device == "cuda" and head < _SMALLEST_HEAD:
        reason = (
            f"FlexAttention's CUDA kernel takes heads of {_SMALLEST_HEAD} dimensions and more, "
            f"not {head}"
        )
        yield Refusal("flex-head-dim", reason, name)


register(Flex())
