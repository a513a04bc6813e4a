"""The definition a block of rows at a time: what fast kernels do not keep, in bounded memory.

They keep one number per row, the log-sum-exp, and compute first derivatives. The largest score
of each row, and derivatives of derivatives, come from here: from the reference's own formula,
over the keys that a block's rows may see, so that no whole score matrix is held.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from attnkit.backends.base import Operands, added, gradients_of, stats_dtype
from attnkit.backends.dropout import Chances
from attnkit.backends.matrix import Matrix, row_blocks
from attnkit.backends.reference import attend, scores_of
from attnkit.planner import Request

__all__ = ["derivatives", "maxima"]


def maxima(request: Request, operands: Operands) -> Tensor:
    """Return the largest score of each row, the sink's included: ``[b n s]``, packed ``[t n]``."""
    with torch.no_grad():
        found = [_largest(block) for block in row_blocks(request, operands)]
    packed = request.seqlens is not None
    if not found:
        batch = 1 if packed else request.batch
        rows = (batch, request.num_heads, request.q_len)
        found = [operands.query.new_empty(rows, dtype=stats_dtype(request.dtype))]
    peak = torch.cat(found, dim=2)
    return rearrange(peak, "1 n t -> t n") if packed else peak


def _largest(one: Matrix) -> Tensor:
    scores, _ = scores_of(one)
    least = scores.new_full((), -torch.inf)
    if one.sink is not None:
        least = one.sink.to(scores.dtype)[:, None]
    peak = scores.amax(-1) if scores.shape[-1] else least.expand(scores.shape[:-1])
    return torch.maximum(peak, least)


def derivatives(
    request: Request,
    operands: Operands,
    inputs: Sequence[Tensor],
    grads: tuple[Tensor | None, Tensor | None],
    slopes: Sequence[Tensor | None],
    further: bool,
    chances: Chances | None = None,
) -> list[Tensor | None]:
    """Return what `slopes`, gradients of the first derivatives, give to `inputs` and `grads`.

    `inputs` are the tensors that the first derivatives are of, which `operands` are made of, each
    with a node in the graph that no other shares; `grads` those that they were computed from: of
    the output in the request's layout, and of the log-sum-exp ``[b n s]``, rows of packed sequences
    end to end. With `further`, the answer has derivatives again. By `chances` weights were dropped.
    """
    every = (*inputs, *grads)
    total: list[Tensor | None] = [None] * len(every)
    with torch.enable_grad():
        to_output, to_lse = grads
        if to_output is not None:
            to_output = request.layout_of.view(to_output, request.num_heads)
        for block in row_blocks(request, operands, chances):
            output, lse, _ = attend(block)
            arrived = [None if g is None else block.rows_of(g) for g in (to_output, to_lse)]
            # The blocks share nodes where tensors were only seen in another form.
            made = zip((output, lse), arrived, strict=True)
            first = gradients_of(made, inputs, retain=True, further=True)
            second = gradients_of(zip(first, slopes, strict=True), every, True, further)
            total = [added(*pair) for pair in zip(total, second, strict=True)]
    return total
