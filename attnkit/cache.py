"""`KVCache`: the keys and values of the tokens so far, for decoding step by step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnkit.arguments import check_bool, check_int, check_ints
from attnkit.display import Text
from attnkit.errors import CompositionError, shown
from attnkit.memory import Memory, check_pair, room_for, with_room
from attnkit.texts import HeldText, Runs, alike, paired

__all__ = ["KVCache"]


class KVCache:
    """Keys and values ``b s n d`` of one attention layer, kept between calls of its forward.

    With a `capacity` all memory is taken at the first call and one token too many is an error;
    without, it grows by doubling, so that each token costs amortised constant time. Batch,
    heads, dtype and device are those of the first call. One cache serves one layer and one
    batch of texts; `reset` makes it ready for the next.

    `rolling`: when memory is full, the layer forgets the tokens that its mask can never show
    again. The memory of a window is then bounded by twice the window, its sinks and the largest
    step, however long the text grows; with a mask that shows everything nothing is forgotten.

    Texts may be of unlike `lengths`: prompts come packed, ``t n d``, and each has its own place
    for what comes next. `reorder` and `expand` serve beams and several continuations.

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

    def __init__(self, capacity: int | None = None, *, rolling: bool = False) -> None:
        if capacity is not None:
            check_int("KVCache: capacity", capacity, 1)
        self._limit = capacity
        self._rolling = check_bool("KVCache: rolling", rolling, "True forgets what no mask shows")
        self.reset()

    def reset(self) -> None:
        """Forget every token, and the memory with it.

        >>> cache = KVCache()
        >>> _ = cache.append(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8))
        >>> cache.reset()
        >>> cache
        KVCache(length=0, capacity=0)
        """
        self._memory: Memory | None = None
        self._texts: tuple[HeldText, ...] = (HeldText(),)
        self._answered: int | None = None  # the queries, once it holds a context

    @property
    def length(self) -> int:
        """The number of tokens so far, of the longest text; a rolling cache has forgotten some.

        >>> cache = KVCache()
        >>> _ = cache.append(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8))
        >>> cache.length
        3
        """
        return max(text.length for text in self._texts)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens so far of each text; empty before the first call.

        >>> cache, token = KVCache(), torch.zeros(5, 2, 8)
        >>> _ = cache.append(token, token, [2, 3])
        >>> cache.lengths
        (2, 3)
        """
        lengths = tuple(text.length for text in self._texts)
        return lengths * self.batch if len(lengths) == 1 else lengths

    @property
    def texts(self) -> tuple[HeldText, ...]:
        """Which tokens of each text it holds; one entry where all are alike.

        >>> cache = KVCache()
        >>> _ = cache.append(torch.zeros(9, 3, 2, 8), torch.zeros(9, 3, 2, 8))
        >>> cache.texts
        (HeldText(length=3, runs=((0, 3),), since=0),)
        """
        return self._texts

    @property
    def batch(self) -> int:
        """The number of texts; 0 before the first call.

        >>> KVCache().batch
        0
        """
        return 0 if self._memory is None else self._memory.batch

    @property
    def queries(self) -> int:
        """The number of query tokens answered with it so far.

        >>> cache = KVCache()
        >>> _ = cache.append(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8))
        >>> cache.queries
        3
        """
        return self.length if self._answered is None else self._answered

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
        return 0 if self._memory is None else self._memory.room

    @property
    def nbytes(self) -> int:
        """The bytes that keys and values take.

        >>> cache = KVCache()
        >>> _ = cache.append(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8))
        >>> cache.nbytes == 2 * 16 * 2 * 8 * 4  # float32
        True
        """
        return 0 if self._memory is None else sum(tensor.nbytes for tensor in self._memory.pair)

    def append(
        self, key: Tensor, value: Tensor, counts: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add the tokens ``b s n d``; return all keys and values it holds, as views.

        With `counts` tokens are packed ``t n d``: so many of each text, one text after the other.
        Where texts are of unlike lengths, what lies behind the shorter ones has no meaning.

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
        new = None if counts is None else check_ints("KVCache: counts", counts, 0)
        check_pair(key, value, self._memory, new)
        new = (key.shape[1],) if new is None else new
        firsts, texts = [text.held for text in self._texts], self.grown(new)
        stop = max(text.held for text in texts)
        if self._limit is not None and stop > self._limit:
            raise CompositionError(
                f"KVCache: {max(firsts)} tokens and {stop - max(firsts)} more exceed its capacity "
                f"of {self._limit}; give it more, or capacity=None to grow"
            )
        batch = len(new) if key.ndim == 3 else key.shape[0]
        self._memory = self._room_for((key, value), batch, new, stop)
        self._memory.write((key, value), firsts, new)
        self._texts = texts
        return self.read()

    def grown(self, counts: Sequence[int]) -> tuple[HeldText, ...]:
        """Return what the texts would be with `counts` tokens more: of each, or one for all.

        >>> KVCache().grown([2, 3])[1]
        HeldText(length=3, runs=((0, 3),), since=0)
        """
        return alike(text.grown(count) for text, count in paired(self._texts, counts))

    def is_full(self, counts: Sequence[int]) -> bool:
        """Whether a rolling cache must forget before it takes `counts` tokens more.

        >>> cache = KVCache(rolling=True)
        >>> _ = cache.append(torch.zeros(1, 16, 2, 8), torch.zeros(1, 16, 2, 8))
        >>> cache.is_full([0]), cache.is_full([1])
        (False, True)
        """
        most = max(text.held for text in self.grown(counts))
        return self._rolling and self.length > 0 and most > self.capacity

    def keep(self, runs: Sequence[Runs]) -> None:
        """Forget all tokens but those at some positions of each text, or at the same of all.

        The memory of a cache without a capacity shrinks to twice of what it holds.

        >>> cache = KVCache()
        >>> _ = cache.append(torch.zeros(1, 40, 2, 8), torch.zeros(1, 40, 2, 8))
        >>> cache.keep([((0, 2), (30, 40))])
        >>> cache
        KVCache(length=40, held=12, capacity=24)
        """
        if len(runs) not in (1, len(self._texts)):
            raise CompositionError(
                f"{self}.keep got positions of {len(runs)} texts; give those of each text, or one "
                "entry for all"
            )
        both = paired(self._texts, runs)
        kept = [text.keeping(some) for text, some in both]
        spans = [text.spans(some) for text, some in both]
        room = self._limit or room_for(max(text.held for text in kept))
        self._rows.keep(spans, room)
        self._texts = alike(kept)

    def seal(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of a whole context, once.

        >>> cache = KVCache()
        >>> _ = cache.seal(torch.zeros(1, 6, 2, 8), torch.zeros(1, 6, 2, 8))
        >>> cache
        KVCache(length=6, capacity=16, sealed)
        """
        if self.length or self.sealed:
            raise CompositionError(
                f"{self} is in use already; a context goes into an empty cache (reset() empties it)"
            )
        views = self.append(key, value)
        self._answered = 0
        return views

    def read(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values it holds, as views.

        >>> cache = KVCache()
        >>> _ = cache.append(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8))
        >>> cache.read()[0].shape
        torch.Size([1, 3, 2, 8])
        """
        return self._rows.read(self._used)

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

    def truncate(self, length: int | Sequence[int]) -> None:
        """Drop the tokens from `length` on: the way back from a rejected draft.

        One length for all texts, or one for each. What was forgotten does not come back: a rolling
        cache can always be truncated to where its last call began.

        >>> cache = KVCache()
        >>> _ = cache.append(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8))
        >>> cache.truncate(1)
        >>> cache
        KVCache(length=1, capacity=16)
        """
        if isinstance(length, list | tuple):
            lengths = check_ints("KVCache.truncate: length", length, 0)
        else:
            lengths = (check_int("KVCache.truncate: length", length, 0),)
        if self.sealed:
            raise CompositionError(f"{self} holds a context, which is whole; reset() empties it")
        if len(lengths) not in (1, self.batch):
            raise CompositionError(
                f"{self}.truncate got {len(lengths)} lengths; give one for all texts, or one for "
                f"each of the {self.batch}"
            )
        both = paired(self._texts, lengths)
        for text, shorter in both:
            if shorter > text.length:
                raise CompositionError(f"{self} cannot be truncated to {shown(shorter)} tokens")
            if shorter < text.since:
                raise CompositionError(
                    f"{self} cannot be truncated to {shorter} tokens: keys that token {shorter} "
                    f"may see were forgotten at {text.since}; add a draft in one call, or use a "
                    "cache that is not rolling"
                )
        self._texts = alike(text.shortened(shorter) for text, shorter in both)

    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """Make text k what text ``indices[k]`` was: for beams, or to drop texts and add copies.

        The memory stays in its place where the number of texts does. The indices may lie on the
        device; then only texts of unlike lengths make the host wait, and a wrong index is torch's
        error.

        >>> cache, token = KVCache(), torch.arange(2.0).view(2, 1, 1, 1)
        >>> keys, _ = cache.append(token, token)
        >>> cache.reorder([1, 1, 0])
        >>> cache.read()[0].flatten()
        tensor([1., 1., 0.])
        """
        rows = self._rows
        if not isinstance(indices, Tensor) or indices.device.type == "cpu":
            chosen = check_ints("KVCache.reorder: indices", indices, 0)
            if max(chosen) >= rows.batch:
                raise CompositionError(
                    f"KVCache.reorder: index {max(chosen)}, but there are {rows.batch} texts, "
                    "counted from 0"
                )
            indices = torch.tensor(chosen)
        rows.pick(
            indices.to(rows.pair[0].device, non_blocking=True),
            self._used,
        )
        if len(self._texts) > 1:
            self._texts = alike(self._texts[k] for k in indices.tolist())

    def expand(self, copies: int) -> None:
        """Make each text `copies` texts, one after the other: several continuations of a prompt.

        >>> cache = KVCache()
        >>> _ = cache.append(torch.zeros(2, 3, 2, 8), torch.zeros(2, 3, 2, 8))
        >>> cache.expand(4)
        >>> cache.batch
        8
        """
        check_int("KVCache.expand: copies", copies, 1)
        self.reorder(torch.arange(self._rows.batch).repeat_interleave(copies))

    def explain(self) -> Text:
        """Return what it holds, and what the next step reads of it.

        >>> cache = KVCache(capacity=1024)
        >>> _ = cache.append(torch.zeros(1, 256, 2, 64), torch.zeros(1, 256, 2, 64))
        >>> print(cache.explain())
        KVCache(length=256, capacity=1024)
        holds 256 of 256 tokens, has room for 1024: 1,048,576 bytes
        a step reads 262,144 bytes of keys and values, or those that its mask shows of them
        """
        read = 0 if self._memory is None else sum(tensor.nbytes for tensor in self.read())
        return Text(
            f"{self}\n"
            f"holds {self._used} of {self.length} tokens, has room for {self.capacity}: "
            f"{self.nbytes:,} bytes\n"
            f"a step reads {read:,} bytes of keys and values, or those that its mask shows of them"
        )

    def __repr__(self) -> str:
        unlike, less = len(self._texts) > 1, any(text.forgotten for text in self._texts)
        told = [
            f"lengths={shown(self.lengths)}" if unlike else f"length={self.length}",
            *([f"held={self._used}"] if less else []),
            f"capacity={self._limit or self.capacity}",
            *(["rolling=True"] if self._rolling else []),
            *(["sealed"] if self.sealed else []),
        ]
        return f"KVCache({', '.join(told)})"

    def _room_for(
        self, new: tuple[Tensor, Tensor], batch: int, counts: Sequence[int], stop: int
    ) -> Memory:
        """Return a memory that has room for `counts` tokens more, which makes `stop` at most."""
        return with_room(self._memory, new, batch, stop, self._limit)

    @property
    def _used(self) -> int:
        return max(text.held for text in self._texts)

    @property
    def _rows(self) -> Memory:
        if self._memory is None:
            raise CompositionError("KVCache: read before the first append")
        return self._memory
