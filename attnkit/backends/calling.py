"""Where a plan comes to its calls: they are made, or left out of the graph around them.

What is done around calls (channels, moved tokens, folded heads) is differentiable, and only moves
and scales. A share of a larger attention has the statistics of whole rows from outside, when its
gradients are wanted. So its calls are left out of that graph, and the graph is run through in
parts: what arrives for the output, and the output itself, are moved to where each call has its
rows; the grad calls are made; what they give is taken back to the operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from attnkit.backends.base import stats_dtype
from attnkit.backends.merged import (
    Answer,
    BackwardCalls,
    Drawn,
    Launcher,
    Merged,
    backward_of,
    by_token,
)
from attnkit.backends.single import Single
from attnkit.backends.single import backward_of as backward_of_one
from attnkit.kernel import Gradients, KernelCall, pack_stats
from attnkit.planner.calls import Parts

__all__ = ["Caller", "LeavesOut", "LeftOut", "Made", "Noted"]

Answered = tuple[Tensor, Tensor, Tensor]
"""The output, the log-sum-exp and the maximum of each row."""

Backward = Callable[[Answer, Tensor | None, Tensor | None], Sequence[Tensor | None]]
"""From whole rows, and the gradients of output and log-sum-exp, to those of a call's inputs."""


class Caller(Protocol):
    """What is done where a plan comes to its calls."""

    def single(self, call: KernelCall, tensors: Sequence[Tensor | None]) -> Answered:
        """Answer by one call; `tensors` are mask, bias, query, key, value and sink."""

    def merged(
        self,
        parts: Parts,
        biases: Sequence[Tensor | None],
        leaves: Sequence[Tensor | None],
        wide: bool,
    ) -> Answered:
        """Answer by calls that are merged; `leaves` are query, key, value, sink and logits."""


@dataclass(frozen=True)
class Made:
    """Calls are made, and autograd records them."""

    launcher: Launcher

    def single(self, call: KernelCall, tensors: Sequence[Tensor | None]) -> Answered:
        """Make the call."""
        out: Answered = Single.apply(call, self.launcher, *tensors)  # type: ignore[no-untyped-call]
        return out

    def merged(
        self,
        parts: Parts,
        biases: Sequence[Tensor | None],
        leaves: Sequence[Tensor | None],
        wide: bool,
    ) -> Answered:
        """Make the calls, and merge what they answer."""
        out: Answered = Merged.apply(  # type: ignore[no-untyped-call]
            self.launcher, parts, biases, *leaves, wide
        )
        return out


class Noted:
    """A launcher that notes what its forward calls drew and, if it `keeps` them, their answers."""

    def __init__(self, launcher: Launcher, keeps: bool = False) -> None:
        self.launcher, self.keeps = launcher, keeps
        self.random: list[Drawn] = []
        self.answers: list[Tensor] = []

    def forward(self, call: KernelCall, tensors: dict[str, Any]) -> Answer:
        """Make one call."""
        answer = self.launcher.forward(call, tensors)
        self.random.append(answer.random)
        if self.keeps:
            self.answers += by_token(call, answer)
        return answer

    def backward(
        self, call: KernelCall, tensors: dict[str, Any], dy: Tensor, merged: Answer
    ) -> Gradients:
        """Make one grad call."""
        return self.launcher.backward(call, tensors, dy, merged)


# -- calls left out of the graph ---------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LeftOut:
    """Calls that were left out: what they take, and stand-ins for what they answer.

    `back` is given the output and the log-sum-exp of whole rows, and the gradients of both, as the
    calls have their rows; its gradients are those of `leaves`.
    """

    leaves: Sequence[Tensor | None]
    out: Tensor
    lse: Tensor
    back: Callable[..., Sequence[Tensor | None]]


class LeavesOut:
    """Leaves calls out, in the order in which they were made: these are what they drew and kept."""

    def __init__(
        self,
        launcher: Launcher,
        dtype: torch.dtype,
        random: Iterable[Drawn],
        kept: Iterable[Tensor] = (),
    ) -> None:
        self.launcher, self.dtype = launcher, dtype
        self._random, self._kept = iter(random), iter(kept)
        self.found: list[LeftOut] = []

    def single(self, call: KernelCall, tensors: Sequence[Tensor | None]) -> Answered:
        """Leave one call out."""
        apart = _apart(tensors)
        narrow = [None if t is None else t.to(self.dtype) for t in apart[2:5]]
        names = ("atten_mask", "pse", "query", "key", "value", "sink")
        given = dict(zip(names, (*apart[:2], *narrow, apart[5]), strict=True))
        (drawn,) = islice(self._random, 1)
        back = partial(_back_of_one, self.launcher, call, given, drawn)
        return self._left_out(tensors[2:], call.output.shape, call.stats.shape[:-1], back)

    def merged(
        self,
        parts: Parts,
        biases: Sequence[Tensor | None],
        leaves: Sequence[Tensor | None],
        wide: bool,
    ) -> Answered:
        """Leave calls out that are merged."""
        query, _, value, *_ = leaves
        if query is None or value is None:
            raise ArithmeticError("calls have a query and a value")
        random = list(islice(self._random, len(parts.launches)))
        kept = self._kept_of(parts)
        calls = BackwardCalls.of(self.launcher, parts, _apart(biases), random)
        back = partial(_back_of_several, calls, _apart(leaves), kept)
        rows = query.shape[:2]
        return self._left_out(leaves, (*rows, value.shape[-1]), rows, back)

    def _kept_of(self, parts: Parts) -> list[Tensor]:
        """Return what the calls of levels answered; others of the same plan do not need theirs."""
        every = [list(islice(self._kept, 3)) for _ in parts.launches]
        zones = (launch.zone for launch in parts.launches)
        return [
            tensor
            for zone, own in zip(zones, every, strict=True)
            if zone is not None and zone.row is not None
            for tensor in own
        ]

    def _left_out(
        self,
        leaves: Sequence[Tensor | None],
        shape: Sequence[int],
        rows: Sequence[int],
        back: Callable[..., Sequence[Tensor | None]],
    ) -> Answered:
        query = leaves[0]
        if query is None:
            raise ArithmeticError("calls have a query")
        nothing = query.detach().new_empty(1, dtype=self.dtype)
        out = nothing.expand(tuple(shape)).requires_grad_()
        lse = nothing.to(stats_dtype(self.dtype)).expand(tuple(rows)).requires_grad_()
        self.found.append(LeftOut(leaves, out, lse, back))
        return out, lse, lse.detach()


def _apart(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach() for t in tensors]


def _back_of_one(
    launcher: Launcher,
    call: KernelCall,
    tensors: dict[str, Any],
    drawn: Drawn,
    out: Tensor,
    lse: Tensor,
    dy: Tensor | None,
    dlse: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value and sink of one call on all rows."""
    peak = lse.masked_fill(lse == -torch.inf, 0.0)  # all is masked there, so weights are 0
    total = torch.ones_like(peak)
    whole = Answer(out.contiguous(), pack_stats(call, peak), pack_stats(call, total), drawn)
    return backward_of_one(launcher, call, tensors, whole, lse, dy, dlse)


def _back_of_several(
    calls: BackwardCalls,
    leaves: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    dy: Tensor | None,
    dlse: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, sink and logits of calls that are merged."""
    peak, total = lse, (lse != -torch.inf).to(lse.dtype)  # a row without keys has the sum 0
    return backward_of(calls, leaves, Answer(out, peak, total), kept, dy, dlse)
