"""`KeyBias`: a number per key."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit.arguments import check_float_dtype, check_floats
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.pse.base import Pse, Range, check_range
from attnkit.pse.structure import PerKey

__all__ = ["KeyBias"]


@dataclass(frozen=True, init=False, eq=False, repr=False)
class KeyBias(Pse):
    """A bias per key: ``bias[b, h, i, j] = tensor[b, h, j]``, added after the scale.

    Shapes: ``[kv_len]``, ``[n, kv_len]`` or ``[1 | b, 1 | n, kv_len]``; in a packed batch ``b``
    counts sequences, all of the same length. Floating dtypes. The tensor itself is kept:
    gradients flow to it, and they do on the fused kernel too, which computes this bias as an
    additional channel of query and key. Materialises as ``[1 | b, 1 | n, q_len, kv_len]``.

    Keys that nobody may see are a mask's (`masks.Padding`): cells it leaves out cost nothing. A
    number as low as -inf has the same effect, but a query all of whose keys have it gets some
    mean of their values on the fused kernel, not 0.

    Equality compares content, as for `Dense`; the hash uses the shape alone.

    Raises `CompositionTypeError` for anything but a floating tensor, `CompositionError` for
    another rank, and at use for sizes that do not fit.

    Source: the position-independent term ``v . k_j`` of Dai et al., "Transformer-XL" (ACL
    2019), as a free parameter.

    >>> bias = KeyBias(torch.tensor([0.0, 1.0, 2.0]))
    >>> bias
    KeyBias(float32[3])
    >>> bias.materialize(2, 3)
    tensor([[[[0., 1., 2.],
              [0., 1., 2.]]]])
    """

    tensor: Tensor

    def __init__(self, tensor: Tensor) -> None:
        if not isinstance(tensor, Tensor):
            raise CompositionTypeError(
                "pse.KeyBias takes a floating tensor, one number per key, not "
                f"{type(tensor).__name__}"
            )
        check_floats("pse.KeyBias", tensor)
        object.__setattr__(self, "tensor", tensor)
        if tensor.ndim not in (1, 2, 3):
            raise CompositionError(
                f"pse.{self}: give [kv_len], [n, kv_len] or [1 or b, 1 or n, kv_len]; a bias per "
                "cell is pse.Dense"
            )

    @property
    def heads(self) -> int | None:
        """Its number of heads; None when it has no heads axis, or one of extent 1."""
        shape = self.tensor.shape
        if len(shape) == 1 or (len(shape) == 3 and shape[1] == 1):
            return None
        return shape[-2]

    @property
    def batch(self) -> int | None:
        """Its number of batch elements; None when all of them share the bias."""
        shape = self.tensor.shape
        return shape[0] if len(shape) == 3 and shape[0] != 1 else None

    @property
    def extent(self) -> tuple[None, int]:
        """Any number of queries, the keys of its last axis."""
        return None, self.tensor.shape[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensor."""
        return (self.tensor,)

    @property
    def structure(self) -> PerKey:
        """A number per key, for each head or for all of them."""
        return PerKey(per_head=self.heads is not None)

    def check(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> None:
        """Raise `CompositionError` unless there is one number per key."""
        super().check(q_len, kv_len, batch, heads)
        if self.extent[1] != kv_len:
            raise CompositionError(
                f"pse.{self} is for {self.extent[1]} keys, but there are {kv_len}; give one number "
                "per key (every sequence of a packed batch has its own keys)"
            )

    def cut(
        self,
        q_range: Range,
        kv_range: Range,
        *,
        q_len: int | None = None,
        kv_len: int | None = None,
    ) -> Pse:
        """Return the bias of a view of the tensor, through which gradients flow."""
        if kv_len is not None and kv_len != self.extent[1]:
            raise CompositionError(f"pse.{self} cannot be cut as one of kv_len={kv_len}")
        check_range("q_range", q_range, q_range[1] if q_len is None else q_len)
        check_range("kv_range", kv_range, self.extent[1])
        return KeyBias(self.tensor[..., slice(*kv_range)])

    def key(self) -> Hashable:
        """Return shape, dtype and need of a gradient: values come later."""
        tensor = self.tensor
        return ("KeyBias", *tensor.shape, tensor.dtype, tensor.requires_grad)

    def materialize(
        self,
        q_len: int,
        kv_len: int,
        *,
        batch: int | None = None,
        heads: int | None = None,
        batch_index: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Return the tensor, each row the same: a view, unless `dtype` asks for a cast."""
        self.check(q_len, kv_len, batch, heads)
        check_float_dtype("dtype", dtype)
        bias = self.tensor[(None,) * (3 - self.tensor.ndim)]
        if batch_index is not None and self.batch is not None:
            bias = bias[batch_index : batch_index + 1]
        return bias.to(dtype)[:, :, None].expand(-1, -1, q_len, -1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KeyBias):
            return NotImplemented
        if self.key() != other.key():
            return False
        same_device = self.tensor.device == other.tensor.device
        return self.tensor is other.tensor or (
            same_device and not self.tensor.is_meta and torch.equal(self.tensor, other.tensor)
        )

    def __hash__(self) -> int:
        return hash(("KeyBias", *self.tensor.shape))

    def __repr__(self) -> str:
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        grad = ", requires_grad" if self.tensor.requires_grad else ""
        return f"KeyBias({dtype}{list(self.tensor.shape)}{grad})"
