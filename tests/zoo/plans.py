"""The requests that a model's attention puts to the planner, planned for Ascend.

Each request of a run is planned again in bfloat16 on meta tensors for the emulated kernel, which
refuses exactly what the hardware's would.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch

from attnkit import attend as attending
from attnkit.backends import make_plan
from attnkit.errors import BackendRefused
from attnkit.planner import Request

__all__ = ["Plans"]


class Plans:
    """While entered, every new request is kept; `record` says how each lowers."""

    def __init__(self) -> None:
        self.requests: dict[Request, None] = {}

    def __enter__(self) -> Plans:
        self._make = attending.make_plan

        def make(request: Request, backend: str = "auto") -> Any:
            if len(self.requests) < 400:
                self.requests[request] = None
            return self._make(request, backend)

        attending.make_plan = make  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        attending.make_plan = self._make

    def record(self) -> dict[str, dict[str, int]]:
        """Return, for inference and training, how often a request takes how many calls."""
        found: dict[str, Counter[str]] = {"inference": Counter(), "training": Counter()}
        seen = set()
        for request in self.requests:
            if request.dtype == torch.bfloat16:
                continue
            # A model in bfloat16 has its biases in bfloat16.
            bias = tuple(dataclasses.replace(term, dtype=torch.bfloat16) for term in request.bias)
            changed = dataclasses.replace(
                request, dtype=torch.bfloat16, bias=bias, device="meta", dropout=0.0
            )
            key = (changed, request.needs_grad)
            if key in seen:
                continue
            seen.add(key)
            kind = "training" if request.needs_grad else "inference"
            found[kind][outcome(changed)] += 1
        return {kind: dict(count) for kind, count in found.items() if count}


def outcome(request: Request) -> str:
    """Return the number of fused calls, or the code of the refusal."""
    try:
        plan = make_plan(request, "emulated")
    except BackendRefused as refused:
        return "refused: " + ",".join(sorted({r.code for r in refused.refusals}))
    except Exception as error:
        return f"error: {type(error).__name__}: {str(error)[:80]}"
    return str(len(plan.calls))
