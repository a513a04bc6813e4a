"""`KernelCall`: one call of the fused kernel with every argument filled in, as a value."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import Literal

import torch

from attnkit.errors import KernelContractError, Refusal
from attnkit.geometry import Region
from attnkit.kernel.arguments import check_tensors_given
from attnkit.kernel.atten_mask import AttenMask
from attnkit.kernel.legality import violations
from attnkit.kernel.modes import COMPRESSED_MODES, mode_region, prefix_causal, window
from attnkit.kernel.rules import MaskFacts, Product, Target, Violation
from attnkit.kernel.sizes import LayoutSizes, layout_sizes, sequence_lengths
from attnkit.kernel.versions import arguments_for

__all__ = ["UNBOUNDED", "KernelCall", "RowRanges", "TensorSpec"]

UNBOUNDED = 2147483647
"""The default of pre_tokens and next_tokens: no bound."""

RowRanges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TensorSpec:
    """The shape and dtype of a tensor, without the tensor.

    >>> print(TensorSpec((2, 16, 64), torch.bfloat16))
    bfloat16[2, 16, 64]
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """Describe a tensor."""
        check_tensors_given("TensorSpec.of", ("tensor", tensor))
        return cls(tuple(tensor.shape), tensor.dtype)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


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
    >>> call.non_default_arguments()["sparse_mode"]
    3
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
    def query_sizes(self) -> LayoutSizes:
        """The extents of the query."""
        return layout_sizes(self.layout, self.query.shape, self.head_num, 0)

    @cached_property
    def key_sizes(self) -> LayoutSizes:
        """The extents of the key."""
        return layout_sizes(self.layout, self.key.shape, None, self.query_sizes.head_dim)

    @cached_property
    def value_sizes(self) -> LayoutSizes:
        """The extents of the value."""
        return layout_sizes(self.layout, self.value.shape, self.key_sizes.heads, 0)

    @cached_property
    def sequences(self) -> tuple[tuple[int, int], ...]:
        """``(q_len, kv_len)`` of every score matrix: per batch element, or packed sequence."""
        if not self.is_packed:
            return ((self.query_sizes.length, self.key_sizes.length),) * self.batch
        if self.actual_seq_qlen is None or self.actual_seq_kvlen is None:
            raise KernelContractError(
                "layout TND needs actual_seq_qlen and actual_seq_kvlen, the cumulative lengths "
                "of its sequences without a leading 0",
                ["varlen-missing"],
            )
        q_lens = sequence_lengths(self.actual_seq_qlen)
        return tuple(zip(q_lens, sequence_lengths(self.actual_seq_kvlen), strict=False))

    @property
    def batch(self) -> int:
        """The number of batch elements, or of packed sequences."""
        return len(self.sequences) if self.is_packed else self.query_sizes.batch

    @property
    def q_len(self) -> int:
        """The number of queries of one score matrix; of the longest sequence when packed."""
        return max((q for q, _ in self.sequences), default=0)

    @property
    def kv_len(self) -> int:
        """The number of keys of one score matrix; of the longest sequence when packed."""
        return max((kv for _, kv in self.sequences), default=0)

    @property
    def num_heads(self) -> int:
        """The number of query heads."""
        return self.query_sizes.heads

    @property
    def num_kv_heads(self) -> int:
        """The number of key and value heads; query head h reads h // (heads / kv_heads)."""
        return self.key_sizes.heads

    @property
    def head_dim(self) -> int:
        """The size of a query or key head."""
        return self.query_sizes.head_dim

    @property
    def value_dim(self) -> int:
        """The size of a value head, which may be smaller than the key's."""
        return self.value_sizes.head_dim

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the query, and so of the output."""
        return self.query.dtype

    @property
    def output(self) -> TensorSpec:
        """The shape and dtype of attention_out: the query's, with the value's head size."""
        last = self.value_dim
        if self.layout in ("BSH", "SBH"):
            last *= self.num_heads
        return TensorSpec((*self.query.shape[:-1], last), self.dtype)

    @property
    def stats(self) -> TensorSpec:
        """The shape and dtype of softmax_max and softmax_sum: eight equal copies per row."""
        n = self.num_heads
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        if self.is_packed:
            return TensorSpec((self.query.shape[0], n, 8), dtype)
        return TensorSpec((self.batch, n, self.q_len, 8), dtype)

    @property
    def numels(self) -> int:
        """The number of dropout decisions, as the op counts them.

        When packed it is taken from consecutive differences of the cumulative lists, so
        trailing zeros add a term that belongs to no cell.
        """
        if not self.is_packed:
            return self.batch * self.num_heads * self.q_len * self.kv_len
        cells = 0
        last_q = last_kv = 0
        for q, kv in zip(self.actual_seq_qlen or (), self.actual_seq_kvlen or (), strict=False):
            cells += (q - last_q) * (kv - last_kv)
            last_q, last_kv = q, kv
        return cells * self.num_heads

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
    def prefix_fault(self) -> str | None:
        """What keeps modes 5 and 6 from using the prefix; None if nothing does."""
        lengths = self.prefix or ()
        if len(lengths) != self.batch:
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
        if self.atten_mask is None:
            return tuple(Region.full(q_len, kv_len) for q_len, kv_len in self.sequences)
        if self.sparse_mode in COMPRESSED_MODES:
            keys = [self._mode_arguments(b) for b in range(self.batch)]
            known = {key: self._mode_region(*key) for key in set(keys)}
            return tuple(known[key] for key in keys)
        heads = range(self.num_heads) if head is None and self._mask_heads > 1 else (head or 0,)
        found = {tuple(self._masked_region(b, h) for b in range(self.batch)) for h in heads}
        if len(found) > 1:
            raise KernelContractError(
                f"the mask of shape {self.atten_mask.shape} differs between heads; ask for "
                "regions(head=...) of one head",
                ["mask-per-head"],
            )
        return found.pop()

    def visited(self) -> tuple[Region, ...] | None:
        """Return the cells outside of which a full mask's tiles may be skipped, per matrix.

        The window of mode 0 and the prefix of mode 5 say so, and the mask must lie inside;
        None where every tile is read.

        >>> from attnkit.kernel import AttenMask, TensorSpec
        >>> spec = TensorSpec((1, 4, 2, 16), torch.float16)
        >>> call = KernelCall(spec, spec, spec, head_num=2, input_layout="BSND",
        ...                   atten_mask=AttenMask.causal(), sparse_mode=2)
        >>> call.visited() is None
        True
        """
        if self.atten_mask is None or self.sparse_mode not in (0, 5):
            return None
        if self.sparse_mode == 0:
            return tuple(window(*s, self.pre_tokens, self.next_tokens) for s in self.sequences)
        if self.prefix_fault is not None:
            return None
        pairs = zip(self.sequences, self.prefix or (), strict=True)
        return tuple(prefix_causal(*sizes, length) for sizes, length in pairs)

    def _mode_arguments(self, b: int) -> tuple[int, int, int, bool]:
        prefix = self.prefix[b] if self.prefix is not None and b < len(self.prefix) else 0
        return (*self.sequences[b], prefix, b == self.band_index)

    def _mode_region(self, q_len: int, kv_len: int, prefix: int, is_band: bool) -> Region:
        return mode_region(
            self.sparse_mode,
            q_len,
            kv_len,
            pre=self.pre_tokens,
            next_=self.next_tokens,
            prefix=prefix,
            is_band=is_band,
        )

    @property
    def _mask_heads(self) -> int:
        mask = self.atten_mask
        return mask.shape[1] if mask is not None and len(mask.shape) == 4 else 1

    def _masked_region(self, b: int, head: int) -> Region:
        """Modes 0, 1 and 5: the block of the mask tensor that belongs to one score matrix."""
        mask = self.atten_mask
        if mask is None:
            return Region.full(*self.sequences[b])
        (i0, j0), (q_len, kv_len) = self.mask_origin(b), self.sequences[b]
        index = 0
        if len(mask.shape) == 4:
            index = (b if mask.shape[0] > 1 else 0) * mask.shape[1]
            index += head if mask.shape[1] > 1 else 0
        return mask.allowed(index).cut((i0, i0 + q_len), (j0, j0 + kv_len))

    def mask_origin(self, b: int) -> tuple[int, int]:
        """Return where a full mask starts for score matrix `b` (modes 0, 1 and 5).

        Packed sequences all read the top-left corner of a mask of the longest lengths. A mask
        of the total lengths is accepted too and read at each sequence's own place.

        >>> from attnkit.kernel import AttenMask, TensorSpec
        >>> spec = TensorSpec((1, 4, 2, 16), torch.float16)
        >>> call = KernelCall(spec, spec, spec, head_num=2, input_layout="BSND",
        ...                   atten_mask=AttenMask.causal(), sparse_mode=2)
        >>> call.mask_origin(0)
        (0, 0)
        """
        mask = self.atten_mask
        if not self.is_packed or mask is None:
            return (0, 0)
        totals = tuple(map(sum, zip(*self.sequences, strict=True)))
        if mask.shape[-2:] == (self.q_len, self.kv_len) or mask.shape[-2:] != totals:
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
        if self.inner_precise == 2:
            return True
        if self.atten_mask is None:
            return False
        if self.sparse_mode in (5, 6):
            if len(self.prefix or ()) != self.batch:
                return False
            # The lengths are read in turn; the first that is out of range ends the reading.
            pairs = zip(self.sequences[: self._outlying_prefix()], self.prefix or (), strict=False)
            return any(q > kv and length == 0 for (q, kv), length in pairs)
        if self.is_packed or self.sparse_mode not in (0, 3, 4):
            return False
        pre, next_ = self.top_left_tokens
        if self.sparse_mode == 0 and pre >= self.q_len and next_ == 0:
            return False
        return pre < self.q_len - self.kv_len or next_ < 0

    @property
    def top_left_tokens(self) -> tuple[int, int]:
        """The window of modes 0, 3 and 4, anchored top-left, as the dense tiling converts it."""
        shift = self.kv_len - self.q_len
        if self.sparse_mode == 3:
            return (self.q_len, shift)
        if self.sparse_mode == 4:
            return (self.pre_tokens - shift, self.next_tokens + shift)
        return (self.pre_tokens, self.next_tokens)

    @property
    def empty_row_output(self) -> Literal["zero", "mean"]:
        """What a row without an allowed key gives: 0, or the mean of the values it visits.

        Sequences without any key give 0 in either case.
        """
        return "zero" if self.invalid_line or self.sink is not None else "mean"

    def empty_rows(self, head: int | None = None) -> tuple[RowRanges, ...]:
        """Return the rows without an allowed key, as ranges per score matrix.

        >>> from attnkit.kernel import AttenMask, TensorSpec
        >>> spec = TensorSpec((1, 4, 2, 16), torch.float16)
        >>> call = KernelCall(spec, spec, spec, head_num=2, input_layout="BSND",
        ...                   atten_mask=AttenMask.causal(), sparse_mode=2)
        >>> call.empty_rows()
        ((),)
        """
        pairs = zip(self.regions(head), self.sequences, strict=True)
        return tuple(region.empty_rows(q_len) for region, (q_len, _) in pairs)

    def averaged_rows(self, head: int | None = None) -> tuple[RowRanges, ...]:
        """Return the rows for which the kernel answers the mean of V, per score matrix.

        A call computes what attnkit means by its regions exactly when these are all empty.

        >>> from attnkit.kernel import AttenMask, TensorSpec
        >>> spec = TensorSpec((1, 4, 2, 16), torch.float16)
        >>> call = KernelCall(spec, spec, spec, head_num=2, input_layout="BSND",
        ...                   atten_mask=AttenMask.causal(), sparse_mode=2)
        >>> call.averaged_rows()
        ((),)
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

    def arguments_for(self, version: str) -> dict[str, object] | Refusal:
        """Return the exact keyword arguments of an op version, or why it cannot express this.

        Tensors stand as their descriptions; arguments at their defaults are left out.

        >>> from attnkit.kernel import AttenMask, TensorSpec
        >>> spec = TensorSpec((1, 4, 2, 16), torch.float16)
        >>> call = KernelCall(spec, spec, spec, head_num=2, input_layout="BSND",
        ...                   atten_mask=AttenMask.causal(), sparse_mode=2)
        >>> call.arguments_for("v1")["sparse_mode"]
        2
        """
        return arguments_for(self, version)

    # -- reading -------------------------------------------------------------------------

    def non_default_arguments(self) -> dict[str, object]:
        """Return the arguments that differ from the op's defaults, tensors included."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.default is MISSING or getattr(self, f.name) != f.default
        }

    def __str__(self) -> str:
        def show(value: object) -> str:
            if isinstance(value, tuple) and len(value) > 8:
                return f"({', '.join(map(str, value[:6]))}, ... {len(value)} in all)"
            return repr(value) if isinstance(value, str) else str(value)

        arguments = self.non_default_arguments().items()
        return f"npu_fusion_attention({', '.join(f'{k}={show(v)}' for k, v in arguments)})"
