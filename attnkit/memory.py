"""`Memory`: the memory of a cache, a row of tokens for each text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnkit.arguments import check_tensor
from attnkit.errors import CompositionError, CompositionTypeError

__all__ = ["Memory", "Pair", "Range", "check_pair", "padded", "room_for", "with_room"]

_FIRST_ROOM = 16

Range = tuple[int, int]
Pair = tuple[Tensor, Tensor]


class Memory:
    """Keys and values ``[b, room, n, d]``; each text's tokens are the first of its row.

    What lies behind them has no meaning.
    """

    def __init__(self, like: Pair, batch: int, room: int) -> None:
        self.pair: Pair = (_empty(like[0], batch, room), _empty(like[1], batch, room))

    @property
    def batch(self) -> int:
        """The number of texts."""
        return self.pair[0].shape[0]

    @property
    def room(self) -> int:
        """The tokens that a row has room for."""
        return self.pair[0].shape[1]

    def read(self, used: int) -> Pair:
        """Return the first `used` tokens of each row, as views."""
        keys, values = self.pair
        return keys[:, :used], values[:, :used]

    def write(self, new: Pair, firsts: Sequence[int], counts: Sequence[int]) -> None:
        """Write ``[b, s, n, d]``, or packed ``[t, n, d]``, behind the first tokens of each row.

        `firsts` and `counts` say where and how many: one number for all rows, or one for each.
        """
        if len(firsts) == len(counts) == 1 and new[0].ndim == 4:
            for tensor, tokens in zip(self.pair, new, strict=True):
                tensor[:, firsts[0] : firsts[0] + counts[0]] = tokens.detach()
            return
        each = self.batch
        starts = list(firsts) * (each // len(firsts))
        sizes = list(counts) * (each // len(counts))
        places = [
            (row, place)
            for row, start, size in zip(range(each), starts, sizes, strict=True)
            for place in range(start, start + size)
        ]
        index = torch.tensor(places, dtype=torch.long).view(-1, 2)
        index = index.to(new[0].device, non_blocking=True)
        for tensor, tokens in zip(self.pair, new, strict=True):
            flat = tokens if tokens.ndim == 3 else tokens.flatten(0, 1)
            tensor[index[:, 0], index[:, 1]] = flat.detach()

    def keep(self, places: Sequence[Sequence[Range]], room: int) -> None:
        """Keep the tokens at some places of each row (or one list for all), in this order."""
        self.pair = (
            _kept(self.pair[0], places, room),
            _kept(self.pair[1], places, room),
        )

    def pick(self, index: Tensor, used: int) -> None:
        """Make row k what row ``index[k]`` was; in place where their number stays the same."""
        keys, values = (_picked(tensor, index, used) for tensor in self.pair)
        self.pair = keys, values


def room_for(held: int) -> int:
    """Return how much room rows have that may grow, so that each token costs the same.

    >>> room_for(3), room_for(100)
    (16, 200)
    """
    return max(_FIRST_ROOM, 2 * held)


def with_room(memory: Memory | None, new: Pair, batch: int, stop: int, limit: int | None) -> Memory:
    """Return a memory of what is held that has room for `stop` tokens in each row.

    >>> token = torch.zeros(2, 1, 4, 8)
    >>> with_room(None, (token, token), 2, 20, None).room
    20
    """
    if memory is not None and stop <= memory.room:
        return memory
    try:
        room = limit or max(stop, room_for(0 if memory is None else memory.room))
        larger = Memory(new, batch, room)
    except RuntimeError as error:
        if limit is None:
            raise  # the memory is full, and no number of ours is the reason
        shape = (batch, limit, *new[0].shape[-2:])
        raise CompositionError(
            f"KVCache: its capacity of {limit} tokens takes "
            f"{math.prod(shape) * new[0].element_size():.3g} bytes for keys {list(shape)} of "
            f"{new[0].dtype}, which {new[0].device} does not give; ask for fewer, or "
            "capacity=None to grow"
        ) from error
    if memory is not None:
        for tensor, held in zip(larger.pair, memory.pair, strict=True):
            tensor[:, : held.shape[1]] = held
    return larger


def padded(tokens: Tensor, counts: Sequence[int]) -> Tensor:
    """Return packed tokens ``[t, ...]`` as ``[b, max(counts), ...]``, zeros behind each text.

    >>> padded(torch.tensor([1.0, 2.0, 3.0]), [2, 1])
    tensor([[1., 2.],
            [3., 0.]])
    """
    if min(counts) == max(counts):
        return tokens.reshape(len(counts), counts[0], *tokens.shape[1:])
    pieces = list(torch.split(tokens, list(counts)))
    return torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)


def _empty(like: Tensor, batch: int, room: int) -> Tensor:
    """Return room for ``[b, room, n, d]``, in which the tokens of each head lie end to end.

    So a step reads the keys of a head in one go, and all heads and texts are one batch.
    """
    heads, dim = like.shape[-2:]
    # A tensor made in inference mode could not be written outside of it later.
    with torch.inference_mode(False):
        return like.new_empty((batch, heads, room, dim)).transpose(1, 2)


def _kept(old: Tensor, places: Sequence[Sequence[Range]], room: int) -> Tensor:
    new = old if room == old.shape[1] else _empty(old, old.shape[0], room)
    for k, spans in enumerate(places):
        rows = slice(None) if len(places) == 1 else slice(k, k + 1)
        # Put together before it is written: in place, it may lie where it came from.
        kept = torch.cat([old[rows, :0], *(old[rows, a:b] for a, b in spans)], 1)
        new[rows, : kept.shape[1]] = kept
    return new


def _picked(old: Tensor, index: Tensor, used: int) -> Tensor:
    new = old if len(index) == old.shape[0] else _empty(old, len(index), old.shape[1])
    new[:, :used] = old[:, :used].index_select(0, index)
    return new


def check_pair(
    key: Tensor, value: Tensor, held: Memory | None, counts: Sequence[int] | None
) -> None:
    """Raise unless both are tokens ``b s n d``, or with counts ``t n d``, like those held.

    >>> check_pair(torch.zeros(2, 1, 4), torch.zeros(2, 1, 4), None, [1, 1])
    """
    for name, new, which in (("key", key, 0), ("value", value, 1)):
        _check(name, new, counts)
        if held is not None:
            _check_like(name, new, held.pair[which], held.batch, counts)
    if key.shape[:-1] != value.shape[:-1]:
        raise CompositionError(
            f"KVCache: key {list(key.shape)} and value {list(value.shape)}; each token "
            "has one of each in every head"
        )
    if (key.dtype, key.device) != (value.dtype, value.device):
        raise CompositionTypeError(
            f"KVCache: key {key.dtype} on {key.device}, value {value.dtype} on {value.device}; "
            "cast or move one of them, for attention takes both alike"
        )


def _check(name: str, new: Tensor, counts: Sequence[int] | None) -> None:
    check_tensor(f"KVCache: {name}", new)
    if counts is None and new.ndim != 4:
        raise CompositionError(f"KVCache: {name} {list(new.shape)}; give it as [b, s, n, d]")
    if counts is not None and (new.ndim != 3 or new.shape[0] != sum(counts)):
        raise CompositionError(
            f"KVCache: {name} {list(new.shape)} with counts that sum to {sum(counts)}; give "
            "packed tokens [t, n, d], and how many of them each text has"
        )
    if not new.is_floating_point():
        raise CompositionTypeError(
            f"KVCache: {name} is {new.dtype}; keys and values are floating-point numbers"
        )
    if new.requires_grad and torch.is_grad_enabled():
        raise CompositionError(
            f"KVCache: {name} needs a gradient, which a cache would cut off silently; decode "
            "under torch.no_grad() or torch.inference_mode()"
        )


def _check_like(
    name: str, new: Tensor, held: Tensor, batch: int, counts: Sequence[int] | None
) -> None:
    for what, was, now in (
        ("batch", batch, new.shape[0] if counts is None else len(counts)),
        ("heads", held.shape[2], new.shape[-2]),
        ("head dim", held.shape[3], new.shape[-1]),
        ("dtype", held.dtype, new.dtype),
        ("device", held.device, new.device),
    ):
        if was != now:
            raise CompositionError(
                f"KVCache: it holds {name}s of {what} {was}, the new {name} has {now}; a cache "
                "serves one layer and one batch (reset() makes it ready for another)"
            )
