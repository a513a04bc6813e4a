"""`BlockSparseCall`: one call of ``npu_block_sparse_attention``, and the rules of its contract.

The op attends in whole blocks of a score matrix. A table of bits on the device says which: one
per head, block of rows and block of keys. It has no token mask, no bias, no sink and no dropout,
and returns the log-sum-exp, so that what it leaves can be computed by other calls and merged.

Sources: op-plugin's schema, page and checks of the op and of its ``_backward``, which the wheels
of torch_npu have since release 26.0.0 (2.7.1.post4, 2.9.0.post2, 2.10.0), with CANN 9.0; and CANN's
pages and tiling of aclnnBlockSparseAttention and aclnnBlockSparseAttentionGrad. The backward of
26.0.0 takes dense layouts and no grouped heads, that of 26.1.0 both; what is installed does not
tell which CANN is beneath it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property, partial

import torch

from attnkit.geometry import Region
from attnkit.kernel.call import KernelCall
from attnkit.kernel.legality import (
    Found,
    MaskFacts,
    Product,
    Rule,
    Target,
    Violation,
    broken,
    rule,
)
from attnkit.kernel.sizes import UNBOUNDED
from attnkit.registry import Registry
from attnkit.strips import Run, Strip, advance

__all__ = ["BLOCK_SPARSE_RULES", "OP", "BlockSparseCall", "full_blocks", "grid_of"]

OP = "npu_block_sparse_attention"
GRAD_DIM = 128
DIMS = (64, GRAD_DIM)
KEY_BLOCK = 128

_NOT_TAKEN = ("pse", "padding_mask", "atten_mask", "prefix", "sink", "dropout_mask")
_WITHOUT = {"keep_prob": 1.0, "pre_tokens": UNBOUNDED, "next_tokens": UNBOUNDED, "sparse_mode": 0}


@dataclass(frozen=True)
class BlockSparseCall(KernelCall):
    """One call of the block-sparse op, as a value.

    It is described like a call of the fused op: sizes, sequences, and cumulative lengths where it
    is packed. `tables` are the blocks that each sequence computes, regions in which a cell is a
    block of `block_shape` ``(rows, keys)``; the last block of a sequence may be shorter. Heads are
    alike. Dense tensors are ``b s n d`` here, and handed to the op as ``b m (g s) d``: the query
    heads of a key head are rows below each other.

    >>> from attnkit.kernel import TensorSpec
    >>> spec = TensorSpec((1, 256, 2, 128), torch.float16)
    >>> bare = KernelCall(spec, spec, spec, 2, "BSND", scale=0.1)
    >>> call = BlockSparseCall.of(bare, (Region.full(2, 1),))
    >>> [region.area for region in call.regions()], call.violations(training=True)
    ([32768], ())
    >>> call.arguments(backward=True)["q_input_layout"]
    'BNSD'
    """

    tables: tuple[Region, ...] = ()
    block_shape: tuple[int, int] = (128, 128)

    @property
    def op(self) -> str:
        """The op that is called."""
        return OP

    @property
    def allows_all(self) -> bool:
        """Whether every cell takes part: the tables say, and are compared."""
        return False

    @classmethod
    def of(
        cls,
        bare: KernelCall,
        tables: tuple[Region, ...],
        block_shape: tuple[int, int] = (128, 128),
    ) -> BlockSparseCall:
        """Return the call on some blocks of what a call without a mask computes."""
        given = {item.name: getattr(bare, item.name) for item in fields(bare)}
        # Its log-sum-exp comes in the order of the tokens.
        given["softmax_layout"] = "TND" if bare.is_packed else ""
        return cls(**{**given, "tables": tables, "block_shape": block_shape})

    def around(self, bare: KernelCall) -> BlockSparseCall:
        """Return the call with these blocks of what another one without a mask computes."""
        return BlockSparseCall.of(bare, self.tables, self.block_shape)

    def regions(self, head: int | None = None) -> tuple[Region, ...]:
        """Return the cells of the blocks, per batch element or packed sequence."""
        return self._regions

    @cached_property
    def _regions(self) -> tuple[Region, ...]:
        pairs = list(zip(self.tables, self.sequences, strict=True))
        known = {pair: _in_cells(*pair, self.block_shape) for pair in set(pairs)}
        return tuple(known[pair] for pair in pairs)

    @property
    def stacked(self) -> int:
        """How many query heads are handed to the op as rows of one: those of a key head, if dense.

        Its backward has as many key heads as query heads. Blocks do not mind whose rows they are.
        """
        return 1 if self.is_packed else self.num_heads // self.num_kv_heads

    @property
    def grid(self) -> tuple[int, int]:
        """The blocks of the longest sequence, along rows and keys."""
        return grid_of((self.q_len, self.kv_len), self.block_shape)

    def violations(
        self,
        *,
        version: str = "v2",
        product: Product = "A2",
        training: bool = False,
        learnable_bias: bool = False,
        mask_facts: MaskFacts | None = None,
    ) -> tuple[Violation, ...]:
        """Return every rule of this op's contract that the call breaks; it has one version."""
        target = Target(version, product, training, learnable_bias, mask_facts or MaskFacts())
        return broken(self, target, (one for _, one in BLOCK_SPARSE_RULES.items()))

    def arguments(self, backward: bool = False) -> dict[str, object]:
        """Return the op's arguments that are no tensors, or those of its ``_backward``.

        Lengths are those of each sequence: other than the fused op's, they are not cumulative.
        """
        rows, keys = ([sizes[side] for sizes in self.sequences] for side in (0, 1))
        layout = "TND" if self.is_packed else "BNSD"
        given: dict[str, object] = {
            "block_shape": list(self.block_shape),
            "q_input_layout": layout,
            "kv_input_layout": layout,
            "num_key_value_heads": self.num_kv_heads,
            "scale_value": self.scale,
            "actual_seq_lengths": rows if self.is_packed else None,
            "actual_seq_lengths_kv": keys if self.is_packed else None,
        }
        # Softmax in float32, which is all that bfloat16 may have.
        return given if backward else {**given, "inner_precise": 0, "softmax_lse_flag": 1}

    def non_default_arguments(self) -> dict[str, object]:
        """Return the arguments that differ from the op's defaults, tensors as descriptions."""
        blocks = sum(table.area for table in self.tables)
        rows, keys = self.grid
        shape = [len(self.tables), self.num_heads // self.stacked, rows * self.stacked, keys]
        table = f"int8{shape}, {blocks:,} blocks for each head"
        given = {"query": self.query, "key": self.key, "value": self.value}
        more = {name: value for name, value in self.arguments().items() if value is not None}
        listed = {n: tuple(v) if isinstance(v, list) else v for n, v in more.items()}
        return {**given, "block_sparse_mask": table, **listed}


def grid_of(sizes: tuple[int, int], block_shape: tuple[int, int]) -> tuple[int, int]:
    """Return how many blocks a score matrix has along rows and keys, the last ones included.

    >>> grid_of((256, 300), (128, 128))
    (2, 3)
    """
    return -(-sizes[0] // block_shape[0]), -(-sizes[1] // block_shape[1])


def _in_cells(table: Region, sizes: tuple[int, int], block_shape: tuple[int, int]) -> Region:
    """Return the cells of blocks in a score matrix, whose last blocks may be shorter."""
    (x, y), (q_len, kv_len) = block_shape, sizes
    strips: list[Strip] = []
    for i0, i1, runs in table.strips:
        upright = not any(da or db for _, da, _, db in runs)
        for row in (i0,) if upright else range(i0, i1):
            spans = advance(runs, row - i0)
            cells = tuple(
                (a * y, 0, min(b * y, kv_len), 0) for a, _, b, _ in spans if a * y < kv_len
            )
            stop = min((i1 if upright else row + 1) * x, q_len)
            if cells and row * x < stop:
                strips.append(Strip(row * x, stop, cells))
    return Region.stacked(strips)


def full_blocks(region: Region, sizes: tuple[int, int], block_shape: tuple[int, int]) -> Region:
    """Return the blocks of a score matrix all of whose cells are in a region.

    >>> from attnkit.masks import Causal
    >>> full_blocks(Causal().region(8, 8), (8, 8), (4, 2)).area
    2
    """
    (x, y), (q_len, kv_len) = block_shape, sizes
    rows, keys = grid_of(sizes, block_shape)
    seen: list[list[tuple[int, int]]] = [[(0, kv_len)]] * rows
    covered = [0] * rows
    for i0, i1, runs in region.strips:
        for row in range(i0 // x, -(-i1 // x)):
            start, stop = max(i0, row * x), min(i1, (row + 1) * x)
            seen[row] = _common(seen[row], advance(runs, start - i0), stop - start)
            covered[row] += stop - start
    table = []
    for row, spans in enumerate(seen):
        whole = covered[row] == min(x, q_len - row * x)
        blocks = [(-(-a // y), keys if b == kv_len else b // y) for a, b in spans if whole]
        table.append([one for one in blocks if one[0] < one[1]])
    return Region.from_rows(table)


def _common(
    spans: list[tuple[int, int]], runs: tuple[Run, ...], rows: int
) -> list[tuple[int, int]]:
    """Return the keys of some spans that every one of some rows has in its runs."""
    out = []
    for a, da, b, _ in runs:
        start = a + da * (rows - 1)
        out += [(max(start, c), min(b, d)) for c, d in spans if max(start, c) < min(b, d)]
    return out


# -- the rules ---------------------------------------------------------------------------------

BLOCK_SPARSE_RULES: Registry[Rule] = Registry("rule of block-sparse attention")
"""What the op demands on A2 and A3, in the order in which it is asked."""

_rule = partial(rule, rules=BLOCK_SPARSE_RULES, source="block-sparse")


@_rule(layer="documented", remedy="Use calls of the fused op there.")
def block_sparse_product(call: BlockSparseCall, on: Target) -> Found:
    """The op runs on Atlas A2 and A3 as it is described here."""
    if on.product not in ("A2", "A3", "emulator"):
        yield f"{call.op} on Ascend {on.product}"


@_rule(layer="tiling", remedy="Cast them, or use calls of the fused op.")
def block_sparse_dtype(call: BlockSparseCall, on: Target) -> Found:
    """Query, key and value are float16 or bfloat16, all of them the same."""
    known = {torch.float16, torch.bfloat16}
    known |= {torch.float64} if on.product == "emulator" else set()
    dtypes = {call.query.dtype, call.key.dtype, call.value.dtype}
    if len(dtypes) > 1 or not dtypes <= known:
        yield f"query {call.query}, key {call.key}, value {call.value}"


@_rule(layer="tiling", remedy="Use calls of the fused op.")
def block_sparse_head_dim(call: BlockSparseCall, on: Target) -> Found:
    """Heads of query, key and value are of one size: 64 or 128, and 128 for its backward."""
    dims = (GRAD_DIM,) if on.training else DIMS
    if call.head_dim not in dims or call.value_dim != call.head_dim:
        of = f"heads of {call.head_dim} (values {call.value_dim})"
        yield f"{of}{' in training' if on.training else ''}"


@_rule(layer="documented", remedy="Use rows that blocks divide, or calls of the fused op.")
def block_sparse_heads(call: BlockSparseCall, on: Target) -> Found:
    """Dense query heads of one key head follow each other as rows, so their blocks are whole."""
    if call.stacked > 1 and call.q_len % call.block_shape[0]:
        yield f"{call.stacked} heads of {call.q_len} rows in blocks of {call.block_shape[0]}"


@_rule(layer="documented", remedy="Use a dense layout, with sequences of one length.")
def block_sparse_layout(call: BlockSparseCall, on: Target) -> Found:
    """Layouts are TND and dense, and dense for its backward, as CANN 9.0 documents it."""
    if call.layout not in (("BSND",) if on.training else ("BSND", "TND")):
        yield f"input_layout={call.input_layout!r}{' in training' if on.training else ''}"


@_rule(layer="tiling", remedy="Use blocks of 128 keys.")
def block_shape(call: BlockSparseCall, on: Target) -> Found:
    """A block has at least one row, and a multiple of 128 keys."""
    rows, keys = call.block_shape
    if rows < 1 or keys < 1 or keys % KEY_BLOCK:
        yield f"block_shape={call.block_shape}"


@_rule(layer="tiling", remedy="Give one table for each sequence, as large as its blocks.")
def block_table(call: BlockSparseCall, on: Target) -> Found:
    """There is one table per sequence, with an entry for each of its blocks."""
    grids = [grid_of(sizes, call.block_shape) for sizes in call.sequences]
    if len(call.tables) != len(grids):
        yield f"{len(call.tables)} tables for {len(grids)} sequences"
    for table, grid in zip(call.tables, grids, strict=False):
        if not table.fits(*grid):
            yield f"a table with blocks beyond {grid}"


@_rule(layer="silent", remedy="Leave such rows out of the call.")
def block_row_empty(call: BlockSparseCall, on: Target) -> Found:
    """Every block of rows has a block of keys; what others would answer is not documented."""
    for table, sizes in zip(call.tables, call.sequences, strict=False):
        empty = table.empty_rows(grid_of(sizes, call.block_shape)[0])
        if empty:
            yield f"block rows {empty[:4]} have no block of keys"


@_rule(layer="torch", remedy="Leave it to a call of the fused op.")
def block_sparse_plain(call: BlockSparseCall, on: Target) -> Found:
    """There is no token mask, window, bias, sink or dropout."""
    found = [name for name in _NOT_TAKEN if getattr(call, name) is not None]
    found += [name for name, value in _WITHOUT.items() if getattr(call, name) != value]
    if found:
        yield f"{', '.join(found)} in a call of {call.op}"
