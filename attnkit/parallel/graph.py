"""What a graph of `torch.compile` has of shards: how its operator attends, and positions.

The operator is that of every attention (`attnkit.backends.graph`). It knows the shards of a batch
by their handle, and finds the plan of all ranks when it runs: one graph serves every length and
every sharding, and ranks may have different numbers of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnkit.backends import AttentionOutput, Operands, Stats
from attnkit.backends.base import BACKENDS, Kept
from attnkit.backends.graph import Held, without_memory
from attnkit.errors import CompositionError
from attnkit.handles import told
from attnkit.parallel.plan import ParallelPlan
from attnkit.parallel.run import Attended, backward, forward, no_maximum
from attnkit.parallel.wires import Wires
from attnkit.pse import Pse

__all__ = ["SpreadHeld", "places_in_graph", "without_maximum"]


@dataclass(frozen=True, eq=False)
class SpreadHeld(Held):
    """A plan of all ranks with its bias, and the wires of this one.

    A graph keeps the answer of a call and nothing else: keys are fetched again in the backward
    pass, and what is more than that is computed again.
    """

    plan: ParallelPlan  # type: ignore[assignment]
    wires: Wires

    saves_lse = True

    @classmethod
    def of(cls, plan: ParallelPlan, pse: Pse | None, wires: Wires) -> SpreadHeld:
        """Return a plan with a kind of bias; the plan keeps it."""
        kinds: dict[object, SpreadHeld] = plan.__dict__.setdefault("_held", {})
        kind = None if pse is None else pse.key()
        if kind not in kinds:
            kinds[kind] = cls(replace(plan, keep=False), without_memory(pse), wires)
        return kinds[kind]

    def compute(self, operands: Operands, seed: Tensor | None) -> AttentionOutput:
        """Run the plan on this rank; nothing is recorded."""
        with self.wires.telling():
            found = forward(self.plan, self.wires.rank, self.wires, operands, seed)
        return AttentionOutput(found.output, Stats(found.lse, found.lse))

    def gradients(
        self, operands: Operands, kept: Kept, wanted: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of the leaves that are wanted; all ranks exchange them."""
        here = self.plan, self.wires.rank, self.wires, operands
        attended = Attended(kept.output, kept.lse, ())
        with self.wires.telling():
            if self.keeps_more:
                attended = forward(*here, kept.seed)
            return backward(*here, attended, (kept.grad, kept.grad_lse), wanted, kept.seed)

    @property
    def keeps_more(self) -> bool:
        """Whether the backward pass needs more than the answer: the same on all ranks."""
        name, device = self.plan.backend, self.plan.request.device
        calls = device == "npu" if name == "auto" else BACKENDS[name].by_calls
        return self.plan.heads_ways > 1 or calls


def without_maximum(found: AttentionOutput) -> AttentionOutput:
    """Return the same, without a maximum of rows whose keys are on several ranks."""
    return AttentionOutput(found.output, Stats(found.stats.lse, no_maximum))


def places_in_graph(shards: Tensor, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `Shards.places`, of the handle of some."""
    found: tuple[Tensor, Tensor] = _places(shards, tokens, device)
    return found


def _of_handle(shards: Tensor, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    here = told(shards)
    where, longest = here.places(device)
    with here.wires.telling():
        if len(where) != tokens:
            raise CompositionError(
                f"x has {tokens} tokens, and this process has {len(where)} of its shards"
            )
    return where.clone(), longest.clone()  # what an operator returns is its own


_places = torch.library.custom_op(
    "attnkit::places",
    _of_handle,
    mutates_args=(),
    schema="(Tensor shards, SymInt tokens, Device device) -> (Tensor, Tensor)",
)
_places.register_fake(
    lambda shards, tokens, device: (
        torch.empty(tokens, dtype=torch.int64, device=device),
        torch.empty((), dtype=torch.int64, device=device),
    )
)
