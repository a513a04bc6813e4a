"""The bias tensor of a kernel call: slopes, a matrix, pieces of one, or its last 1,024 rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnkit.backends.numbers import largest_bias
from attnkit.constants import constant
from attnkit.kernel import TensorSpec
from attnkit.planner import Launch, Request
from attnkit.planner.biases import COMPRESSED_ROWS, is_compressed
from attnkit.planner.sequences import Block
from attnkit.pse import PerCell, PerKey, Pse

__all__ = [
    "by_diagonal",
    "call_bias",
    "constants",
    "diagonals_of",
    "looked_up",
    "numbers_of",
    "stored",
]


def call_bias(
    request: Request, launch: Launch, pse: Pse | None, device: torch.device
) -> Tensor | None:
    """Return the tensor that a call is given as its bias, as the call describes it."""
    spec, heads = launch.call.pse, launch.heads
    if pse is None or spec is None:
        return None
    if launch.call.pse_type in (2, 3):
        (part,) = pse.parts  # a sum may be of one
        slopes = numbers_of(part, spec.dtype, device).detach()
        return slopes if heads is None else slopes[list(heads)]
    before = launch.call.pse_type == 1
    if is_compressed(launch.call):
        # The rows of the longest sequence hold the distances of every other.
        inside = (block for block in launch.blocks if all(block.sizes))
        block = max(inside, key=lambda block: block.sizes)
        rows = min(block.sizes[0], COMPRESSED_ROWS)
        _, i1, *keys = block.ends
        last = Block.at(block.batch, i1 - rows, i1, *keys)
        # Rows above a short sequence are never read.
        parts = [pad(_piece(request, pse, last, before, spec, device), (0, 0, 1024 - rows, 0))]
    elif launch.partial:
        blocks = launch.blocks[: spec.shape[0]]
        parts = [_piece(request, pse, block, before, spec, device) for block in blocks]
    else:
        whole = Block.at(0, 0, request.q_len, 0, request.kv_len)
        parts = [_piece(request, pse, whole, before, spec, device, every=True)]
    if heads is not None:
        own = torch.tensor(heads, device=device)
        parts = [part if part.shape[1] == 1 else part.index_select(1, own) for part in parts]
    whole_bias = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole_bias.expand(spec.shape).contiguous()


def _piece(
    request: Request,
    pse: Pse,
    block: Block,
    before: bool,
    spec: TensorSpec,
    device: torch.device,
    every: bool = False,
) -> Tensor:
    """Return a block's cells of the bias, ``[1 | b, 1 | n, i, j]``; `every`: of all the batch."""
    q_len, kv_len = request.sequences[block.batch]
    rows, keys = block.ends[:2], block.ends[2:]
    if (rows, keys) != ((0, q_len), (0, kv_len)):
        pse = pse.cut(rows, keys, q_len=q_len, kv_len=kv_len)
    index = None if every else block.batch
    if before:
        bias = pse.materialize(*block.sizes, batch_index=index, dtype=spec.dtype, device=device)
    else:
        bias = pse.term(
            *block.sizes, scale=request.scale, batch_index=index, dtype=spec.dtype, device=device
        )
    most = largest_bias(torch.float32)
    if not pse.tensors or torch.finfo(spec.dtype).max <= most:
        return bias
    # The kernel's score of a masked cell is the lowest float32: those of others stay above.
    return bias.clamp(-most, most)


def numbers_of(part: Pse, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the small tensor that a bias's cells follow from: constant slopes, or its own."""
    slopes = getattr(part.structure, "slopes", None)
    return (
        part.structure_tensors[0].to(dtype) if slopes is None else constants(slopes, dtype, device)
    )


@constant
def constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor, copied to a device once."""
    return torch.tensor(values, dtype=dtype).to(device)


def stored(part: Pse, lengths: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a bias ``[1 | b, 1 | n, 1 | i, j]``: a view of the tensor that it is, or its cells."""
    if not isinstance(part.structure, PerCell | PerKey):
        return part.materialize(*lengths, dtype=dtype, device=device)
    tensor = part.structure_tensors[0]
    if isinstance(part.structure, PerKey):  # every row is the same: one is enough
        tensor = tensor[..., None, :]
    return tensor[(None,) * (4 - tensor.ndim)]


def looked_up(part: Pse, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return an indexed bias as entries ``[1 | n, entries]`` and their index ``[1 | b, i, j]``."""
    table, index = part.structure_tensors
    return table.to(dtype).t().contiguous(), index if index.ndim == 3 else index[None]


def by_diagonal(
    request: Request, part: Pse, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, dict[tuple[int, int], int]]:
    """Return the numbers ``[1 | n, diagonals]`` of a bias by distance, and where they begin.

    Score matrices of the same lengths share theirs, in the order of ``j - i``, from ``1 - q_len``
    on.
    """
    return diagonals_of(request.sequences, part, dtype, device)


def diagonals_of(
    sequences: Iterable[tuple[int, int]], part: Pse, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, dict[tuple[int, int], int]]:
    """Return the same for score matrices of these lengths."""
    found, starts = [], {}
    start = 0
    for lengths in dict.fromkeys(sequences):
        if all(lengths):
            found.append(part.diagonals(*lengths, dtype=dtype, device=device))
            starts[lengths] = start
            start += sum(lengths) - 1
    if not found:
        return torch.zeros(1, 0, dtype=dtype, device=device), {}
    return (found[0] if len(found) == 1 else torch.cat(found, -1)), starts
