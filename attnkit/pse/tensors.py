"""Biases that are a tensor: `Dense`, a number per cell, and `KeyBias`, a number per key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnkit.arguments import check_bool, check_floats
from attnkit.errors import CompositionError
from attnkit.pse.base import Pse, Rectangle
from attnkit.pse.structure import PerCell, PerKey

__all__ = ["Dense", "KeyBias"]


class _TensorBias(Pse):
    """A tensor of some last `axes`, alone, after ``n``, or after ``[1 | b, 1 | n]``."""

    tensor: Tensor
    axes: ClassVar[tuple[str, ...]]

    def _hold(self, tensor: Tensor, remedy: str = "") -> None:
        """Keep a tensor, if it has the axes of a bias."""
        name, last = f"pse.{type(self).__name__}", ", ".join(self.axes)
        check_floats(name, tensor)
        object.__setattr__(self, "tensor", tensor)
        if tensor.ndim - len(self.axes) not in (0, 1, 2):
            raise CompositionError(
                f"pse.{self}: give [{last}], [n, {last}] or [1 or b, 1 or n, {last}]{remedy}"
            )

    def _check_values(self, told: str, infinite: bool = False) -> None:
        """Raise `CompositionError` for NaN, and for infinite values unless told otherwise."""
        values = self.tensor.detach()
        traced = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
        if traced or values.is_meta or not values.numel():
            return  # there is nothing to read yet
        # One pass without a temporary; NaN propagates into both ends.
        low, high = torch.stack(torch.aminmax(values)).tolist()
        finite = math.isfinite(low) and math.isfinite(high)
        if math.isnan(low) or not (infinite or finite):
            raise CompositionError(f"pse.{self} holds {told}")

    @property
    def _leading(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape[: -len(self.axes)])

    @property
    def heads(self) -> int | None:
        """Its number of heads; None when it has no heads axis, or one of extent 1."""
        lead = self._leading
        return None if not lead or lead == (lead[0], 1) else lead[-1]

    @property
    def batch(self) -> int | None:
        """Its number of batch elements; None when all of them share the bias."""
        lead = self._leading
        return lead[0] if len(lead) == 2 and lead[0] != 1 else None

    @property
    def anchored(self) -> bool:
        """False: an entry is where it is, whatever the lengths."""
        return False

    def _values(self, at: Rectangle, dtype: torch.dtype, device: torch.device | None) -> Tensor:
        """Return a view: of the rows too, where they have an axis."""
        keys = slice(*at.keys)
        if len(self.axes) == 1:
            return self.tensor[..., None, keys]
        return self.tensor[..., slice(*at.rows), keys]

    def __repr__(self) -> str:
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        side = ", before_scale=True" if self.before_scale else ""
        grad = ", requires_grad" if self.tensor.requires_grad else ""
        return f"{type(self).__name__}({dtype}{list(self.tensor.shape)}{side}{grad})"


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Dense(_TensorBias):
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

    axes = ("q_len", "kv_len")
    tensor: Tensor
    _before_scale: bool

    def __init__(
        self, tensor: Tensor, before_scale: bool = False, *, validate: bool = True
    ) -> None:
        check_bool("pse.Dense: before_scale", before_scale)
        object.__setattr__(self, "_before_scale", before_scale)
        self._hold(tensor)
        if validate:
            self._check_values(
                "NaN or infinite values; a bias is finite: say what is excluded with a mask, such "
                "as masks.Dense.keep(tensor.isfinite())"
            )

    @property
    def before_scale(self) -> bool:
        """Whether it is added before the scores are scaled."""
        return self._before_scale

    @property
    def structure(self) -> PerCell:
        """The tensor itself."""
        return PerCell()

    @property
    def extent(self) -> tuple[int, int]:
        """The lengths of its last two axes."""
        return self.tensor.shape[-2], self.tensor.shape[-1]

    def _bias_of(self, at: Rectangle) -> Dense:
        """Return the bias of a view of the tensor, through which gradients flow."""
        view = self.tensor[..., slice(*at.rows), slice(*at.keys)]
        return Dense(view, self.before_scale, validate=False)


@dataclass(frozen=True, init=False, eq=False, repr=False)
class KeyBias(_TensorBias):
    """A bias per key: ``bias[b, h, i, j] = tensor[b, h, j]``, added after the scale.

    Shapes: ``[kv_len]``, ``[n, kv_len]`` or ``[1 | b, 1 | n, kv_len]``; in a packed batch ``b``
    counts sequences, all of the same length. Floating dtypes. The tensor itself is kept:
    gradients flow to it, and they do on the fused kernel too, which computes this bias as an
    additional channel of query and key. Materialises as ``[1 | b, 1 | n, q_len, kv_len]``.

    Keys that nobody may see are a mask's (`masks.Padding`): cells it leaves out cost nothing. A
    number as low as -inf has the same effect, but a query all of whose keys have it gets some
    mean of their values on the fused kernel, not 0. NaN is refused when the bias is made;
    ``validate=False`` does not look, as for `Dense`.

    Equality compares content, as for `Dense`; the hash uses the shape alone.

    Raises `CompositionTypeError` for anything but a floating tensor, `CompositionError` for
    another rank, for NaN, and at use for sizes that do not fit.

    Source: the position-independent term ``v . k_j`` of Dai et al., "Transformer-XL" (ACL
    2019), as a free parameter.

    >>> import torch
    >>> bias = KeyBias(torch.tensor([0.0, 1.0, 2.0]))
    >>> bias
    KeyBias(float32[3])
    >>> bias.materialize(2, 3)
    tensor([[[[0., 1., 2.],
              [0., 1., 2.]]]])
    """

    axes = ("kv_len",)
    tensor: Tensor

    def __init__(self, tensor: Tensor, *, validate: bool = True) -> None:
        self._hold(tensor, "; a bias per cell is pse.Dense")
        if validate:
            self._check_values(
                "NaN; a bias per key is a number: 0 for a key without one, and a mask, such as "
                "masks.Padding, for keys that nobody may see",
                infinite=True,
            )

    @property
    def structure(self) -> PerKey:
        """A number per key, for each head or for all of them."""
        return PerKey(per_head=self.heads is not None)

    @property
    def extent(self) -> tuple[None, int]:
        """Any number of queries, the keys of its last axis."""
        return None, self.tensor.shape[-1]

    def _bias_of(self, at: Rectangle) -> KeyBias:
        """Return the bias of a view of the tensor, through which gradients flow."""
        return KeyBias(self.tensor[..., slice(*at.keys)], validate=False)
