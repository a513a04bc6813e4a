"""How long runs take on a device, measured in turns by the clock that the device has."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

__all__ = ["Clock", "alternate"]


@dataclass(frozen=True)
class Clock:
    """Times one run: by events in the device's own queue on CUDA, by the host's clock elsewhere."""

    device: torch.device

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        torch.get_device_module(self.device).synchronize(self.device)

    def nanoseconds(self, run: Callable[[], object]) -> float:
        """Run it, and return how long that took."""
        self.synchronize()
        if self.device.type == "cuda":
            return self._by_events(run)
        started = time.perf_counter_ns()
        run()
        self.synchronize()
        return float(time.perf_counter_ns() - started)

    def _by_events(self, run: Callable[[], object]) -> float:
        event: Any = torch.cuda.Event  # untyped in torch
        started, ended = (event(enable_timing=True) for _ in range(2))
        queue = torch.cuda.current_stream(self.device)
        started.record(queue)
        run()
        ended.record(queue)
        self.synchronize()
        return 1e6 * float(started.elapsed_time(ended))  # told in milliseconds


def alternate(
    forms: Mapping[str, Callable[[], object]], clock: Clock, rounds: int
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return medians in nanoseconds, after one run each to warm up, and what did not run.

    The forms take turns, so that a machine that slows down slows all of them.
    """
    times: dict[str, list[float]] = {}
    notes = []
    for name, form in forms.items():
        try:
            clock.nanoseconds(form)
            times[name] = []
        except RuntimeError as error:
            notes.append(f"{name} did not run: {(str(error).splitlines() or ['no reason'])[0]}")
    for _ in range(rounds):
        for name, taken in times.items():
            taken.append(clock.nanoseconds(forms[name]))
    return {name: float(median(taken)) for name, taken in times.items()}, tuple(notes)
