"""`Dense`: a bias given as a tensor."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit.arguments import check_bool, check_float_dtype, check_floats
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.pse.base import Pse, Range, check_range

__all__ = ["Dense"]


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Dense(Pse):
    """A bias given as a tensor: ``scale*q.k + tensor``, or ``scale*(q.k + tensor)``.

    Shapes: ``[q_len, kv_len]``, ``[n, q_len, kv_len]`` or ``[1 | b, 1 | n, q_len, kv_len]``
    with the lengths of the score matrix exactly; in a packed batch ``b`` counts sequences.
    Floating dtypes. The tensor itself is kept, not a copy: gradients flow to it, and later
    changes in place are seen.

    Values must be finite when the bias is made: a mask, not -inf, says what is excluded.
    Reading them makes the host wait for an accelerator; ``validate=False`` skips that, for
    a bias that a model computes anew in every step.

    Equality compares content (so it may wait for the device); the hash uses the shape alone.

    Raises `CompositionTypeError` for anything but a floating tensor, `CompositionError` for
    another rank, values that are not finite, and at use for sizes that do not fit.

    >>> import torch
    >>> Dense(torch.zeros(8, 128, 128), before_scale=True)
    Dense(float32[8, 128, 128], before_scale=True)
    >>> Dense(torch.tensor([[0.0, -torch.inf]]))
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionError: pse.Dense(float32[1, 2]) holds NaN or infinite values; a \
bias is finite: say what is excluded with a mask, such as masks.Dense.keep(tensor.isfinite())
    """

    tensor: Tensor
    _before_scale: bool

    def __init__(
        self, tensor: Tensor, before_scale: bool = False, *, validate: bool = True
    ) -> None:
        if not isinstance(tensor, Tensor):
            raise CompositionTypeError(
                f"pse.Dense takes a tensor of biases, not {type(tensor).__name__}"
            )
        check_bool("pse.Dense: before_scale", before_scale)
        check_floats("pse.Dense", tensor)
        object.__setattr__(self, "tensor", tensor)
        object.__setattr__(self, "_before_scale", before_scale)
        if tensor.ndim not in (2, 3, 4):
            raise CompositionError(
                f"pse.{self}: give [q_len, kv_len], [n, q_len, kv_len] or "
                "[1 or b, 1 or n, q_len, kv_len]"
            )
        if validate:
            self._check_values()

    @property
    def before_scale(self) -> bool:
        """Whether it is added before the scores are scaled."""
        return self._before_scale

    @property
    def heads(self) -> int | None:
        """Its number of heads; None when it has no heads axis, or one of extent 1."""
        shape = self.tensor.shape
        if len(shape) == 2 or (len(shape) == 4 and shape[1] == 1):
            return None
        return shape[-3]

    @property
    def batch(self) -> int | None:
        """Its number of batch elements; None when all of them share the bias."""
        shape = self.tensor.shape
        return shape[0] if len(shape) == 4 and shape[0] != 1 else None

    @property
    def extent(self) -> tuple[int, int]:
        """The lengths of its last two axes."""
        return self.tensor.shape[-2], self.tensor.shape[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensor."""
        return (self.tensor,)

    def check(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> None:
        """Raise `CompositionError` unless the shape is that of the score matrices."""
        super().check(q_len, kv_len, batch, heads)
        if self.extent != (q_len, kv_len):
            raise CompositionError(
                f"pse.{self} is for score matrices of {self.extent[0]} x {self.extent[1]} "
                f"(queries x keys), but this one is {q_len} x {kv_len}; "
                "slice the tensor to these lengths (every sequence of a packed batch is its own "
                "score matrix), or use a bias defined for any length"
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
        for name, given, known in zip(
            ("q_len", "kv_len"), (q_len, kv_len), self.extent, strict=True
        ):
            if given is not None and given != known:
                raise CompositionError(f"pse.{self} cannot be cut as one of {name}={given}")
        check_range("q_range", q_range, self.extent[0])
        check_range("kv_range", kv_range, self.extent[1])
        view = self.tensor[..., slice(*q_range), slice(*kv_range)]
        return Dense(view, self.before_scale, validate=False)

    def key(self) -> Hashable:
        """Return shape, dtype, side of the scale and need of a gradient: values come later."""
        tensor = self.tensor
        return ("Dense", *tensor.shape, tensor.dtype, self.before_scale, tensor.requires_grad)

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
        """Return the tensor with four axes: a view, unless `dtype` asks for a cast.

        Raises `CompositionError` when the tensor lives on another device than `device`.
        """
        self.check(q_len, kv_len, batch, heads)
        if device is not None and not _same_device(self.tensor.device, torch.device(device)):
            raise CompositionError(
                f"pse.{self} is on {self.tensor.device}, the scores are on {device}; move it once, "
                "where the model is built"
            )
        check_float_dtype("dtype", dtype)
        bias = self.tensor[(None,) * (4 - self.tensor.ndim)]
        if batch_index is not None and self.batch is not None:
            bias = bias[batch_index : batch_index + 1]
        return bias.to(dtype)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Dense):
            return NotImplemented
        if self.key() != other.key():
            return False
        if self.tensor is other.tensor:
            return True
        same_device = self.tensor.device == other.tensor.device
        return same_device and not self.tensor.is_meta and torch.equal(self.tensor, other.tensor)

    def __hash__(self) -> int:
        return hash(("Dense", *self.tensor.shape, self.before_scale))

    def __repr__(self) -> str:
        tensor = self.tensor
        dtype = str(tensor.dtype).removeprefix("torch.")
        side = ", before_scale=True" if self.before_scale else ""
        grad = ", requires_grad" if tensor.requires_grad else ""
        return f"Dense({dtype}{list(tensor.shape)}{side}{grad})"

    def _check_values(self) -> None:
        values = self.tensor.detach()
        if values.is_meta or not values.numel():
            return
        # One pass without a temporary; NaN propagates into both ends.
        low, high = torch.stack(torch.aminmax(values)).tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CompositionError(
                f"pse.{self} holds NaN or infinite values; a bias is finite: say what is excluded "
                "with a mask, such as masks.Dense.keep(tensor.isfinite())"
            )


def _same_device(left: torch.device, right: torch.device) -> bool:
    # "cuda" without an index means the current one, which only the tensor can tell.
    return left.type == right.type and (right.index is None or left.index == right.index)
