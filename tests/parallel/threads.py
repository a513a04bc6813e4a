"""All ranks of a group as threads of one process: their wires are queues.

Fast, and stricter than a network: both sides must say the same of a message, none may be left
over, and a rank can be made late.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from queue import Empty, Queue
from typing import Any, TypeVar

from torch import Tensor

from attnkit.errors import ExchangeError
from attnkit.parallel.wires import Alone, Messages, Wires

__all__ = ["Delay", "Listening", "ThreadWires", "run_ranks"]

Found = TypeVar("Found")
Delay = Callable[[int, str], float]
"""Seconds that a rank waits before it posts something."""

LIMIT = 120.0
"""Seconds that all ranks together may take: hours on a machine that does nothing else."""


class Switchboard:
    """The queue of every ordered pair of ranks; `fail` wakes up whoever waits."""

    def __init__(self, size: int, limit: float) -> None:
        self.end = time.monotonic() + limit
        pairs = product(range(size), repeat=2)
        self.queues: dict[tuple[int, int], Queue[tuple[str, Tensor] | None]]
        self.queues = {pair: Queue() for pair in pairs}  # now: threads would make some twice
        self.broken = False

    def fail(self) -> None:
        self.broken = True
        for queue in self.queues.values():
            queue.put(None)

    def left_over(self) -> list[str]:
        return [
            f"{queue.qsize()} messages from rank {a} that rank {b} did not take"
            for (a, b), queue in sorted(self.queues.items())
            if queue.qsize()
        ]


class ThreadWires(Wires):
    """A rank's wires to the other threads."""

    def __init__(self, rank: int, size: int, board: Switchboard, delay: Delay | None) -> None:
        super().__init__(rank, size)
        self.board, self.delay = board, delay

    def _post(self, sends: Messages, receives: Messages, what: str) -> Arriving:
        if self.delay is not None:
            time.sleep(self.delay(self.rank, what))
        for tensor in (t for _, t in (*sends, *receives)):
            assert tensor.is_contiguous(), "a message is contiguous"
        for other, tensor in sends:
            self.board.queues[self.rank, other].put((what, tensor))
        return Arriving(self, receives, what)


class Arriving:
    """Messages that other threads send, or will send."""

    def __init__(self, wires: ThreadWires, receives: Messages, what: str) -> None:
        self.wires, self.receives, self.what = wires, receives, what

    def wait(self) -> None:
        for other, into in self.receives:
            what, tensor = self._next(other)
            assert what == self.what, f"rank {self.wires.rank} awaits {self.what}, gets {what}"
            assert (tensor.shape, tensor.dtype) == (into.shape, into.dtype), what
            into.copy_(tensor)

    def _next(self, other: int) -> tuple[str, Tensor]:
        wires = self.wires
        board, rank = wires.board, wires.rank
        queue = board.queues[other, rank]
        if board.broken and queue.empty():
            queue.put(None)
        try:
            found = queue.get(timeout=max(0.01, board.end - time.monotonic()))
        except Empty:
            found = None
        if found is None:
            why = "another rank failed" if board.broken else "it did not come"
            raise ExchangeError(f"rank {rank}, {self.what} from rank {other}: {why}")
        return found


class Listening(Alone):
    """A rank without others, and what it would tell them."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Exception] = []

    @contextmanager
    def telling(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if error not in self.heard:
                self.heard.append(error)
            raise


def run_ranks(
    size: int,
    function: Callable[[ThreadWires], Found],
    *,
    delay: Delay | None = None,
    limit: float = LIMIT,
) -> list[Found]:
    """Return what `function` returns on the wires of each rank, all ranks at the same time.

    What a rank raises is raised here: of several, what is no mere consequence. Tensors that a
    rank sends must stay as they are until it returns; a rank that is stuck is an error that
    shows where.
    """
    board = Switchboard(size, limit)
    found: dict[int, Any] = {}
    errors: dict[int, BaseException] = {}

    def work(rank: int) -> None:
        try:
            found[rank] = function(ThreadWires(rank, size, board, delay))
        except BaseException as error:
            errors[rank] = error
            board.fail()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.01, board.end + 1.0 - time.monotonic()))
    if errors:
        raise min(errors.values(), key=lambda error: isinstance(error, ExchangeError))
    stuck = [thread for thread in threads if thread.is_alive()]
    frames = sys._current_frames()
    shown = "".join("".join(traceback.format_stack(frames[t.ident or 0])[-6:]) for t in stuck)
    assert not stuck, f"{len(stuck)} ranks are stuck:\n{shown}"
    assert not board.left_over(), "; ".join(board.left_over())
    return [found[rank] for rank in range(size)]
