"""`ContextParallel`: how attention is spread over the processes of a group."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal, NoReturn

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from attnkit.arguments import check_int, check_number
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.layouts import SeqLens, as_seqlens
from attnkit.masks import Mask
from attnkit.masks.parse import as_mask
from attnkit.parallel.balance import balanced
from attnkit.parallel.choices import Choices
from attnkit.parallel.sharding import Sharding
from attnkit.parallel.shards import Shards
from attnkit.parallel.wires import GroupWires, Wires

__all__ = ["ContextParallel"]

_MOST_SHARDS = 16


class ContextParallel:
    """How attention is spread over the processes of a group, one of which this one is.

    - `group`: a dimension of a `DeviceMesh`, ``mesh["cp"]``, or a `ProcessGroup`. What a plan for
      some number of ranks looks like needs none: `attnkit.parallel.plan`.
    - `method`: what is exchanged. "needed": the keys that a rank's rows see; "ring": all keys, a
      rank's at a time; "gather": all keys at once; "ulysses": tokens for heads; "hybrid": tokens
      for heads among neighbours, and keys between these; "auto": what costs the least by estimate.
      That is weighed for every batch of new lengths, so name one where each step has others.
    - `heads_ways`: of "hybrid", how many neighbours split the heads.
    - `balance`: who has which tokens. "even" in tokens and in cells, "contiguous", "zigzag",
      "line", or a `Sharding`; "auto" is "even", since prices need the shapes that layers bring.
    - `stages`: in how many parts what is needed arrives, while the part before is computed.
    - `keep`: whether keys that were received are kept for the backward, or fetched again.
    - `dropout`: "global" drops the cells that one process drops. The seed of each call is drawn
      from torch's generator of the CPU on every rank, as in one process: seed all ranks alike
      (``torch.manual_seed``) and draw alike on all. Ranks whose seeds differ are an error. So a
      run that restores the generators goes on as it would have, on another number of ranks, too,
      and activation checkpointing drops the same cells again. Where heads are spread, too, each
      process counts its own from 0: seed those with other heads apart. "local" drops others, with
      a seed of each rank's own: for backends that draw in an order of their own (Ascend).
    - `timeout`: seconds until a rank that is waited for is an error.

    Raises `CompositionError` for what is none of these.

    >>> import torch
    >>> import attnkit as ak
    >>> from attnkit import masks
    >>> from attnkit.parallel.wires import Alone  # as a group of one process
    >>> cp = ContextParallel(Alone())
    >>> here = cp.shards(masks.Causal(), tokens=6)
    >>> x = torch.randn(2, 6, 4, 8)
    >>> local = here.take(x)
    >>> ak.attention(local, local, local, mask=masks.Causal(), shards=here).shape
    torch.Size([2, 6, 4, 8])
    """

    def __init__(
        self,
        group: DeviceMesh | ProcessGroup | Wires,
        *,
        method: str = "auto",
        heads_ways: int | Literal["auto"] = "auto",
        balance: str | Sharding = "auto",
        stages: int | Literal["auto"] = "auto",
        keep: bool | Literal["auto"] = "auto",
        dropout: str = "global",
        timeout: float = 60.0,
    ) -> None:
        rule = "finite seconds above 0"
        check_number("timeout", timeout, lambda t: 0 < t < math.inf, rule)
        self.choices = Choices(method, heads_ways, stages, keep, dropout)
        self.balance = balance
        self.wires = _wires(group, timeout)
        self.choices.check(self.wires.size)
        self._shards: dict[Hashable, Shards] = {}

    @property
    def rank(self) -> int:
        """The number of this process in the group."""
        return self.wires.rank

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.wires.size

    def shards(
        self,
        mask: Mask | None = None,
        *,
        tokens: int | None = None,
        seqlens: SeqLens | None = None,
        keys: int | None = None,
        layers: Sequence[Mask] = (),
    ) -> Shards:
        """Return which of some tokens each process has, balanced for a mask or those of `layers`.

        `tokens` is the length of the whole text, `keys` that of its context in cross-attention;
        `seqlens` are the lengths of a packed batch, whose tokens lie on one axis. One is for all
        layers of a model: give the masks that differ as `layers`. Layers may have other masks,
        too, which are then less balanced and just as right.

        The same lengths give the same object again, with the plans of its layers.
        """
        every = [as_mask(one) for one in ([] if mask is None else [mask]) + [*layers]]
        lengths = _lengths(tokens, seqlens, keys)
        known = (tuple(one.form for one in every), *lengths)
        found = self._shards.get(known)
        if found is None:
            found = self._made(every, *lengths)
            if len(self._shards) >= _MOST_SHARDS:
                self._shards.pop(next(iter(self._shards)))  # the oldest
            self._shards[known] = found
        return found

    def _made(
        self, every: Sequence[Mask], tokens: int | None, seqlens: SeqLens | None, keys: int | None
    ) -> Shards:
        queries, of_keys = balanced(every, tokens, keys, seqlens, self.wires.size, self.balance)
        return Shards(queries, of_keys, self.wires, self.choices, seqlens)

    def __repr__(self) -> str:
        how, wires = self.choices, self.wires
        return (
            f"ContextParallel(rank {wires.rank} of {wires.size}, method={how.method!r}, "
            f"balance={shown(self.balance)})"
        )

    def __reduce__(self) -> NoReturn:
        raise CompositionTypeError(
            f"{self!r} is bound to the processes of a group and stays with them; make one in each "
            "process"
        )


def _lengths(
    tokens: int | None, seqlens: SeqLens | None, keys: int | None
) -> tuple[int | None, SeqLens | None, int | None]:
    """Return what is given of lengths, if it says them once."""
    if (tokens is None) == (seqlens is None):
        raise CompositionError(
            f"tokens={shown(tokens)}, seqlens={shown(seqlens)}: give the length of the whole text, "
            "tokens=, or the lengths of a packed batch, seqlens=; one of them"
        )
    for name, count in (("tokens", tokens), ("keys", keys)):
        if count is not None:
            check_int(name, count, 0)
    if as_seqlens(seqlens) is not None and keys is not None:
        raise CompositionError(
            f"keys={keys} with {seqlens}, which says how many keys each sequence has; leave it out"
        )
    return tokens, seqlens, keys


def _wires(group: object, timeout: float) -> Wires:
    """Return what connects the processes of a group."""
    if isinstance(group, Wires):
        return group
    if isinstance(group, DeviceMesh):
        names = group.mesh_dim_names or ()
        if group.ndim != 1:
            told = f"mesh[{names[0]!r}]" if names else "a mesh whose dimensions have names"
            raise CompositionError(
                f"group={group} has {group.ndim} dimensions; text is spread along one of them, "
                f"such as {told}"
            )
        group = group.get_group()
    if not isinstance(group, ProcessGroup):
        told = (
            "; plans for so many ranks need no group: attnkit.parallel.plan(..., ranks=...)"
            if isinstance(group, int)
            else ""
        )
        raise CompositionTypeError(
            f"group={shown(group)}; give a dimension of a DeviceMesh, mesh['cp'], or a process "
            f"group of torch.distributed{told}"
        )
    return GroupWires(group, timeout)
