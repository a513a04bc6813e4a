"""`ShardedCache`: the keys of a text spread over processes, for decoding in which all take part.

Each process holds the keys of some tokens. A step gives all of them the same new tokens; each
answers with its own keys, and what they answer is merged by the statistics of rows: instead of
keys, ``d_v + 1`` numbers per row and head go from rank to rank.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from attnkit.arguments import check_int
from attnkit.attention import Attention
from attnkit.backends import BACKENDS, AttentionOutput, Operands, make_plan
from attnkit.backends.base import Partial, stats_dtype
from attnkit.backends.partials import merge
from attnkit.decoding import known_length
from attnkit.eager import between_graphs
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.masks import Mask
from attnkit.memory import Memory, Pair, check_pair, with_room
from attnkit.parallel.guard import Statement
from attnkit.parallel.messages import taken
from attnkit.parallel.shards import Shards, as_shards
from attnkit.planner import read_request
from attnkit.planner.request import Share
from attnkit.pse import Pse
from attnkit.ranges import Ranges, in_order, places, shared, total
from attnkit.seen import NewRows, Seen, bias_seen
from attnkit.texts import HeldText

__all__ = ["ShardedCache", "sharded_step"]

Three = tuple[Tensor, Tensor, Tensor]

_STEP = "a step over several processes"


class ShardedCache:
    """Keys and values ``b s n d`` of one layer, those of each token with one process of a group.

    `shards` are those of the prompt. The first call of a layer gives it the prompt, each process
    its own tokens, and runs as with ``shards=``; each process keeps the keys that it has. Every
    later call gives all processes the same next tokens, and all of them get the same answer, to
    the bit. The keys of these are dealt in turn, `block` tokens to a rank. Shards of no tokens
    (``tokens=0``) begin without a prompt.

    A step receives from each other rank that has keys its partial answer and log-sum-exp,
    ``b n s (d_v + 1)`` numbers in the dtype of the statistics, however long the text is.

    Which tokens come next is for all processes to know: draw them on one and send them to the
    others, or seed all alike. All texts of a batch have one length; self-attention; not
    differentiable. Raises `CompositionError` as `KVCache` does, and where processes are not in
    the same step.

    >>> import torch
    >>> from attnkit import MultiHeadAttention, masks
    >>> from attnkit.parallel import ContextParallel
    >>> from attnkit.parallel.wires import Alone  # as a group of one process
    >>> layer = MultiHeadAttention(32, 4, rotary=True, mask=masks.Causal())
    >>> x, prompt = torch.randn(2, 6, 32), ContextParallel(Alone()).shards(tokens=4)
    >>> cache = ShardedCache(prompt)
    >>> with torch.no_grad():
    ...     first = layer(prompt.take(x[:, :4]), cache=cache)
    ...     steps = [layer(token, cache=cache) for token in x[:, 4:].split(1, dim=1)]
    ...     whole = layer(x)
    >>> torch.allclose(torch.cat(steps, dim=1), whole[:, 4:], atol=1e-5)
    True
    >>> cache
    ShardedCache(length=6, held=6, rank 0 of 1)
    """

    sealed = False

    def __init__(self, shards: Shards, *, block: int = 256) -> None:
        found = as_shards(shards)
        if found is None:
            raise CompositionTypeError(
                "ShardedCache got no shards; give those of the prompt, "
                "ContextParallel(mesh['cp']).shards(mask, tokens=...)"
            )
        if found.seqlens is not None or found.of_keys is not found.sharding:
            raise CompositionError(
                f"ShardedCache got {found} of a packed batch or of two texts; it holds one text, "
                "or several of one length"
            )
        self.shards = found
        self.block = check_int("ShardedCache: block", block, 1)
        self.reset()

    def reset(self) -> None:
        """Forget every token, and the memory with it.

        >>> from attnkit.parallel import ContextParallel
        >>> from attnkit.parallel.wires import Alone
        >>> ShardedCache(ContextParallel(Alone()).shards(tokens=4)).reset()
        """
        self._memory: Memory | None = None
        self._said: tuple[Hashable, Statement] | None = None
        self._length = 0

    @property
    def length(self) -> int:
        """The number of tokens so far, of all ranks together."""
        return self._length

    @property
    def awaits_prompt(self) -> bool:
        """Whether the next call gives the prompt, each process its own tokens of it."""
        return not self._length and self.shards.sharding.length > 0

    @property
    def nbytes(self) -> int:
        """The bytes that keys and values take in this process."""
        return 0 if self._memory is None else sum(one.nbytes for one in self._memory.pair)

    def held(self, rank: int, length: int | None = None) -> Ranges:
        """Return which of the first tokens, all by default, a rank holds the keys of, in order.

        >>> from attnkit.parallel import ContextParallel
        >>> from attnkit.parallel.wires import Alone
        >>> cache = ShardedCache(ContextParallel(Alone()).shards(tokens=4))
        >>> cache.held(0), cache.held(0, 6)
        ((), (range(0, 6),))
        """
        length = self._length if length is None else length
        sharding, start = self.shards.sharding, self.shards.sharding.length
        if not length:
            return ()
        firsts = range(start + rank * self.block, length, self.block * sharding.size)
        later = (range(first, min(first + self.block, length)) for first in firsts)
        return in_order((*sharding.ranks[rank], *later))

    def of_call(self, shards: Shards | None) -> Shards | None:
        """Return the shards of a layer's next call: those of the prompt, or none in a step.

        >>> from attnkit.parallel import ContextParallel
        >>> from attnkit.parallel.wires import Alone
        >>> prompt = ContextParallel(Alone()).shards(tokens=4)
        >>> ShardedCache(prompt).of_call(None) is prompt
        True
        """
        if shards not in (None, self.shards) or (shards is not None and not self.awaits_prompt):
            what = "its prompt has others" if self.awaits_prompt else "it has its prompt already"
            raise CompositionError(
                f"{self} with shards={shards}: {what}; a step gives all processes the same tokens, "
                "and no shards="
            )
        return self.shards if self.awaits_prompt else None

    def append(self, key: Tensor, value: Tensor) -> Pair:
        """Add tokens ``b s n d``; return this rank's keys and values, as views.

        Of a prompt, tensors have this rank's tokens; later all ranks give the same, and each
        keeps its own.
        """
        check_pair(key, value, self._memory, None)
        rank, start, sizes = self.shards.rank, self._length, self.shards.sizes
        if self.awaits_prompt:
            if key.shape[1] != sizes[rank]:
                raise CompositionError(
                    f"{self} awaits the prompt, of which rank {rank} has {sizes[rank]} tokens, "
                    f"and got {key.shape[1]}; cut it first: shards.take(tokens)"
                )
            stop, own = self.shards.sharding.length, (key, value)
        else:
            stop = start + key.shape[1]
            new = (range(start, stop),)
            mine = places(shared(self.held(rank, stop), new), new)
            own = taken(key, mine, 1), taken(value, mine, 1)
        first, last = (total(self.held(rank, length)) for length in (start, stop))
        self._memory = with_room(self._memory, (key, value), len(key), last, None)
        self._memory.write(own, [first], [last - first])
        self._length = stop
        return self._memory.read(last)

    def truncate(self, length: int) -> None:
        """Drop the tokens from `length` on, on every rank: the way back from a rejected draft.

        >>> from attnkit.parallel import ContextParallel
        >>> from attnkit.parallel.wires import Alone
        >>> cache = ShardedCache(ContextParallel(Alone()).shards(tokens=0))
        >>> _ = cache.append(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8))
        >>> cache.truncate(1)
        >>> cache
        ShardedCache(length=1, held=1, rank 0 of 1)
        """
        check_int("ShardedCache.truncate: length", length, 0, self._length)
        prompt = self.shards.sharding.length
        if 0 < length < prompt:
            raise CompositionError(
                f"{self} cannot be truncated to {length} tokens, inside of its prompt of {prompt}; "
                "truncated to 0 it awaits the prompt again"
            )
        self._length = length

    def statement(self, mask: Mask, pse: Pse | None, like: Tensor) -> Statement:
        """Return what ranks must agree on before a step, but for numbers that are new in each.

        >>> from attnkit import masks
        >>> from attnkit.parallel import ContextParallel
        >>> from attnkit.parallel.wires import Alone
        >>> cache = ShardedCache(ContextParallel(Alone()).shards(tokens=4))
        >>> cache.statement(masks.Causal(), None, torch.zeros(1, 1, 4, 8)).words[1]
        ('mask', 'Causal()')
        """
        known = mask, None if pse is None else pse.key(), like.shape[::2], like.shape[3], like.dtype
        if self._said is None or self._said[0] != known:
            words = [
                ("mask", str(mask)),
                ("bias", repr(pse)),
                ("batch of", str(len(like))),
                ("heads", f"{like.shape[2]} of {like.shape[3]}"),
                ("dtype", str(like.dtype).removeprefix("torch.")),
                ("blocks of", str(self.block)),
            ]
            told = self.shards.sharding.ranks, known[1]
            self._said = known, Statement.of("a step with a ShardedCache", told, words)
        return self._said[1]

    def __repr__(self) -> str:
        rank, size = self.shards.rank, self.shards.wires.size
        held = total(self.held(rank))
        return f"ShardedCache(length={self.length}, held={held}, rank {rank} of {size})"

    def __reduce__(self) -> NoReturn:
        raise CompositionTypeError(
            f"{self!r} is bound to the processes of a group and stays with them; each keeps its "
            "own part"
        )


@between_graphs("a step with a ShardedCache runs between compiled graphs")
def sharded_step(
    core: Attention, cache: ShardedCache, composed: tuple[Mask, Pse | None], heads: Three
) -> AttentionOutput:
    """Add tokens ``b s n d``, the same on all ranks, and attend to all of them so far.

    The output is ``b s n d``, the same on all ranks to the bit. Nothing is recorded.
    """
    with cache.shards.wires.telling():
        if cache.awaits_prompt:
            raise CompositionError(
                f"{cache} awaits its prompt; the first call gives it, each process its own tokens"
            )
        start = cache.length
        _check(core, heads[0], composed[1])
        known = known_length(*composed, start, start + heads[0].shape[1])
        try:
            with torch.no_grad():
                return _step(core, cache, composed, heads, known)
        except BaseException:
            cache.truncate(start)  # a step that failed has not happened
            raise


def _check(core: Attention, query: Tensor, pse: Pse | None) -> None:
    """Raise for a step of training."""
    carried = (query, core.sink, *(() if pse is None else pse.tensors))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in carried):
        raise CompositionError(
            "a step with a ShardedCache records no gradient, and something here asks for one; "
            "decode under torch.no_grad() or torch.inference_mode()"
        )
    if core.training and core.composition.dropout:
        raise CompositionError(
            f"dropout={core.composition.dropout} in a step with a ShardedCache; call eval() first"
        )


def _step(
    core: Attention,
    cache: ShardedCache,
    composed: tuple[Mask, Pse | None],
    heads: Three,
    known: int | None,
) -> AttentionOutput:
    query, key, value = heads
    keys, values = cache.append(key, value)
    statement = cache.statement(*composed, query)
    cache.shards.wires.begin(statement, [("tokens so far", cache.length)])
    own = None
    if keys.shape[1]:
        answer = _own(core, cache, composed, (query, keys, values), known)
        own = torch.cat([answer.output, answer.lse.transpose(1, 2)[..., None]], -1)
    shape = (*query.shape[:3], value.shape[3] + 1)
    output, stats = merge(_exchanged(cache, own, query, shape), sink=core.sink)
    return AttentionOutput(output.to(query.dtype), stats)


def _own(
    core: Attention,
    cache: ShardedCache,
    composed: tuple[Mask, Pse | None],
    tensors: Three,
    known: int | None,
) -> Partial:
    """Return what the new rows answer over this rank's keys."""
    (mask, pse), query = composed, tensors[0]
    held = cache.held(cache.shards.rank)
    text = HeldText(cache.length, tuple((one.start, one.stop) for one in held))
    rows = NewRows(text, query.shape[1])
    bias = None if pse is None else bias_seen(pse, (rows,), known, query)
    mask = Seen(mask, (rows,), known)
    asked = replace(core.composition, mask=mask, pse=bias, layout="BSND", dropout=0.0)
    request = read_request(asked, *tensors, head_dim=core.head_dim)
    share = Share(text.length, text.length, (range(*rows.rows),), held, request.num_heads)
    plan = make_plan(replace(request, share=share), core.backend)
    core._plans.keep(_STEP, plan, core._plans.get(_STEP))  # the latest, for reports
    core._plans.count(plan)
    return BACKENDS[plan.backend].partial(plan, Operands(*tensors, bias), None)


def _exchanged(
    cache: ShardedCache, own: Tensor | None, like: Tensor, shape: Sequence[int]
) -> list[Pair]:
    """Return the answers and statistics of all ranks that have keys, in the order of ranks."""
    wires, wide = cache.shards.wires, stats_dtype(like.dtype)
    others = [rank for rank in range(wires.size) if rank != wires.rank]
    found = {rank: like.new_empty(shape, dtype=wide) for rank in others if cache.held(rank)}
    sends = [] if own is None else [(rank, own) for rank in others]
    wires.post(sends, list(found.items()), "partial answers of a step").wait()
    if own is not None:
        found[wires.rank] = own
    return [(t[..., :-1], t[..., -1].transpose(1, 2)) for _, t in sorted(found.items())]
