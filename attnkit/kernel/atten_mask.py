"""`AttenMask`: which mask tensor a kernel call is given, and the tensors themselves.

The kernel's own polarity is the opposite of attnkit's: in these tensors True means *masked*.
A record's `regions` are in attnkit's polarity: they hold the *allowed* cells.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import prod
from typing import Literal

import torch

from attnkit.arguments import check_tensor
from attnkit.constants import constant
from attnkit.errors import KernelContractError, contract
from attnkit.geometry import Region, Slice

__all__ = ["COMPRESSED_SIDE", "PREFIX_SIDE", "AttenMask", "MaskKind"]

MaskKind = Literal["causal", "prefix", "full"]

COMPRESSED_SIDE = 2048
"""Side of the compressed causal mask; tiles of at most half of it can read any diagonal."""

PREFIX_SIDE = 1024
"""Rows of the second part of the compressed prefix mask, and half of its width."""

# Whole masks up to this many cells are worth keeping; larger ones would pin memory.
_CACHED_CELLS = 2**24


@dataclass(frozen=True)
class AttenMask:
    """The mask tensor of a kernel call, described without building it.

    - ``causal``: 2048 x 2048, True above the diagonal; sparse modes 2, 3, 4, 7 and 8 read it.
    - ``prefix``: 3072 x 2048, the causal mask over 1024 rows ``[1024 x False, 1024 x True]``;
      sparse mode 6 reads it.
    - ``full``: one entry per cell, of the given `shape`. `regions` are the allowed cells for
      every leading (batch, head) index of `shape`, row-major; None means that nobody has
      looked at the content.

    >>> AttenMask.causal().shape
    (2048, 2048)
    >>> two_by_three = AttenMask.full((2, 3), [Region.of(Slice(0, 2, 0, 3, hi=0))])
    >>> two_by_three.build().int().tolist()
    [[0, 1, 1], [0, 0, 1]]
    """

    kind: MaskKind
    shape: tuple[int, ...]
    regions: tuple[Region, ...] | None = None
    dtype: torch.dtype = torch.bool
    with_call: bool = False
    """Whether the tensor is data of each call, so that the same call serves any cells."""

    def __post_init__(self) -> None:
        if self.kind not in ("causal", "prefix", "full"):
            raise KernelContractError(
                f"AttenMask got kind={self.kind!r}; the kernel reads 'causal', 'prefix' or 'full'"
            )
        if self.kind != "full" or self.regions is None:
            return
        wanted = prod(self.shape[:-2])
        if len(self.regions) != wanted:
            raise KernelContractError(
                f"AttenMask.full got {len(self.regions)} regions for shape {self.shape}, whose "
                f"leading indices need {wanted}; give one region per (batch, head) index"
            )

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # The key of a kept tensor, on the call path; the cells of many tiles are long.
        return hash((self.kind, self.shape, self.regions, self.dtype, self.with_call))

    def __getstate__(self) -> dict[str, object]:
        # Another process hashes strings differently.
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def causal(cls) -> AttenMask:
        """Return the compressed causal mask of modes 2, 3, 4, 7 and 8."""
        return _CAUSAL

    @classmethod
    def prefix(cls) -> AttenMask:
        """Return the compressed prefix mask of mode 6."""
        return _PREFIX

    @classmethod
    def full(
        cls, shape: tuple[int, ...], regions: tuple[Region, ...] | list[Region] | None = None
    ) -> AttenMask:
        """Return a mask with one entry per cell; `regions` are the allowed cells, if known."""
        known = None if regions is None else tuple(regions)
        return cls("full", tuple(int(n) for n in shape), known)

    @classmethod
    def of(cls, tensor: torch.Tensor, *, read: bool = False) -> AttenMask:
        """Describe a tensor.

        With `read`, its content decides whether it is one of the compressed masks; without,
        it is a full mask of unknown content.
        """
        with contract("argument-type"):
            check_tensor("AttenMask.of: tensor", tensor)
        shape = tuple(tensor.shape)
        if read and tensor.dtype in (torch.bool, torch.uint8):
            for known in (_CAUSAL, _PREFIX):
                if shape == known.shape and torch.equal(tensor.bool(), known.build(tensor.device)):
                    return replace(known, dtype=tensor.dtype)
        return cls("full", shape, None, tensor.dtype)

    @property
    def is_opaque(self) -> bool:
        """Whether the content is unknown."""
        return self.kind == "full" and self.regions is None

    @property
    def cells(self) -> int:
        """The number of entries, which is also the number of bytes the kernel reads at most."""
        return prod(self.shape)

    def allowed(self, index: int = 0) -> Region:
        """Return the allowed cells of one leading (batch, head) index, row-major.

        >>> AttenMask.causal().allowed().area == 2048 * 2049 // 2
        True
        """
        if self.kind == "causal":
            return Region.of(Slice(0, COMPRESSED_SIDE, 0, COMPRESSED_SIDE, hi=0))
        if self.kind == "prefix":
            below = Slice(COMPRESSED_SIDE, COMPRESSED_SIDE + PREFIX_SIDE, 0, PREFIX_SIDE)
            return Region.of(Slice(0, COMPRESSED_SIDE, 0, COMPRESSED_SIDE, hi=0), below)
        if self.regions is None:
            raise KernelContractError(
                f"the content of this mask of shape {self.shape} is unknown, so what the call "
                "computes cannot be told; describe it with AttenMask.full(shape, regions)",
                ["mask-content-unknown"],
            )
        return self.regions[index]

    @property
    def per_head(self) -> bool:
        """Whether heads differ."""
        return len(self.shape) == 4 and self.shape[1] > 1

    def plane(self, batch: int, head: int) -> Region:
        """Return the allowed cells of a batch element and head; an axis of 1 serves all of them.

        >>> AttenMask.full((1, 1, 2, 3), [Region.full(2, 3)]).plane(1, 5).area
        6
        """
        if len(self.shape) != 4:
            return self.allowed()
        row = batch if self.shape[0] > 1 else 0
        return self.allowed(row * self.shape[1] + (head if self.per_head else 0))

    def build(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the tensor, True where masked; small ones are built once per device."""
        if self.is_opaque:
            self.allowed()
        if self.kind != "full" or self.cells <= _CACHED_CELLS:
            return _kept(self, torch.device(device))
        return _build(self, torch.device(device))

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        known = ", given with each call" if self.with_call else ", content unknown"
        known = known if self.is_opaque else ""
        return f"{self.kind} mask {sizes}{known}"


_CAUSAL = AttenMask("causal", (COMPRESSED_SIDE, COMPRESSED_SIDE))
_PREFIX = AttenMask("prefix", (COMPRESSED_SIDE + PREFIX_SIDE, COMPRESSED_SIDE))


def _build(mask: AttenMask, device: torch.device) -> torch.Tensor:
    rows, columns = mask.shape[-2:]
    planes = torch.ones(prod(mask.shape[:-2]), rows, columns, dtype=torch.bool, device=device)
    drawn: dict[int, torch.Tensor] = {}  # many tiles of one mask are alike
    for index, plane in enumerate(planes):
        region = mask.allowed(index)
        if id(region) in drawn:
            plane.copy_(drawn[id(region)])
            continue
        for part in region.slices:
            _clear(plane, part)
        if mask.regions is not None:  # others are made anew for each index
            drawn[id(region)] = plane
    return planes.view(mask.shape).to(mask.dtype)


_kept = constant(_build)


def _clear(plane: torch.Tensor, part: Slice) -> None:
    """Unmask the cells of one slice."""
    block = plane[part.i0 : part.i1, part.j0 : part.j1]
    height, width = block.shape
    low, high = (bound + part.i0 - part.j0 for bound in (part.lo, part.hi))
    if low <= 1 - height and high >= width - 1:
        block.fill_(False)
        return
    inside = torch.ones_like(block).tril_(high).triu_(low)
    block.logical_and_(inside.logical_not_())
