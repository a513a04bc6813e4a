"""`Dense`: a bias given as a tensor of its cells."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnkit.arguments import check_bool
from attnkit.pse.base import Rectangle
from attnkit.pse.structure import PerCell
from attnkit.pse.tensor_bias import TensorBias

__all__ = ["Dense"]


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Dense(TensorBias):
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
