"""A rank's stages by places: where in its tensors lies what it computes, sends and receives.

All of it follows from the plan, and is made once for a rank. Tensors of the rank's own keys have
those of its stage 0 in order, received ones those of their stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from attnkit.parallel.heads import RankTurn
from attnkit.parallel.messages import places_or_all
from attnkit.parallel.plan import ParallelPlan
from attnkit.parallel.stages import Message, RankStage
from attnkit.planner import Plan
from attnkit.pse import Pse
from attnkit.ranges import Ranges, places, total

__all__ = ["Course", "Leg", "Move", "Task"]

_MOST = 8  # a process is one rank; a test is several


class Move(NamedTuple):
    """A message: whom it goes to or comes from, and where its keys lie; None: they are all."""

    rank: int
    places: Ranges | None
    size: int

    @classmethod
    def of(cls, message: Message, among: Ranges) -> Move:
        """Return where a message's keys lie among others."""
        size = total(message.keys)
        there = places_or_all(places(message.keys, among), total(among))
        return cls(message.rank, there, size)


class Task(NamedTuple):
    """A share that a rank computes: places of its rows and keys, None for all; plan and bias."""

    rows: Ranges | None
    keys: Ranges | None
    plan: Plan
    bias: Pse | None


class Leg(NamedTuple):
    """A stage: how many keys it has, where received ones go, what of the own is sent, its work."""

    number: int
    size: int
    receives: tuple[Move, ...]
    sends: tuple[Move, ...]
    tasks: tuple[Task, ...]


@dataclass(frozen=True, eq=False)
class Course:
    """What a rank does by a plan; `turn` is its exchange of tokens for heads, if there is one."""

    plan: ParallelPlan
    rank: int
    rows: int
    legs: tuple[Leg, ...]
    turn: RankTurn | None

    @classmethod
    def of(cls, plan: ParallelPlan, rank: int) -> Course:
        """Return the course of a rank, which the plan keeps."""
        known: dict[int, Course] = plan.__dict__.setdefault("_courses", {})
        found = known.get(rank)
        if found is None:
            if len(known) >= _MOST:
                known.clear()
            found = known[rank] = cls._made(plan, rank)
        return found

    @classmethod
    def _made(cls, plan: ParallelPlan, rank: int) -> Course:
        stages, rows = plan.stages(rank), plan.rows(rank)
        legs = tuple(_leg(plan, rank, stage, rows, stages[0].keys) for stage in stages)
        turn = RankTurn(plan.turn, rank) if plan.heads_ways > 1 else None
        return cls(plan, rank, total(rows), legs, turn)

    @property
    def heads(self) -> tuple[int, int]:
        """How many query heads and key heads the rank computes."""
        return len(self.plan.heads(self.rank)), len(self.plan.kv_heads(self.rank))


def _leg(plan: ParallelPlan, rank: int, stage: RankStage, rows: Ranges, own: Ranges) -> Leg:
    tasks = (
        Task(
            places_or_all(places(piece.rows, rows), total(rows)),
            places_or_all(places(piece.keys, stage.keys), total(stage.keys)),
            piece.plan,
            piece.bias,
        )
        for piece in plan.pieces(rank, stage.number)
    )
    return Leg(
        stage.number,
        total(stage.keys),
        tuple(Move.of(one, stage.keys) for one in stage.receives),
        tuple(Move.of(one, own) for one in stage.sends),
        tuple(tasks),
    )
