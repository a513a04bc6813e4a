"""The flex backend: FlexAttention for whatever it can express."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from attnkit.backends.base import AttentionOutput, Backend, Operands, Stats, register
from attnkit.backends.flex.blocks import block_mask_of
from attnkit.backends.flex.kernel import Call, Kernel, compiled
from attnkit.backends.flex.planes import planes_of_request
from attnkit.backends.flex.scores import scores_of
from attnkit.backends.flex.tables import mask_mod_of, tables_of
from attnkit.backends.form import form
from attnkit.backends.rows import maxima
from attnkit.backends.unseen import without_unseen
from attnkit.constants import constant
from attnkit.errors import BackendRefused, Refusal
from attnkit.planner import Plan, Request

__all__ = ["Flex"]

_SMALLEST_HEAD = 16
_NO_LSE = "FlexAttention's CPU kernel does not return the log-sum-exp of its softmax"


class Flex(Backend):
    """FlexAttention, compiled, on a block mask computed from the mask's runs of keys.

    The first call of a kind of composition compiles for some seconds, on the CPU again for each
    new length; masks of equally many runs per row share one kernel. The largest score of each row
    is computed from the definition where somebody looks. On the CPU it only infers, and has no
    log-sum-exp. It has not been run on CUDA hardware.
    """

    name = "flex"

    def __init__(self, kernel: Kernel = compiled) -> None:
        self._kernel = kernel

    def refusals(self, request: Request) -> list[Refusal]:
        """Return why the request is not for this backend."""
        return [Refusal(code, reason, self.name) for code, reason in _refusals(request)]

    def plan(self, request: Request) -> FlexPlan:
        """Return the plan, its block mask made unless the tensors are only shapes."""
        return FlexPlan(
            self.name, request, mask=None if request.device == "meta" else made(request)
        )

    def run(self, plan: Plan, operands: Operands) -> AttentionOutput:
        """Attend by one call of FlexAttention."""
        output, lse = self.attend(plan, operands)
        return AttentionOutput(output, stats_of(plan.request, operands, lse))

    def attend(self, plan: Plan, operands: Operands) -> tuple[Tensor, Tensor | None]:
        """Return the output in the request's layout, and the log-sum-exp ``[b n s]`` if known."""
        request, layout, device = plan.request, form(plan.request.layout), operands.query.device
        counts = (request.num_heads, request.num_kv_heads, request.num_kv_heads)
        given = (operands.query, operands.key, operands.value)
        query, key, value = (layout.view(t, n) for t, n in zip(given, counts, strict=True))
        if not request.needs_grad:
            # FlexAttention asks whether a tensor could train, not whether it does now.
            query, key, value = query.detach(), key.detach(), value.detach()
        key, value = without_unseen(request, key, value)
        mask = (plan.mask if isinstance(plan, FlexPlan) else None) or made(request)
        with torch.set_grad_enabled(request.needs_grad):
            scores = scores_of(request, operands.pse, device)
            kind = (request.layout, mask.shape, scores.shape, request.scale)
            call = Call(query, key, value, scores.fn, mask.on(device), request.scale, kind)
            output, lse = self._kernel(call)
            if operands.sink is not None:
                output, lse = _with_sink(output, lse, operands.sink)
        return layout.restore(output), lse


class Made:
    """A request's block mask, on the devices that asked for it."""

    def __init__(self, request: Request) -> None:
        planes = planes_of_request(request)
        self._tables = tables_of(planes)
        self._host = block_mask_of(planes, self._tables)
        self._there: dict[torch.device, BlockMask] = {}

    @property
    def shape(self) -> tuple[object, ...]:
        """What decides the code of the mask function."""
        return self._tables.shape

    def on(self, device: torch.device) -> BlockMask:
        """Return the block mask, its tensors on a device."""
        if device.type == "cpu":
            return self._host
        if device not in self._there:
            self._there[device] = self._host.to(device)
            self._there[device].mask_mod = mask_mod_of(self._tables.to(device))
        return self._there[device]


@constant
def made(request: Request) -> Made:
    """Return a request's block mask, made once."""
    return Made(request)


@dataclass(frozen=True)
class FlexPlan(Plan):
    """A plan with its block mask, which a copy in another process makes again."""

    mask: Made | None = field(default=None, compare=False, repr=False)

    def __hash__(self) -> int:
        return super().__hash__()

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "mask": None}


def stats_of(request: Request, operands: Operands, lse: Tensor | None) -> Stats:
    """Return statistics with the log-sum-exp; where there is none, looking at it is refused."""
    if lse is not None and request.seqlens is not None:
        lse = lse[0].transpose(0, 1)
    return Stats(_refuse_lse if lse is None else lse, partial(maxima, request, operands))


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


def _refusals(request: Request) -> Iterator[tuple[str, str]]:
    """Yield (code, sentence) for all that FlexAttention cannot do."""
    if request.device not in ("cpu", "cuda", "meta"):
        yield "flex-device", f"FlexAttention has no kernel for device {request.device!r}"
    if request.dtype == torch.float64:
        yield "flex-dtype", "FlexAttention's kernels compute in float32 at most, not float64"
    if request.dropout:
        yield (
            "flex-dropout",
            f"FlexAttention has no dropout (it is {request.dropout:g} here); backend='tiled' does",
        )
    if not (request.batch and request.q_len and request.kv_len):
        yield "flex-empty", "FlexAttention takes no tensors without batch elements, queries or keys"
    if request.seqlens is not None:
        opaque = [t.text for t in request.bias if not t.by_distance]
        if opaque:
            yield (
                "flex-packed-bias",
                f"{' + '.join(opaque)} is a tensor for one sequence's score matrix, and a packed "
                "batch runs as one long sequence; biases that follow from distances alone "
                "(ALiBi, T5Relative) are known there",
            )
    if request.device == "cpu":
        yield from _cpu_refusals(request)
    if request.device == "cuda" and min(request.head_dim, request.value_dim) < _SMALLEST_HEAD:
        yield (
            "flex-head-dim",
            f"FlexAttention's CUDA kernel takes heads of {_SMALLEST_HEAD} dimensions and more, "
            f"not {min(request.head_dim, request.value_dim)}",
        )


def _cpu_refusals(request: Request) -> Iterator[tuple[str, str]]:
    if request.needs_grad:
        yield (
            "flex-backward-cpu",
            "FlexAttention has no backward on the CPU, and some tensor wants a gradient; "
            "backend='tiled' trains there, and torch.no_grad() asks for none",
        )
    if request.sink:
        yield "flex-sink-cpu", f"{_NO_LSE}, and a sink needs it; backend='tiled' has sinks"


register(Flex())
