"""What a mask tensor says, read once: a set of cells, and what is added to their scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import set_eval_frame
from torch.utils.weak import WeakIdRef

from attnkit.constants import Store
from attnkit.eager import MASK_IN_GRAPH, untraced
from attnkit.masks import Lifted, from_torch
from attnkit.masks.foreign.torch import collapsed
from attnkit.pse import KeyBias, split_additive
from attnkit.pse.additive import Additive
from attnkit.pse.tensors import Dense

__all__ = ["terms_of"]

_READ = Store(most=16, bytes=1 << 28)


@untraced(MASK_IN_GRAPH)
def terms_of(tensor: Tensor, *, keep: bool, kv_len: int | None = None) -> Additive:
    """Return the set and the bias that a mask tensor is.

    A bool tensor is a set, and `keep` says whether True is allowed; a float tensor is added to
    the scores. Shapes are those of `masks.from_torch`. Reading waits for a device, so the same
    tensor, or the same view of one, is not read again until it is written to; writes that torch
    does not count (through ``.data`` or numpy) are not seen. A tensor of inference mode, where no
    writes are counted, is compared with what it was. One that trains is split anew every time,
    for its gradient.

    >>> import torch
    >>> causal = torch.ones(4, 4).tril().bool()
    >>> terms_of(causal, keep=True), terms_of(causal, keep=True) is terms_of(causal, keep=True)
    (Additive(mask=Causal(), bias=None), True)
    """
    lifted = getattr(tensor, "lifted", None)
    if isinstance(lifted, Lifted):  # a set in a tensor's clothes, of another adapter
        return Additive(lifted.mask, None)
    outer = set_eval_frame(None)  # no graph begins within, after one has broken off here
    try:
        return _terms(tensor, keep, kv_len)
    finally:
        set_eval_frame(outer)


def _terms(tensor: Tensor, keep: bool, kv_len: int | None) -> Additive:
    if tensor.requires_grad or torch._C._len_torch_dispatch_stack() or type(tensor) is not Tensor:
        return _read(tensor, keep, kv_len)
    place = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    if tensor.is_inference():  # these count no writes, and views of one do not know each other
        known = tensor.data_ptr(), tensor.device, place, keep, kv_len
        return _READ.get(known, _Copied, tensor, keep, kv_len).terms(tensor)
    # A model that unsqueezes its mask in each layer makes many views of one tensor.
    owner = tensor if tensor._base is None else tensor._base
    return _READ.get(
        (WeakIdRef(owner), owner._version, place, keep, kv_len), _kept, tensor, keep, kv_len
    )


class _Copied:
    """What was read at a place in memory, and a copy of what stood there."""

    def __init__(self, tensor: Tensor, keep: bool, kv_len: int | None) -> None:
        self._how = keep, kv_len
        self._read(tensor)

    def _read(self, tensor: Tensor) -> None:
        self._copy, self._terms = collapsed(tensor).clone(), _kept(tensor, *self._how)

    def terms(self, tensor: Tensor) -> Additive:
        """Return what a tensor that stands there says: to compare is less than to read."""
        if not torch.equal(self._copy, collapsed(tensor)):
            self._read(tensor)
        return self._terms


def _read(tensor: Tensor, keep: bool, kv_len: int | None) -> Additive:
    if tensor.dtype == torch.bool:
        return Additive(from_torch(tensor, keep=keep).mask, None)
    return split_additive(tensor, kv_len=kv_len)


def _kept(tensor: Tensor, keep: bool, kv_len: int | None) -> Additive:
    """Return what was read without the tensor itself: kept, it would never go."""
    mask, bias = _read(tensor, keep, kv_len)
    if isinstance(bias, KeyBias):
        bias = KeyBias(bias.tensor.clone(), validate=False)
    elif isinstance(bias, Dense):
        bias = Dense(bias.tensor.clone(), validate=False)
    return Additive(mask, bias)
