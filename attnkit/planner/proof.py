"""The proof that kernel calls compute a request: set equality, block by block."""

from __future__ import annotations

from collections.abc import Sequence

from attnkit.errors import Refusal
from attnkit.geometry import Region
from attnkit.kernel import KernelCall
from attnkit.planner.blocks import Block
from attnkit.planner.matrices import matrices
from attnkit.planner.request import Request

__all__ = ["disprove", "disprove_cover"]

Ranges = tuple[tuple[int, int], ...]


def disprove(
    call: KernelCall, targets: Sequence[Region], head: int | None = None
) -> Refusal | None:
    """Return why a call does not compute `targets`, one region per sequence; None if it does.

    Rows without an allowed key count: where the kernel would answer the mean of the values,
    the call does not compute the request, whose answer there is 0.
    """
    extra = missing = 0
    pairs = set(zip(call.regions(head), targets, strict=True))
    for computed, target in pairs:
        if computed != target:
            extra += (computed - target).area
            missing += (target - computed).area
    if extra or missing:
        parts = [f"{n:,} cells too {word}" for n, word in ((extra, "many"), (missing, "few")) if n]
        return Refusal("wrong-cells", f"it would compute {' and '.join(parts)}")
    averaged = sum(b - a for rows in set(call.averaged_rows(head)) for a, b in rows)
    if averaged:
        return Refusal(
            "mean-of-values",
            f"{averaged:,} rows allow no key, and the kernel would answer the mean of the values",
        )
    return None


def disprove_cover(
    request: Request, pieces: Sequence[tuple[KernelCall, tuple[Block, ...]]]
) -> Refusal | None:
    """Check a whole plan: the pieces are disjoint and their union is the request.

    Every score matrix of every head group is checked. Calls whose mask is built from the
    request's own mask when the plan runs (an opaque mask) cover it by construction.
    """
    known = matrices(request)
    if any(call.atten_mask is not None and call.atten_mask.is_opaque for call, _ in pieces):
        return None
    for h in range(len(known.planes)):
        head = h if known.per_head else None
        parts: list[list[Region]] = [[] for _ in range(request.batch)]
        for call, blocks in pieces:
            for block, region in zip(blocks, call.regions(head), strict=True):
                parts[block.batch].append(region.shift(block.i0, block.j0))
        for b, (found, target) in enumerate(zip(parts, known.regions(h), strict=True)):
            whole = Region.union(found)
            overlap = sum(part.area for part in found) - whole.area
            if whole != target or overlap:
                wrong = (whole ^ target).bounds
                return Refusal(
                    "cover",
                    f"batch element {b}, head {h}: the calls cover {whole.area:,} cells, "
                    f"{overlap:,} of them twice; the mask has {target.area:,} (first difference "
                    f"near {(wrong.i0, wrong.j0) if wrong else 'nowhere'})",
                )
    return None
