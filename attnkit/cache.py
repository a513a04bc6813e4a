"""`KVCache`: the keys and values of the tokens so far, for decoding step by step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnkit.arguments import check_int, check_tensor
from attnkit.errors import CompositionError, CompositionTypeError, shown

__all__ = ["KVCache"]

_FIRST_CAPACITY = 16


class KVCache:
    """Keys and values ``b s n d`` of one attention layer, kept between calls of its forward.

    With a `capacity` all memory is taken at the first call and one token too many is an error;
    without, it grows by doubling, so that each token costs amortised constant time. Batch,
    heads, dtype and device are those of the first call. One cache serves one layer and one
    batch of texts; `reset` makes it ready for the next.

    In self-attention every call appends. In cross-attention the first call stores the keys and
    values of the whole context and seals the cache; later calls read them.

    Not differentiable: use it under ``torch.no_grad()`` or ``torch.inference_mode()``.

    Raises `CompositionError` when full, for tensors unlike those it holds, and for tensors
    that need a gradient.

    >>> import torch
    >>> cache = KVCache(capacity=4)
    >>> step = torch.zeros(1, 3, 2, 8)
    >>> keys, values = cache.append(step, step)
    >>> cache
    KVCache(length=3, capacity=4)
    >>> cache.append(step, step)
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionError: KVCache: 3 tokens and 3 more exceed its capacity of 4; give \
it more, or capacity=None to grow
    """

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None:
            check_int("KVCache: capacity", capacity, 1)
        self._limit = capacity
        self.reset()

    def reset(self) -> None:
        """Forget every token, and the memory with it.

        >>> cache = KVCache()
        >>> _ = cache.append(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8))
        >>> cache.reset()
        >>> cache
        KVCache(length=0, capacity=0)
        """
        self._held: tuple[Tensor, Tensor] | None = None
        self._length = 0
        self._answered: int | None = None  # the queries, once it holds a context

    @property
    def length(self) -> int:
        """The number of tokens whose keys and values it holds.

        >>> cache = KVCache()
        >>> _ = cache.append(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8))
        >>> cache.length
        3
        """
        return self._length

    @property
    def queries(self) -> int:
        """The number of query tokens answered with it so far.

        >>> cache = KVCache()
        >>> _ = cache.append(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8))
        >>> cache.queries
        3
        """
        return self._length if self._answered is None else self._answered

    @property
    def sealed(self) -> bool:
        """Whether it holds a whole context for cross-attention, which takes no more tokens.

        >>> cache = KVCache()
        >>> _ = cache.seal(torch.zeros(1, 6, 2, 8), torch.zeros(1, 6, 2, 8))
        >>> cache.sealed
        True
        """
        return self._answered is not None

    @property
    def capacity(self) -> int:
        """The number of tokens it has room for now.

        >>> cache = KVCache()
        >>> _ = cache.append(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8))
        >>> cache.capacity
        16
        """
        return 0 if self._held is None else self._held[0].shape[1]

    @property
    def nbytes(self) -> int:
        """The bytes that keys and values take.

        >>> cache = KVCache()
        >>> _ = cache.append(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8))
        >>> cache.nbytes == 2 * 16 * 2 * 8 * 4  # float32
        True
        """
        return sum(tensor.nbytes for tensor in self._held or ())

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the tokens ``b s n d``; return all keys and values so far, as views.

        >>> cache, token = KVCache(), torch.zeros(1, 1, 2, 8)
        >>> _ = cache.append(token, token)
        >>> keys, values = cache.append(token, token)
        >>> keys.shape
        torch.Size([1, 2, 2, 8])
        """
        if self.sealed:
            raise CompositionError(
                f"{self} holds the context of a cross-attention and takes no more tokens; "
                "self-attention needs another cache"
            )
        held_keys, held_values = self._held or (None, None)
        self._check("key", key, held_keys)
        self._check("value", value, held_values)
        if key.shape[:3] != value.shape[:3]:
            raise CompositionError(
                f"KVCache: key {list(key.shape)} and value {list(value.shape)}; each token "
                "has one of each in every head"
            )
        if (key.dtype, key.device) != (value.dtype, value.device):
            raise CompositionTypeError(
                f"KVCache: key {key.dtype} on {key.device}, value {value.dtype} on {value.device}; "
                "cast or move one of them, for attention takes both alike"
            )
        start, stop = self._length, self._length + key.shape[1]
        if self._limit is not None and stop > self._limit:
            raise CompositionError(
                f"KVCache: {start} tokens and {stop - start} more exceed its capacity of "
                f"{self._limit}; give it more, or capacity=None to grow"
            )
        self._held = self._write(held_keys, key, stop), self._write(held_values, value, stop)
        self._length = stop
        return self.read()

    def seal(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of a whole context, once.

        >>> cache = KVCache()
        >>> _ = cache.seal(torch.zeros(1, 6, 2, 8), torch.zeros(1, 6, 2, 8))
        >>> cache
        KVCache(length=6, capacity=16, sealed)
        """
        if self._length or self.sealed:
            raise CompositionError(
                f"{self} is in use already; a context goes into an empty cache (reset() empties it)"
            )
        views = self.append(key, value)
        self._answered = 0
        return views

    def read(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values so far, as views.

        >>> cache = KVCache()
        >>> _ = cache.append(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8))
        >>> cache.read()[0].shape
        torch.Size([1, 3, 2, 8])
        """
        if self._held is None:
            raise CompositionError("KVCache: read before the first append")
        keys, values = self._held
        return keys[:, : self._length], values[:, : self._length]

    def answered(self, queries: int) -> None:
        """Count queries answered from a sealed context: the next one has the next position.

        >>> cache = KVCache()
        >>> _ = cache.seal(torch.zeros(1, 6, 2, 8), torch.zeros(1, 6, 2, 8))
        >>> cache.answered(2)
        >>> cache.queries
        2
        """
        check_int("KVCache.answered: queries", queries, 0)
        if self._answered is None:
            raise CompositionError(
                f"{self} holds no context; where every call appends, queries count with the tokens"
            )
        self._answered += queries

    def truncate(self, length: int) -> None:
        """Drop the tokens from `length` on: the way back from a rejected draft.

        >>> cache = KVCache()
        >>> _ = cache.append(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8))
        >>> cache.truncate(1)
        >>> cache
        KVCache(length=1, capacity=16)
        """
        check_int("KVCache.truncate: length", length, 0)
        if self.sealed:
            raise CompositionError(f"{self} holds a context, which is whole; reset() empties it")
        if length > self._length:
            raise CompositionError(f"{self} cannot be truncated to {shown(length)} tokens")
        self._length = length

    def __repr__(self) -> str:
        sealed = ", sealed" if self.sealed else ""
        return f"KVCache(length={self._length}, capacity={self._limit or self.capacity}{sealed})"

    def _check(self, name: str, new: Tensor, held: Tensor | None) -> None:
        check_tensor(f"KVCache: {name}", new)
        if new.ndim != 4:
            raise CompositionError(f"KVCache: {name} {list(new.shape)}; give it as [b, s, n, d]")
        if not new.is_floating_point():
            raise CompositionTypeError(
                f"KVCache: {name} is {new.dtype}; keys and values are floating-point numbers"
            )
        if new.requires_grad and torch.is_grad_enabled():
            raise CompositionError(
                f"KVCache: {name} needs a gradient, which a cache would cut off silently; decode "
                "under torch.no_grad() or torch.inference_mode()"
            )
        if held is None:
            return
        for what, was, now in (
            ("batch", held.shape[0], new.shape[0]),
            ("heads", held.shape[2], new.shape[2]),
            ("head dim", held.shape[3], new.shape[3]),
            ("dtype", held.dtype, new.dtype),
            ("device", held.device, new.device),
        ):
            if was != now:
                raise CompositionError(
                    f"KVCache: it holds {name}s of {what} {was}, the new {name} has {now}; a cache "
                    "serves one layer and one batch (reset() makes it ready for another)"
                )

    def _write(self, held: Tensor | None, new: Tensor, stop: int) -> Tensor:
        if held is None or stop > held.shape[1]:
            held = self._enlarge(held, new, stop)
        held[:, stop - new.shape[1] : stop] = new.detach()
        return held

    def _enlarge(self, held: Tensor | None, new: Tensor, stop: int) -> Tensor:
        grown = _FIRST_CAPACITY if held is None else 2 * held.shape[1]
        room = self._limit or max(stop, grown)
        # A tensor made in inference mode could not be written outside of it later.
        shape = (new.shape[0], room, *new.shape[2:])
        try:
            with torch.inference_mode(False):
                larger = new.new_empty(shape)
        except RuntimeError as error:
            if self._limit is None:
                raise  # the memory is full, and no number of ours is the reason
            size = math.prod(shape) * new.element_size()
            raise CompositionError(
                f"KVCache: its capacity of {self._limit} tokens takes {size:.3g} bytes for keys "
                f"{list(shape)} of {new.dtype}, which {new.device} does not give; ask for fewer, "
                "or capacity=None to grow"
            ) from error
        if held is not None:
            larger[:, : self._length] = held[:, : self._length]
        return larger
