"""Masks and biases as they come to a layer: sets as they are, tensors read once and split."""

from __future__ import annotations

from torch import Tensor, nn

from attnkit.errors import CompositionError
from attnkit.interop.torch.reading import terms_of
from attnkit.interop.transformers.bias_tensor import BiasTensor
from attnkit.interop.transformers.kept import read_once
from attnkit.interop.transformers.mask_tensor import MaskTensor
from attnkit.interop.transformers.site import Site
from attnkit.interop.transformers.tables import has_table, learn_tables
from attnkit.masks import Dense, Full, Mask
from attnkit.pse import Dense as DenseBias
from attnkit.pse import Pse

__all__ = ["bias_of", "mask_of"]


def mask_of(
    site: Site, given: Tensor | None, query: Tensor, key: Tensor
) -> tuple[Mask | None, Pse | None]:
    """Return the set, and the bias, that the mask of a call is."""
    if given is None:
        return None, None
    q_len, kv_len = query.shape[2], key.shape[2]
    if isinstance(given, MaskTensor) and given.written:
        given = given.cells()
    if isinstance(given, MaskTensor):
        if given.lifted.cells_read:
            site.read[str(given.lifted)] += 1
        if given.shape[2:] == (q_len, kv_len):
            return given.lifted.mask, None
        return _fitted(given, q_len, kv_len), None
    if not isinstance(given, Tensor):
        raise CompositionError(
            f"the attention mask is a {type(given).__name__}; attnkit.interop.transformers takes "
            "its own masks, and tensors that are bool (True is seen) or added to the scores"
        )
    return _of_tensor(site, given, q_len, kv_len)


def _fitted(given: MaskTensor, q_len: int, kv_len: int) -> Mask:
    """Return the mask with the keys that there are; one row serves any number of queries."""
    _, _, rows, keys = given.shape
    mask = given.mask
    if keys < kv_len or rows not in (1, q_len):
        raise CompositionError(
            f"the mask {mask!r} is for {rows} queries and {keys} keys, and the layer has {q_len} "
            f"queries and {kv_len} keys; a mask has as many, or more keys than there are yet"
        )
    if keys > kv_len and not isinstance(mask, Full):
        mask = mask.cut((0, rows), (0, kv_len), q_len=rows, kv_len=keys)
    if rows != q_len:
        mask = Dense.keep(mask.materialize(1, kv_len, mask.batches or 1))
    return mask


def _of_tensor(
    site: Site, given: Tensor, q_len: int, kv_len: int
) -> tuple[Mask | None, Pse | None]:
    """Split a tensor that is added to the scores, or read one of cells."""
    site.read[f"a mask tensor {str(given.dtype).removeprefix('torch.')}{list(given.shape)}"] += 1
    given = given[..., :kv_len]  # a mask may be for more keys than a cache has yet
    if given.dim() not in (2, 3, 4) or given.shape[-1] not in (1, kv_len):
        raise CompositionError(
            f"the attention mask has shape {list(given.shape)}, and the layer has {q_len} queries "
            f"and {kv_len} keys; a mask is [b, n, {q_len}, {kv_len}], with 1 where all are alike"
        )
    if given.dim() == 3:
        given = given[:, None]
    found = terms_of(given, keep=True, kv_len=kv_len)
    return found.mask, found.bias


def bias_of(site: Site, module: nn.Module, given: Tensor | None) -> Pse | None:
    """Return the bias that a model adds to the scores, ``[1 | b, 1 | n, s_q, s_kv]``."""
    if given is None:
        return None
    if isinstance(given, BiasTensor):
        return given.pse
    if has_table(module):
        learn_tables(type(module))  # for the next call: the model was not switched by `enable`
        # Layers without a table of their own make zeros, which are no bias.
        own = getattr(module, "has_relative_attention_bias", True)
        if not own and not read_once(given, "any", lambda: bool(given.detach().any())):
            return None
    site.notes[f"a bias that the model made, {list(given.shape)}"] += 1
    return DenseBias(given, validate=False)
