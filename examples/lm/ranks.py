"""The processes that a run is spread over, and what they do together."""

from __future__ import annotations

import multiprocessing as mp
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from attnkit.parallel import ContextParallel

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
PATIENCE = timedelta(minutes=5)


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run: each has a part of the tokens of every batch."""

    spread: ContextParallel | None = None
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Ranks:
        """Return the ranks of a process group."""
        return cls(ContextParallel(group), group)

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.spread is None or self.spread.rank == 0

    def added(self, *numbers: float) -> list[float]:
        """Return numbers, each added up over all processes."""
        if self.group is None:
            return [*numbers]
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def add_gradients(self, model: nn.Module) -> None:
        """Add up what the processes found out for the weights, of which each has a copy."""
        if self.group is None:
            return
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        shares = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        total = torch.cat([share.flatten() for share in shares])
        dist.all_reduce(total, group=self.group)
        start = 0
        for weight in weights:
            weight.grad = total[start : start + weight.numel()].view_as(weight)
            start += weight.numel()

    @property
    def device(self) -> torch.device:
        """Where the group exchanges tensors."""
        kind = next(kind for kind, name in BACKENDS.items() if name == dist.get_backend(self.group))
        if kind == "cpu":
            return torch.device(kind)
        return torch.device(kind, torch.get_device_module(kind).current_device())


def launch(work: Callable[..., int], count: int, *args: object) -> int:
    """Run ``work(*args, store, rank, count)`` in as many processes; return the first bad code.

    Ctrl-C reaches them all, and they decide together when to stop: here it only is waited for.
    """
    context = mp.get_context("spawn")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        workers = [
            context.Process(target=_exit_with, args=(work, *args, store, rank, count))
            for rank in range(count)
        ]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
            signal.signal(signal.SIGINT, before)
    codes = [worker.exitcode or 0 for worker in workers]
    return next((code for code in codes if code), 0)


def _exit_with(work: Callable[..., int], *args: object) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent's is inherited
    raise SystemExit(work(*args))
