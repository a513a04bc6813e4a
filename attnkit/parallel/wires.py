"""How ranks exchange tensors: one message per pair and post, each wait with a deadline.

Whoever posts knows what the other side posts: both read the same plan. Messages between two ranks
are taken in the order in which they were sent.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from typing import Any, Protocol, final

import torch
import torch.distributed as dist
from torch import Tensor

from attnkit.errors import LONGEST, CompositionError, ExchangeError, clipped
from attnkit.parallel.guard import Guard, Statement

__all__ = ["Alone", "GroupWires", "Messages", "Pending", "Wires"]

Messages = Sequence[tuple[int, Tensor]]
"""Tensors, and the rank that each goes to or comes from. Each tensor is contiguous."""

NEVER = (1 << 31) - 1
"""A tag that no message has, unless by a chance of one in 2 ** 31."""

MARGIN = 0.05
"""Seconds that are left for a message where the others of its post have used up the time."""


class Pending(Protocol):
    """Messages on their way."""

    def wait(self) -> None:
        """Return once all have arrived and been sent; raises `ExchangeError` at a deadline."""


class Wires(ABC):
    """What a rank is connected to the others by; counts the bytes that it sends and receives.

    >>> alone = Alone()
    >>> alone.post([], [], "keys of stage 1").wait()
    >>> alone.sent, alone.received
    ([0], [0])
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.sent, self.received = [0] * size, [0] * size
        self.guard: Guard | None = None
        self.tag = 0

    def begin(self, statement: Statement, data: Sequence[tuple[str, int]] = ()) -> None:
        """Begin an exchange, as all ranks do, one without messages, too; see `Guard.begin`.

        Raises where ranks begin different ones, or one does not come.
        """
        if self.guard is not None:
            self.tag = self.guard.begin(statement, data)

    def telling(self) -> AbstractContextManager[None]:
        """Tell the other ranks what is raised inside, which is one whole exchange."""
        return nullcontext() if self.guard is None else self.guard.telling()

    @final
    def post(self, sends: Messages, receives: Messages, what: str) -> Pending:
        """Begin to send and to receive; `what` it is, in words for messages of errors.

        Every rank posts the same exchanges in the same order, as far as it has a part in them.
        Empty tensors are left out, on both sides alike. Neither side may write to a tensor
        before its `wait` has returned.
        """
        sends = [one for one in sends if one[1].numel()]
        receives = [one for one in receives if one[1].numel()]
        for counts, messages in ((self.sent, sends), (self.received, receives)):
            for other, tensor in messages:
                counts[other] += tensor.nbytes
        if not sends and not receives:
            return _NOTHING
        try:
            pending = self._post(sends, receives, what)
        except ExchangeError:
            if self.guard is not None:
                self.guard.look()  # it may be known why
            raise
        # Elsewhere it is the device that waits.
        on_host = is_on_host((*sends, *receives)[0][1])
        return pending if self.guard is None or not on_host else _Patient(pending, self, self.guard)

    def let_go(self) -> None:
        """Give up what is on its way, after an error: whoever waits for it wakes up."""
        return

    @abstractmethod
    def _post(self, sends: Messages, receives: Messages, what: str) -> Pending:
        """Begin to send and to receive what is not empty."""


class _Patient:
    """Messages that the host waits for, and looks meanwhile where the other ranks are."""

    def __init__(self, pending: Pending, wires: Wires, guard: Guard) -> None:
        self.pending, self.wires, self.guard = pending, wires, guard

    def wait(self) -> None:
        self.guard.patient(self.pending.wait, self.wires.let_go)


class _Nothing:
    """No message at all."""

    def wait(self) -> None:
        return


_NOTHING = _Nothing()


class Alone(Wires):
    """A rank without others."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def _post(self, sends: Messages, receives: Messages, what: str) -> Pending:
        raise CompositionError(f"{what}: a group of one rank has nobody to exchange with")


class GroupWires(Wires):
    """Wires over a process group of torch.distributed, or the default one.

    On the CPU (gloo) every message is waited for by itself, `timeout` seconds at most. On an
    accelerator (nccl, hccl) the messages of a post are one group call, which the device's stream
    waits for, not the host; there the group's own timeout holds.

    Raises `ExchangeError` that names the two ranks, what they were exchanging, and its bytes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: float = 60.0) -> None:
        if not dist.is_initialized():
            raise CompositionError(
                "there is no process group: call torch.distributed.init_process_group first"
            )
        whole: Any = dist.group.WORLD
        self.group: dist.ProcessGroup = whole if group is None else group
        super().__init__(dist.get_rank(self.group), dist.get_world_size(self.group))
        if self.rank < 0:
            raise CompositionError(
                f"process {dist.get_rank()} is not in this process group of {self.size}; only its "
                "ranks exchange in it"
            )
        self.timeout = float(timeout)
        self.guard = Guard.of(self.group, self.timeout) if self.size > 1 else None
        self._has_met = self.size == 1

    def begin(self, statement: Statement, data: Sequence[tuple[str, int]] = ()) -> None:
        """Also let all ranks of an accelerator's group meet once, when they are known to be there.

        The first group call of a communicator needs all of its ranks, or it hangs; a stage may be
        of some. Source: https://github.com/pytorch/pytorch/pull/74701
        """
        super().begin(statement, data)
        if not self._has_met:
            self._has_met = True
            if dist.get_backend(self.group) != "gloo":
                dist.barrier(self.group)

    def let_go(self) -> None:
        """Close the group, whose messages cannot be waited for any more.

        A wait that expires does it (gloo closes all of its pairs then): here one for a message
        that nobody sends.
        """
        other = (self.rank + 1) % self.size
        with suppress(RuntimeError):
            never = _Posted(dist.irecv, "from", other, torch.empty(1, device="cpu"))
            never.begin(self.group, NEVER)
            never.work.wait(timeout=timedelta(milliseconds=1))

    def _post(self, sends: Messages, receives: Messages, what: str) -> Pending:
        # Receives first: what arrives finds its place.
        ways = ((dist.irecv, "from", receives), (dist.isend, "to", sends))
        posted = [_Posted(op, way, *one) for op, way, some in ways for one in some]
        pending = _Posts(self, what, posted)
        pending.begin()
        return pending


def is_on_host(tensor: Tensor) -> bool:
    """Return whether the host waits for a message of this tensor."""
    return tensor.device.type == "cpu"


class _Posted:
    """A message of a post: the operation, which way it goes, with whom, and the tensor."""

    def __init__(self, op: Callable[..., Any], way: str, other: int, tensor: Tensor) -> None:
        self.op, self.way, self.other, self.tensor = op, way, other, tensor
        self.work: Any = None

    def begin(self, group: dist.ProcessGroup, tag: int) -> None:
        """Begin; by their tag messages of different exchanges never meet."""
        side = "group_src" if self.way == "from" else "group_dst"
        self.work = self.op(self.tensor, group=group, tag=tag, **{side: self.other})

    def __str__(self) -> str:
        return f"{self.tensor.nbytes:,} bytes {self.way} rank {self.other}"


class _Posts:
    """Messages of a process group; keeps their tensors until they are done."""

    def __init__(self, wires: GroupWires, what: str, posted: Sequence[_Posted]) -> None:
        self.wires, self.what, self.posted = wires, what, posted
        self.works: list[Any] = []

    def begin(self) -> None:
        if is_on_host(self.posted[0].tensor):
            for one in self.posted:
                self._guarded(one, partial(one.begin, self.wires.group, self.wires.tag))
            return
        group = self.wires.group
        operations = [
            dist.P2POp(one.op, one.tensor, group=group, group_peer=one.other) for one in self.posted
        ]
        self.works = self._guarded(None, partial(dist.batch_isend_irecv, operations))

    def wait(self) -> None:
        """Wait for one after the other; all of them share the time."""
        start = time.monotonic()
        for work in self.works:
            self._guarded(None, work.wait, start)
        for one in self.posted if not self.works else ():
            left = max(MARGIN, self.wires.timeout - (time.monotonic() - start))
            self._guarded(one, partial(one.work.wait, timeout=timedelta(seconds=left)), start)
        self.posted, self.works = (), []

    def _guarded(self, one: _Posted | None, step: Callable[[], Any], start: float = 0.0) -> Any:
        """Do a step of the exchange; what the group says is wrong is told in our words."""
        try:
            return step()
        except (RuntimeError, ValueError) as error:
            raise ExchangeError(self._told(one, error, start)) from error

    def _told(self, one: _Posted | None, error: Exception, start: float) -> str:
        wires = self.wires
        of = "; ".join(map(str, self.posted)) if one is None else str(one)
        said = str(error).strip().splitlines()
        waited = time.monotonic() - start if start else 0.0
        if one is not None and waited + MARGIN >= wires.timeout:
            why = (
                f"nothing for {waited:.1f} s (timeout={wires.timeout:g}): rank {one.other} is "
                "absent, late, or computes something else"
            )
        else:
            first = re.sub(r"^\[[^\]]*\] ", "", said[0]) if said else type(error).__name__
            why = f"the process group broke off: {clipped(first.partition('. ')[0], LONGEST)}"
        return (
            f"rank {wires.rank} of {wires.size}, {self.what}: {of}: {why}. See what that rank "
            "says; if it is only slow, give a larger timeout=. The process group cannot be used "
            "any more"
        )
