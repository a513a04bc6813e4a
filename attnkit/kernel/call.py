"""`KernelCall`: one call of the fused kernel with every argument filled in, as a value."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import Literal

import torch

from attnkit import layouts
from attnkit.errors import KernelContractError, Refusal
from attnkit.geometry import Region
from attnkit.kernel.atten_mask import AttenMask
from attnkit.kernel.legality import MaskFacts, Product, Target, Violation, violations
from attnkit.kernel.modes import COMPRESSED_MODES, mode_region, prefix_causal, window
from attnkit.kernel.sizes import UNBOUNDED, TensorSpec, paired_steps, read_sizes
from attnkit.kernel.versions import op_version
from attnkit.layouts import Sizes

__all__ = ["KernelCall", "RowRanges"]

RowRanges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class KernelCall:
    """Every argument of one call of ``npu_fusion_attention``, and what the call computes.

    Nothing is checked on construction, so that an illegal call can be described and every
    rule it breaks be listed. Argument names are those of op version 2 (``pre_tokens``).

    >>> spec = TensorSpec((1, 4, 6, 8), torch.float32)
    >>> call = KernelCall(spec, spec, spec, head_num=4, input_layout="BNSD",
    ...                   atten_mask=AttenMask.causal(), sparse_mode=3, scale=0.5)
    >>> call.regions()[0].area
    21
    >>> call.visited() is None, call.mask_origin(0), call.empty_rows(), call.averaged_rows()
    (True, (0, 0), ((),), ((),))
    >>> call.non_default_arguments()["sparse_mode"], call.arguments_for("v1")["sparse_mode"]
    (3, 3)
    """

    query: TensorSpec
    key: TensorSpec
    value: TensorSpec
    head_num: int
    input_layout: str
    pse: TensorSpec | None = None
    padding_mask: TensorSpec | None = None
    atten_mask: AttenMask | None = None
    scale: float = 1.0
    keep_prob: float = 1.0
    pre_tokens: int = UNBOUNDED
    next_tokens: int = UNBOUNDED
    inner_precise: int = 0
    prefix: tuple[int, ...] | None = None
    actual_seq_qlen: tuple[int, ...] | None = None
    actual_seq_kvlen: tuple[int, ...] | None = None
    sparse_mode: int = 0
    gen_mask_parallel: bool = True
    sync: bool = False
    pse_type: int = 1
    q_start_idx: tuple[int, ...] | None = None
    kv_start_idx: tuple[int, ...] | None = None
    softmax_layout: str = ""
    sink: TensorSpec | None = None
    dropout_mask: TensorSpec | None = None
    seed: int = 0
    offset: int = 0

    # What a call of another op says of itself differs (`attnkit.kernel.block_sparse`).

    @property
    def op(self) -> str:
        """The op that is called; its versions have names of their own."""
        return "npu_fusion_attention"

    @property
    def allows_all(self) -> bool:
        """Whether every cell takes part, whatever the sizes."""
        return self.atten_mask is None

    def around(self, bare: KernelCall) -> KernelCall:
        """Return the same kind of call around what another one says.

        >>> spec = TensorSpec((1, 4, 2, 16), torch.float16)
        >>> bare = KernelCall(spec, spec, spec, 2, "BSND")
        >>> bare.around(bare) == bare
        True
        """
        return bare

    # -- sizes ---------------------------------------------------------------------------

    @property
    def layout(self) -> str:
        """The input layout in capitals (the kernel compares it without regard to case)."""
        return self.input_layout.upper()

    @property
    def is_packed(self) -> bool:
        """Whether sequences of different lengths share one token axis (layout TND)."""
        return self.layout == "TND"

    @cached_property
    def sizes(self) -> tuple[Sizes, Sizes, Sizes]:
        """The extents of query, key and value; `length` counts all tokens when packed."""
        query = read_sizes(self.layout, self.query, heads=self.head_num)
        key = read_sizes(self.layout, self.key, dim=query.dim)
        return query, key, read_sizes(self.layout, self.value, heads=key.heads)

    @cached_property
    def sequences(self) -> tuple[tuple[int, int], ...]:
        """``(q_len, kv_len)`` of every score matrix: per batch element, or packed sequence.

        A packed sequence whose cumulative length repeats, or falls as zeros at the end do, is
        empty.
        """
        if not self.is_packed:
            return ((self.sizes[0].length, self.sizes[1].length),) * self.batch
        if self.actual_seq_qlen is None or self.actual_seq_kvlen is None:
            words = "layout TND needs actual_seq_qlen and actual_seq_kvlen, cumulative lengths"
            raise KernelContractError(f"{words} without a leading 0", ["varlen-missing"])
        steps = paired_steps(self.actual_seq_qlen, self.actual_seq_kvlen)
        return tuple((max(0, q), max(0, kv)) for q, kv in steps)

    @property
    def batch(self) -> int:
        """The number of batch elements, or of packed sequences."""
        return len(self.sequences) if self.is_packed else self.sizes[0].batch

    @cached_property
    def q_len(self) -> int:
        """The number of queries of one score matrix; of the longest sequence when packed."""
        return max((q for q, _ in self.sequences), default=0)

    @cached_property
    def kv_len(self) -> int:
        """The number of keys of one score matrix; of the longest sequence when packed."""
        return max((kv for _, kv in self.sequences), default=0)

    @property
    def total_lengths(self) -> tuple[int, int]:
        """The queries and the keys of all score matrices together."""
        return sum(q for q, _ in self.sequences), sum(kv for _, kv in self.sequences)

    @property
    def num_heads(self) -> int:
        """The number of query heads."""
        return self.sizes[0].heads

    @property
    def num_kv_heads(self) -> int:
        """The number of key and value heads; query head h reads h // (heads / kv_heads)."""
        return self.sizes[1].heads

    @property
    def head_dim(self) -> int:
        """The size of a query or key head."""
        return self.sizes[0].dim

    @property
    def value_dim(self) -> int:
        """The size of a value head, which may be smaller than the key's."""
        return self.sizes[2].dim

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the query, and so of the output."""
        return self.query.dtype

    @property
    def output(self) -> TensorSpec:
        """The shape and dtype of attention_out: the query's, with the value's head size."""
        merged = self.num_heads if layouts.get(self.layout).merges_heads else 1
        return TensorSpec((*self.query.shape[:-1], self.value_dim * merged), self.dtype)

    @property
    def stats(self) -> TensorSpec:
        """The shape and dtype of softmax_max and softmax_sum: eight equal copies per row."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        heads, tokens = self.num_heads, self.sizes[0].length
        rows = (tokens, heads) if self.is_packed else (self.batch, heads, tokens)
        return TensorSpec((*rows, 8), dtype)

    @property
    def numels(self) -> int:
        """The number of dropout decisions, as the op counts them.

        When packed it is taken from consecutive differences of the cumulative lists, so
        trailing zeros add a term that belongs to no cell.
        """
        if not self.is_packed:
            return self.batch * self.num_heads * self.q_len * self.kv_len
        steps = paired_steps(self.actual_seq_qlen or (), self.actual_seq_kvlen or ())
        return self.num_heads * sum(q * kv for q, kv in steps)

    # -- what is computed ----------------------------------------------------------------

    @cached_property
    def band_index(self) -> int | None:
        """The sequence that modes 7 (the last) and 8 (the first with queries) treat apart."""
        with_queries = [b for b, (q_len, _) in enumerate(self.sequences) if q_len]
        if self.sparse_mode not in (7, 8) or not with_queries:
            return None
        return with_queries[-1 if self.sparse_mode == 7 else 0]

    @property
    def effective_mode(self) -> int | None:
        """The sparse mode that takes effect: none without a mask, whatever the call says."""
        return None if self.atten_mask is None else self.sparse_mode

    @property
    def compressed_mask(self) -> AttenMask | None:
        """The mask that the sparse mode reads in the place of one with an entry per cell."""
        if self.sparse_mode not in COMPRESSED_MODES:
            return None
        return AttenMask.prefix() if self.sparse_mode == 6 else AttenMask.causal()

    @property
    def start_indices(self) -> tuple[int, int]:
        """The positions of the first query and key for slopes: effective together only."""
        q_start, kv_start = self.q_start_idx, self.kv_start_idx
        return (q_start[0], kv_start[0]) if q_start and kv_start else (0, 0)

    @property
    def has_all_prefixes(self) -> bool:
        """Whether there is one prefix per score matrix."""
        return len(self.prefix or ()) == self.batch

    @property
    def prefix_fault(self) -> str | None:
        """What keeps modes 5 and 6 from using the prefix; None if nothing does."""
        lengths = self.prefix or ()
        if not self.has_all_prefixes:
            return f"{len(lengths)} prefix lengths for {self.batch} score matrices"
        found = self._outlying_prefix()
        if found is None:
            return None
        q_len, kv_len = self.sequences[found]
        return f"prefix={lengths[found]} for {q_len} queries and {kv_len} keys"

    def _outlying_prefix(self) -> int | None:
        """The first score matrix whose prefix is not in [max(0, kv_len - q_len), kv_len]."""
        pairs = zip(self.prefix or (), self.sequences, strict=False)
        outside = (not max(0, kv - q) <= length <= kv for length, (q, kv) in pairs)
        return next((b for b, is_outside in enumerate(outside) if is_outside), None)

    def regions(self, head: int | None = None) -> tuple[Region, ...]:
        """Return the cells that take part, per batch element or packed sequence.

        `head` picks one head of a mask that differs between heads; without it such a mask is
        an error. The compressed masks are taken to hold what they should.
        """
        mask = self.atten_mask
        if mask is None:
            return tuple(Region.full(q_len, kv_len) for q_len, kv_len in self.sequences)
        if self.sparse_mode in COMPRESSED_MODES:
            prefixes = (*(self.prefix or ()), *(0,) * self.batch)
            given = [(*s, prefixes[b], b == self.band_index) for b, s in enumerate(self.sequences)]
            ends = (self.pre_tokens, self.next_tokens)
            known = {some: mode_region(self.sparse_mode, ends, *some) for some in set(given)}
            return tuple(known[some] for some in given)
        heads = range(self.num_heads) if head is None and mask.per_head else (head or 0,)
        found = {self._masked_regions(mask, h) for h in heads}
        if len(found) > 1:
            raise KernelContractError(
                f"the mask of shape {mask.shape} differs between heads; ask for "
                "regions(head=...) of one head",
                ["mask-per-head"],
            )
        return found.pop()

    def visited(self) -> tuple[Region, ...] | None:
        """Return the cells outside of which a full mask's tiles may be skipped, per matrix.

        The window of mode 0 and the prefix of mode 5 say so, and the mask must lie inside;
        None where every tile is read.
        """
        if self.effective_mode == 0:
            return tuple(window(*s, self.pre_tokens, self.next_tokens) for s in self.sequences)
        if self.effective_mode != 5 or self.prefix_fault is not None:
            return None
        pairs = zip(self.sequences, self.prefix or (), strict=True)
        return tuple(prefix_causal(*sizes, length) for sizes, length in pairs)

    def _masked_regions(self, mask: AttenMask, head: int) -> tuple[Region, ...]:
        """Modes 0, 1 and 5: the block of the mask tensor that belongs to each score matrix."""
        known: dict[tuple[int, ...], tuple[Region, Region]] = {}  # with the plane, for its id
        found = []
        for b, (q_len, kv_len) in enumerate(self.sequences):
            plane, (i0, j0) = mask.plane(b, head), self.mask_origin(b)
            block = (id(plane), i0, j0, q_len, kv_len)
            if block not in known:
                known[block] = plane, plane.cut((i0, i0 + q_len), (j0, j0 + kv_len))
            found.append(known[block][1])
        return tuple(found)

    def mask_origin(self, b: int) -> tuple[int, int]:
        """Return where a full mask starts for score matrix `b` (modes 0, 1 and 5).

        Packed sequences all read the top-left corner of a mask of the longest lengths. A mask
        of the total lengths is accepted too and read at each sequence's own place.
        """
        shape = () if self.atten_mask is None else self.atten_mask.shape[-2:]
        longest = (self.q_len, self.kv_len)
        if not self.is_packed or shape == longest or shape != self.total_lengths:
            return (0, 0)
        before = self.sequences[:b]
        return (sum(q for q, _ in before), sum(kv for _, kv in before))

    # -- rows without a key --------------------------------------------------------------

    @property
    def invalid_line(self) -> bool:
        """Whether the kernel runs its handling of rows without a key, which makes them 0.

        ``inner_precise=2`` asks for it. The tiling turns it on by itself for dense modes 0, 3
        and 4 when the window, anchored top-left, leaves rows empty (pre < q_len - kv_len or
        next < 0), and for modes 5 and 6 with q_len > kv_len and a prefix of 0. Not for mode 2
        and not for arbitrary mask content.
        """
        mode = self.effective_mode
        if self.inner_precise == 2:
            return True
        if mode in (5, 6) and self.has_all_prefixes:
            # The lengths are read in turn; the first that is out of range ends the reading.
            pairs = zip(self.sequences[: self._outlying_prefix()], self.prefix or (), strict=False)
            return any(q > kv and length == 0 for (q, kv), length in pairs)
        if self.is_packed or mode not in (0, 3, 4):
            return False
        pre, next_ = self.top_left_tokens
        if mode == 0 and pre >= self.q_len and next_ == 0:
            return False
        return pre < self.q_len - self.kv_len or next_ < 0

    @property
    def top_left_tokens(self) -> tuple[int, int]:
        """The window of modes 0, 3 and 4, anchored top-left, as the dense tiling converts it."""
        shift = self.kv_len - self.q_len
        pre, next_ = self.pre_tokens, self.next_tokens
        converted = {3: (self.q_len, shift), 4: (pre - shift, next_ + shift)}
        return converted.get(self.sparse_mode, (pre, next_))

    @property
    def empty_row_output(self) -> Literal["zero", "mean"]:
        """What a row without an allowed key gives: 0, or the mean of the values it visits.

        Sequences without any key give 0 in either case.
        """
        return "zero" if self.invalid_line or self.sink is not None else "mean"

    def empty_rows(self, head: int | None = None) -> tuple[RowRanges, ...]:
        """Return the rows without an allowed key, as ranges per score matrix."""
        pairs = zip(self.regions(head), self.sequences, strict=True)
        return tuple(region.empty_rows(q_len) for region, (q_len, _) in pairs)

    def averaged_rows(self, head: int | None = None) -> tuple[RowRanges, ...]:
        """Return the rows for which the kernel answers the mean of V, per score matrix.

        A call computes what attnkit means by its regions exactly when these are all empty.
        """
        if self.empty_row_output == "zero" or self.atten_mask is None:
            return ((),) * len(self.sequences)
        pairs = zip(self.empty_rows(head), self.sequences, strict=True)
        return tuple(rows if kv_len else () for rows, (_, kv_len) in pairs)

    # -- legality ------------------------------------------------------------------------

    def violations(
        self,
        *,
        version: str = "v2",
        product: Product = "A2",
        training: bool = False,
        learnable_bias: bool = False,
        mask_facts: MaskFacts | None = None,
    ) -> tuple[Violation, ...]:
        """Return every rule of the contract that the call breaks, silent ones included.

        `training` adds the rules of the grad op; `learnable_bias` says that pse wants a
        gradient. The content of a mask is judged by its regions, or by `mask_facts` where a
        tensor was looked at. `product` may be "emulator", which also computes float64.
        """
        facts = mask_facts or MaskFacts()
        return violations(self, Target(version, product, training, learnable_bias, facts))

    # -- arguments -----------------------------------------------------------------------

    def non_default_arguments(self) -> dict[str, object]:
        """Return the arguments that differ from the op's defaults, tensors included."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.default is MISSING or getattr(self, f.name) != f.default
        }

    def inexpressible(self, version: str) -> str | None:
        """Return why an op version cannot express the call, or None when it can.

        >>> spec = TensorSpec((1, 4, 2, 16), torch.float16)
        >>> KernelCall(spec, spec, spec, 2, "BSND").inexpressible("v1") is None
        True
        """
        known = op_version(version)
        given = self.non_default_arguments().items()
        missing = [f"{name}={value}" for name, value in given if name not in known.arguments]
        return f"{known.op} has no argument for {', '.join(missing)}" if missing else None

    def arguments_for(self, version: str) -> dict[str, object] | Refusal:
        """Return the keyword arguments of an op version, spelled as it spells them, or why not.

        Tensors are given as their descriptions, lists as tuples. Arguments at the op's defaults are
        left out, so that releases which do not know them yet can still be called.

        >>> spec = TensorSpec((1, 4, 2, 16), torch.float16)
        >>> KernelCall(spec, spec, spec, 2, "BSND", scale=0.25).arguments_for("v1")["scale"]
        0.25
        """
        reason = self.inexpressible(version)
        if reason is not None:
            return Refusal("version-cannot-express", reason, version)
        spelling = op_version(version).spelling
        return {spelling.get(n, n): value for n, value in self.non_default_arguments().items()}

    def __str__(self) -> str:
        def show(value: object) -> str:
            if isinstance(value, tuple) and len(value) > 8:
                return f"({', '.join(map(str, value[:6]))}, ... {len(value)} in all)"
            return repr(value) if isinstance(value, str) else str(value)

        arguments = self.non_default_arguments().items()
        return f"{self.op}({', '.join(f'{k}={show(v)}' for k, v in arguments)})"
