"""`StaticCache`: decoding in which every step is the same call, with lengths as data.

Keys and values are the whole memory in each step, and which of them exist and are seen is a tensor
of cells that is made on the device from the positions of the new tokens. So no number of the host
changes from step to step: one plan, one call with the same arguments, one captured graph.

The cells follow from the mask as a set. Each row of a score matrix is a few runs of keys, so a
table of their ends, ``[1 | b, 1 | n, rows, runs, 2]``, holds it for every position there is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnkit.arguments import check_int, check_ints
from attnkit.attention import Attention
from attnkit.backends import AttentionOutput, Operands
from attnkit.constants import constant
from attnkit.decoding import text_length
from attnkit.display import Text
from attnkit.eager import untraced
from attnkit.errors import CompositionError, shown
from attnkit.geometry import Region, Slice
from attnkit.masks import Mask
from attnkit.masks.given import GivenCells
from attnkit.memory import check_pair
from attnkit.planner import Plan
from attnkit.pse import Dense, Pse

__all__ = ["StaticCache", "row_ends", "static_plan", "static_step"]

_MOST_RUNS = 64


class StaticCache:
    """Keys and values ``b n capacity d`` of one layer, for steps that are all the same call.

    For fused kernels and captured graphs: lengths are a tensor on the device, steps make no other
    shapes and read nothing back. Each step costs what its whole capacity costs, so choose it as
    the text needs it. `KVCache` is the cache of everything else.

    Texts of unlike lengths: give prompts padded on the right, then ``truncate(lengths)``. One
    text too long is not noticed on the device: its last tokens overwrite each other.

    Not differentiable. Raises `CompositionError` for tensors unlike those it holds, for masks that
    are not a few runs of keys in each row, and biases that are not of distances.

    >>> import torch
    >>> from attnkit import MultiHeadAttention, masks
    >>> layer = MultiHeadAttention(32, 4, rotary=True, mask=masks.Causal())
    >>> x, cache = torch.randn(2, 6, 32), StaticCache(capacity=8)
    >>> with torch.no_grad():
    ...     steps = [layer(token, cache=cache) for token in x.split(1, dim=1)]
    ...     whole = layer(x)
    >>> torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-5)
    True
    >>> cache
    StaticCache(capacity=8, lengths=(6, 6))
    """

    sealed = False

    def __init__(self, capacity: int) -> None:
        self.capacity = check_int("StaticCache: capacity", capacity, 1)
        self.reset()

    def reset(self) -> None:
        """Forget every token, and the memory with it.

        >>> cache = StaticCache(8)
        >>> cache.reset()
        >>> cache.nbytes
        0
        """
        self.pair: tuple[Tensor, Tensor] | None = None
        self.ends: Tensor | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each text; to read them waits for the device.

        >>> StaticCache(8).lengths
        ()
        """
        return () if self.ends is None else tuple(self.ends.tolist())

    @property
    def length(self) -> int:
        """The number of tokens of the longest text; to read it waits for the device.

        >>> StaticCache(8).length
        0
        """
        return max(self.lengths, default=0)

    @property
    def nbytes(self) -> int:
        """The bytes that keys and values take.

        >>> StaticCache(8).nbytes
        0
        """
        return 0 if self.pair is None else sum(tensor.nbytes for tensor in self.pair)

    def positions(self, x: Tensor) -> Tensor:
        """Return the positions ``[b s]`` that the tokens ``b s ...`` will have.

        >>> StaticCache(8).positions(torch.zeros(1, 3, 16))
        tensor([[0, 1, 2]])
        """
        new = torch.arange(x.shape[1], device=x.device)
        if self.ends is None:
            return new.repeat(x.shape[0], 1)
        return self.ends[:, None] + new

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the tokens ``b s n d`` behind each text; return all memory, ``b n capacity d``.

        >>> token = torch.ones(1, 1, 2, 8)
        >>> StaticCache(4).append(token, token)[0].sum(-1)
        tensor([[[8., 0., 0., 0.],
                 [8., 0., 0., 0.]]])
        """
        check_pair(key, value, None, None)
        if key.shape[1] > self.capacity:
            raise CompositionError(
                f"{self}: {key.shape[1]} tokens exceed its capacity; give it more"
            )
        with torch.inference_mode(False):  # or it could not be written outside of it later
            if self.pair is None or self.ends is None:
                self.pair = _memory(key, self.capacity), _memory(value, self.capacity)
                self.ends = torch.zeros(len(key), dtype=torch.long, device=key.device)
        for tensor, new in zip(self.pair, (key, value), strict=True):
            self._check_like(tensor, new)
            self._write(tensor, new.detach())
        self.ends += key.shape[1]
        return self.pair

    def truncate(self, length: int | Sequence[int] | Tensor) -> None:
        """Drop the tokens from `length` on: of all texts, or of each its own (as a tensor, too).

        A length that a text has not reached leaves it as it is.

        >>> cache, tokens = StaticCache(8), torch.zeros(2, 3, 1, 8)
        >>> _ = cache.append(tokens, tokens)
        >>> cache.truncate([2, 3])
        >>> cache.lengths
        (2, 3)
        """
        if self.ends is None:
            return
        if not isinstance(length, Tensor):
            several = isinstance(length, list | tuple)
            lengths = check_ints("StaticCache.truncate", length if several else [length], 0)
            length = torch.tensor(lengths).to(self.ends.device, non_blocking=True)
        if length.numel() not in (1, len(self.ends)):
            raise CompositionError(
                f"{self}.truncate got {length.numel()} lengths; give one for all texts, or one for "
                f"each of the {len(self.ends)}"
            )
        torch.minimum(self.ends, length.to(self.ends), out=self.ends)

    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """Make text k what text ``indices[k]`` was, in place: as many as there are.

        >>> cache, token = StaticCache(1), torch.arange(2.0).view(2, 1, 1, 1)
        >>> _ = cache.append(token, token)
        >>> cache.reorder([1, 1])
        >>> cache.pair[0].flatten()
        tensor([1., 1.])
        """
        if self.pair is None or self.ends is None:
            raise CompositionError(f"{self}: reorder before the first append")
        if not isinstance(indices, Tensor):
            indices = torch.tensor(check_ints("StaticCache.reorder: indices", indices, 0))
        if indices.shape != self.ends.shape:
            raise CompositionError(
                f"{self}.reorder got {shown(list(indices.shape))} indices for {len(self.ends)} "
                "texts; their number stays (KVCache.reorder takes fewer and more)"
            )
        index = indices.to(self.ends.device, non_blocking=True)
        for tensor in (*self.pair, self.ends):
            tensor.copy_(tensor.index_select(0, index))

    def explain(self) -> Text:
        """Return what it holds, and what each step reads.

        >>> cache, token = StaticCache(1024), torch.zeros(1, 1, 2, 64)
        >>> _ = cache.append(token, token)
        >>> print(cache.explain())
        StaticCache(capacity=1024, lengths=(1,))
        each step reads all 1,048,576 bytes of keys and values: 1024 tokens of 1 at most so far
        """
        return Text(
            f"{self}\neach step reads all {self.nbytes:,} bytes of keys and values: "
            f"{self.capacity} tokens of {self.length} at most so far"
        )

    def __repr__(self) -> str:
        return f"StaticCache(capacity={self.capacity}, lengths={shown(self.lengths)})"

    def _check_like(self, held: Tensor, new: Tensor) -> None:
        was, now = (held.shape[0], held.shape[1], held.shape[3]), (*new.shape[::2], new.shape[3])
        kind = (held.dtype, held.device)
        if was != now or kind != (new.dtype, new.device):
            raise CompositionError(
                f"{self} holds {kind[0]} of {kind[1]} for {was[0]} texts, {was[1]} heads of "
                f"{was[2]}; the new ones are {new.dtype} {list(new.shape)} on {new.device}"
            )

    def _write(self, tensor: Tensor, new: Tensor) -> None:
        batch, heads, room, dim = tensor.shape
        rows = torch.arange(batch * heads, device=new.device).view(batch, heads, 1) * room
        places = (rows + self.positions(new).clamp(max=room - 1)[:, None]).flatten()
        tensor.view(-1, dim).index_copy_(0, places, new.transpose(1, 2).reshape(-1, dim))


@constant
def row_ends(mask: Mask, length: int, device: torch.device) -> Tensor:
    """Return the runs of keys of every row of a text: ``[1 | b, 1 | n, length, runs, 2]``.

    Runs that a row does not have are empty. Raises `CompositionError` for what is no union of
    slices, for too many runs, and for masks that move as the text grows.

    >>> from attnkit import masks
    >>> row_ends(masks.SlidingWindow(2), 3, torch.device("cpu"))[0, 0, :, 0].tolist()
    [[0, 1], [0, 2], [1, 3]]
    """
    mask.check(length, length)
    _check_still(mask, length)
    planes = [mask.region(length, length, b, h) for b, h in mask._places]
    past = Region.of(Slice(0, length, 0, length, hi=0))
    if not all(plane <= past for plane in planes):
        raise CompositionError(
            f"{mask!r} lets tokens see keys that come later, which no step can; intersect it with "
            "masks.Causal(), or use a KVCache for prompts whose tokens see each other"
        )
    most = max((len(strip.runs) for plane in planes for strip in plane.strips), default=0)
    if most > _MOST_RUNS:
        raise CompositionError(
            f"{mask!r} shows rows up to {most} runs of keys; a StaticCache keeps {_MOST_RUNS} of "
            "each row: use a KVCache"
        )
    table = torch.zeros(len(planes), length, max(1, most), 2, dtype=torch.int32)
    for plane, region in enumerate(planes):
        for i0, i1, runs in region.strips:
            step = torch.arange(i1 - i0)
            for k, (a, da, b, db) in enumerate(runs):
                table[plane, i0:i1, k, 0] = a + da * step
                table[plane, i0:i1, k, 1] = b + db * step
    return table.view(mask.batches or 1, mask.heads or 1, *table.shape[1:]).to(device)


def _diagonals(bias: Pse, length: int, wide: torch.dtype, device: torch.device) -> Tensor:
    return bias.diagonals(length, length, dtype=wide, device=device)


_kept_diagonals = constant(_diagonals)


def cells_at(ends: Tensor, positions: Tensor, capacity: int) -> Tensor:
    """Return which keys the rows at some positions ``[b s]`` see: ``[b, 1 | n, s, capacity]``.

    Keys behind the last new token do not exist yet, whatever the mask says.

    >>> from attnkit import masks
    >>> table = row_ends(masks.SlidingWindow(2), 4, torch.device("cpu"))
    >>> cells_at(table, torch.tensor([[2]]), 4).int()
    tensor([[[[0, 1, 1, 0]]]], dtype=torch.int32)
    """
    texts = torch.arange(len(positions), device=positions.device)[:, None]
    found = ends[texts if len(ends) > 1 else texts * 0, :, positions.clamp(max=ends.shape[2] - 1)]
    runs = found.transpose(1, 2)[..., None, :, :]  # b n s 1 runs 2
    keys = torch.arange(capacity, device=positions.device)[:, None]
    seen = ((keys >= runs[..., 0]) & (keys < runs[..., 1])).any(-1)
    return seen & (keys[:, 0] <= positions[:, None, -1:, None])


def static_plan(
    core: Attention, query: Tensor, pair: tuple[Tensor, Tensor], cells: Tensor, bias: Pse | None
) -> Plan:
    """Return the plan of every step of such tensors, ``b n s d``."""
    asked = core._asked(None, None)
    asked = asked._replace(masks=(None, GivenCells.of(cells)), biases=(None, bias), layout="BNSD")
    return core._plan(asked, query, *pair, core.sink, None)


@untraced("a step with a StaticCache runs between compiled graphs")
def static_step(
    core: Attention,
    cache: StaticCache,
    composed: tuple[Mask, Pse | None],
    heads: tuple[Tensor, Tensor, Tensor],
) -> AttentionOutput:
    """Add tokens ``b s n d`` to a cache and attend to all memory; the output is ``b s n d``."""
    (mask, pse), (query, key, value) = composed, heads
    positions, capacity = cache.positions(query), cache.capacity
    known = text_length(mask, pse, 1)
    ends = row_ends(mask, capacity if known is None else known, query.device)
    bias = None
    if pse is not None:
        bias = _bias_at(pse, positions, capacity, query, core.composition.scale)
    cells = cells_at(ends, positions, capacity)
    query = query.transpose(1, 2)
    pair = cache.append(key, value)
    plan = static_plan(core, query, pair, cells, bias)
    output, stats = core._run(plan, Operands(query, *pair, bias, core.sink, given=(cells,)))
    return AttentionOutput(output.transpose(1, 2), stats)


def _bias_at(pse: Pse, positions: Tensor, capacity: int, like: Tensor, scale: float | None) -> Pse:
    """Return the rows of a bias at some positions, over all keys: ``[b n s capacity]``.

    They are added before the scale, divided by it: so does the version that graphs capture.
    """
    if not pse.toeplitz or any(part.before_scale for part in pse.parts):
        raise CompositionError(
            f"{pse!r} does not follow from distances alone, and a StaticCache makes its rows from "
            "the positions on the device; use a KVCache"
        )
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    make = _diagonals if pse.tensors else _kept_diagonals
    diagonals = make(pse, capacity, wide, like.device)
    keys = torch.arange(capacity, device=like.device)
    cells = diagonals[:, keys - positions[..., None] + capacity - 1].transpose(0, 1)
    if not scale:
        return Dense(cells.detach(), validate=False)
    return Dense(cells.detach() / scale, before_scale=True, validate=False)


def _check_still(mask: Mask, length: int) -> None:
    """Raise where the mask moves as the text grows: one that counts from its end always does."""
    if mask.extent != (None, None):
        return
    shorter = {length - 1, *(length >> k for k in range(1, length.bit_length()))} - {0}
    for b, h in mask._places:
        for n in shorter:
            if not mask._extends(n, length, b, h):
                raise CompositionError(
                    f"{mask!r} shows the first {n} tokens other keys in a text of {length} than in "
                    f"one of {n}, so steps cannot equal the full forward; anchor it at the first "
                    "key (align='top_left'; for padding on the left ~masks.Prefix(its lengths))"
                )


def _memory(like: Tensor, capacity: int) -> Tensor:
    # Zeros: kernels multiply what is masked, and what was never written might be NaN.
    batch, _, heads, dim = like.shape
    return like.new_zeros((batch, heads, capacity, dim))
