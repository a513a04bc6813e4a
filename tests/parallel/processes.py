"""Processes of a gloo group that live as long as the tests of a session, for functions of these.

They start when they are first asked for something. One that crashes or hangs is a failure of the
test that asked, with the traceback of every rank, and the next test gets new ones.
"""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Pool"]

ROOT = Path(__file__).parents[2]

LIMIT = 180.0
"""Seconds that a job may take: far more than it does on a machine that others use, too."""


class Pool:
    """`size` processes with a gloo group of all of them, and one of each smaller number."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.workers: list[Any] = []
        self.pipes: list[Connection] = []

    def run(
        self, function: Callable[..., Any], *args: Any, ranks: int = 0, limit: float = LIMIT
    ) -> list[Any]:
        """Return what ``function(group, *args)`` returns on each of the first `ranks` processes.

        The function is one of a module, its arguments and results are pickled; `group` is the
        process group of these ranks.
        """
        ranks = ranks or self.size
        self._start()
        answers: dict[int, tuple[bool, Any]] = {}
        try:
            for pipe in self.pipes[:ranks]:
                with suppress(OSError):  # of a process that is gone
                    pipe.send((function, args, ranks, limit))
            end = time.monotonic() + limit + 2.0  # the ranks tell by themselves where they hang
            for rank, pipe in enumerate(self.pipes[:ranks]):
                if pipe.poll(max(0.0, end - time.monotonic())):
                    with suppress(EOFError, OSError):
                        answers[rank] = pipe.recv()
            told = [f"rank {r}: {self._told(r, answers)}" for r in range(ranks)]
            good = all(answers.get(rank, (False, None))[0] for rank in range(ranks))
            assert good, "\n".join(told)
        except BaseException:
            self.close()
            raise
        return [answers[rank][1] for rank in range(ranks)]

    def _told(self, rank: int, answers: dict[int, tuple[bool, Any]]) -> str:
        if rank in answers:
            good, answer = answers[rank]
            return "done" if good else str(answer)
        ended = self.pipes[rank].poll(0)  # nobody holds the other end any more
        self.workers[rank].join(5.0 if ended else 0.0)
        code = self.workers[rank].exitcode
        where = Path(self._path(f"hang{rank}"))
        stuck = where.read_text() if where.exists() else ""
        return f"it hangs\n{stuck}" if code is None else f"it ended with exit code {code}\n{stuck}"

    def _path(self, name: str) -> str:
        return str(Path(self.folder.name if self.folder else "", name))

    def _start(self) -> None:
        if self.workers:
            return
        self.folder = tempfile.TemporaryDirectory(prefix="attnkit-ranks-")
        context = _forks()
        for rank in range(self.size):
            here, there = context.Pipe()
            args = (there, rank, self.size, self._path("store"), self._path(f"hang{rank}"))
            worker = context.Process(target=_serve, args=args, daemon=True)
            worker.start()
            there.close()
            self.workers.append(worker)
            self.pipes.append(here)
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(LIMIT), f"rank {rank} does not start"
            with suppress(EOFError, OSError):  # of one that has ended, which `run` tells
                pipe.recv()

    def close(self) -> None:
        """End the processes; the next job starts others."""
        for pipe in self.pipes:
            pipe.close()
        for worker in self.workers:
            worker.kill()
            worker.join(10)
        if self.folder is not None:
            self.folder.cleanup()
        self.folder, self.workers, self.pipes = None, [], []


def _forks() -> Any:
    """Return what forks a clean process for every rank, which has imported this tree once."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "attnkit.parallel.run"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def _serve(pipe: Connection, rank: int, size: int, store: str, hang: str) -> None:
    """Do one job after the other, until nobody is there to ask for any."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=LIMIT)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=limit
    )
    groups = {n: dist.new_group(list(range(n)), timeout=limit) for n in range(1, size)}
    groups[size] = dist.group.WORLD
    pipe.send("ready")
    with open(hang, "w") as trace:
        while True:
            try:
                function, args, ranks, seconds = pipe.recv()
            except EOFError:
                os._exit(0)
            faulthandler.dump_traceback_later(seconds, file=trace)
            try:
                answer = True, function(groups[ranks], *args)
            except BaseException:
                answer = False, traceback.format_exc()
            faulthandler.cancel_dump_traceback_later()
            pipe.send(answer)
