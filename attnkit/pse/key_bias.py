"""`KeyBias`: a number per key."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnkit.pse.base import Rectangle
from attnkit.pse.structure import PerKey
from attnkit.pse.tensor_bias import TensorBias

__all__ = ["KeyBias"]


@dataclass(frozen=True, init=False, eq=False, repr=False)
class KeyBias(TensorBias):
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
