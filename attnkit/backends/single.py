"""One kernel call that answers every row, with its way back; see `merged` for several.

Gradients of the log-sum-exp take a second grad call, of values that are 1 in one dimension:
the grad op computes ``weight * (dy.v - dy.out)``, which is ``weight * dlse`` where the output it is
given is 0 and dy has dlse in that dimension.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnkit import layouts
from attnkit.backends.base import added
from attnkit.backends.merged import Answer, Launcher
from attnkit.first_order import first_order
from attnkit.kernel import KernelCall, unpack_stats
from attnkit.kernel.scores import MASKED

__all__ = ["Single", "backward_of"]


class Single(torch.autograd.Function):
    """One call that answers every row: output in its layout, log-sum-exp and maximum by row.

    The statistics are ``[b n s]``, or ``[t n]`` of a packed call; -inf for a row without keys.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: KernelCall,
        launcher: Launcher,
        mask: Tensor | None,
        pse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Launch the call; rows that see no key get log-sum-exp and maximum -inf."""
        tensors = {"query": query, "key": key, "value": value}
        answer = launcher.forward(call, {**tensors, "atten_mask": mask, "pse": pse, "sink": sink})
        ctx.call, ctx.launcher, ctx.random = call, launcher, answer.random
        peak, total = (unpack_stats(call, stat) for stat in (answer.peak, answer.total))
        empty = (peak <= MASKED) | (total == 0)
        lse = (peak + total.log()).masked_fill(empty, -torch.inf)
        peak = peak.masked_fill(empty, -torch.inf)
        kept = (answer.out, answer.peak, answer.total, lse)
        ctx.save_for_backward(query, key, value, sink, mask, pse, *kept)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(peak)
        return answer.out, lse, peak

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dlse: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Launch the call's backward on what the forward kept, with the same random numbers."""
        query, key, value, sink, mask, pse, out, peak, total, lse = ctx.saved_tensors
        call, launcher = ctx.call, ctx.launcher
        tensors = {"query": query, "key": key, "value": value}
        tensors |= {"atten_mask": mask, "pse": pse, "sink": sink}

        def make() -> tuple[Tensor | None, ...]:
            answer = Answer(out, peak, total, ctx.random)
            return backward_of(launcher, call, tensors, answer, lse, dy, dlse)

        return (None, None, None, None, *first_order(make, dy, dlse, query, key, value, sink))


def backward_of(
    launcher: Launcher,
    call: KernelCall,
    tensors: dict[str, Any],
    whole: Answer,
    lse: Tensor,
    dy: Tensor | None,
    dlse: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value and sink, as the grad op gives them.

    `whole` has the output and the statistics of whole rows, as the op has them; these may have more
    keys than the call. `lse` is their log-sum-exp by row, for the sink.
    """
    found: list[tuple[Tensor | None, ...]] = []
    if dy is not None:
        grads = launcher.backward(call, tensors, dy.contiguous(), whole)
        found.append((*grads[:3], grads.sink))
    if dlse is not None:
        answer = replace(whole, random=(0, 0, 0))
        found.append(_through_lse(launcher, call, tensors, dlse, answer, lse))
    return tuple(added(*column) for column in zip(*found, strict=True)) or (None,) * 4


def _through_lse(
    launcher: Launcher,
    call: KernelCall,
    tensors: dict[str, Any],
    dlse: Tensor,
    answer: Answer,
    lse: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return what the gradient of the log-sum-exp gives to query, key, value and sink."""
    one = answer.out.new_zeros(call.value.shape)
    dy = torch.zeros_like(answer.out)
    layouts.get(call.layout).view(one, call.num_kv_heads)[..., 0] = 1.0
    rows = dlse.transpose(0, 1)[None] if call.is_packed else dlse
    layouts.get(call.layout).view(dy, call.num_heads)[..., 0] = rows
    nothing = replace(answer, out=torch.zeros_like(answer.out))
    plain = replace(call, keep_prob=1.0)
    grads = launcher.backward(plain, {**tensors, "value": one}, dy, nothing)
    sink = tensors["sink"]
    if sink is None:
        return grads.query, grads.key, None, None
    seen = lse if call.is_packed else lse.movedim(1, -1)
    share = (sink.to(lse.dtype) - seen).exp() * (dlse if call.is_packed else dlse.movedim(1, -1))
    return grads.query, grads.key, None, share.flatten(0, -2).sum(0).to(sink.dtype)
