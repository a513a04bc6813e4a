"""`MaskTensor`: a mask as a set, in the form in which models pass masks around."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnkit.errors import CompositionError
from attnkit.interop.transformers.site import calling_module, site_of
from attnkit.masks import Full, Lifted, Mask

__all__ = ["MaskTensor"]

_aten = torch.ops.aten


class MaskTensor(Tensor):
    """Looks like the float mask ``[b, 1, s_q, s_kv]`` of eager attention, and holds no cell of it.

    Models take masks apart, move and copy them, and hand them to `torch.utils.checkpoint`: so it
    is a tensor. `lifted.mask` is the set. Copies and views of everything keep it, slices cut it,
    and for whatever else it makes the cells: 0, and the dtype's least number where masked. That is
    counted at the module whose code asked for them, and told in its report.
    """

    lifted: Lifted
    _dense: Tensor | None
    _views: list[Tensor]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        lifted: Lifted,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> MaskTensor:
        """Make one of a mask of ``shape[2] x shape[3]`` cells."""
        made: MaskTensor = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=torch.device(device or "cpu")
        )
        made.lifted, made._dense, made._views = lifted, None, []
        return made

    @property
    def mask(self) -> Mask:
        """The set."""
        return self.lifted.mask

    @property
    def written(self) -> bool:
        """Whether somebody wrote to its cells, so that they are no longer those of the set."""
        # Tensors of inference mode do not count what is written to them.
        return any(view.is_inference() or view._version > 0 for view in self._views)

    def cells(self) -> Tensor:
        """Return a plain tensor of it: 0 where allowed, else the dtype's least number."""
        if self._dense is None:
            batch, heads, q_len, kv_len = self.shape
            kept = self.mask.materialize(q_len, kv_len, batch, heads, self.device)
            least = torch.finfo(self.dtype).min
            zeros = torch.zeros((), dtype=self.dtype, device=self.device)
            self._dense = torch.where(kept, zeros, least)
        return self._dense

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        symbolic = _SYMBOLIC.get(func)
        if symbolic is not None and isinstance(args[0], MaskTensor) and not args[0].written:
            found = symbolic(*args, **kwargs)
            if found is not None:
                return found
        if func._schema.is_mutable:
            raise CompositionError(
                f"{func} writes to a mask that attnkit.interop.transformers made, which is a set "
                "and holds no cells; write to mask + 0, or give the model a mask of your own"
            )
        module = calling_module()
        if module is not None:
            site_of(module).dense[str(func)] += 1
        found = func(*_plain(args), **_plain(kwargs))
        if func._schema.returns and func._schema.returns[0].alias_info is not None:
            args[0]._views += found if isinstance(found, list | tuple) else [found]
        return found

    def __deepcopy__(self, memo: object) -> MaskTensor:
        return self._like()

    def __reduce_ex__(self, protocol: object) -> Any:
        return MaskTensor, (self.lifted, tuple(self.shape), self.dtype, str(self.device))

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"MaskTensor({list(self.shape)}, {self.mask!r})"

    def _like(
        self,
        shape: Sequence[int] | None = None,
        mask: Mask | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> MaskTensor:
        lifted = self.lifted
        if mask is not None:
            lifted = Lifted(mask, lifted.source, lifted.parts, lifted.cells_read)
        place = self.device if device is None else device
        return MaskTensor(lifted, shape or self.shape, dtype or self.dtype, place)


def _plain(value: Any) -> Any:
    if isinstance(value, MaskTensor):
        return value.cells()
    if isinstance(value, tuple | list):
        return type(value)(_plain(one) for one in value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value


def _same(mask: MaskTensor, *_: object, **__: object) -> MaskTensor:
    return mask._like()


def _to_copy(mask: MaskTensor, **given: Any) -> MaskTensor | None:
    dtype = given.get("dtype") or mask.dtype
    if not dtype.is_floating_point:  # 0 where allowed is False: the model means the numbers
        return None
    return mask._like(dtype=dtype, device=given.get("device"))


def _slice(
    mask: MaskTensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> MaskTensor | None:
    """Cut rows or keys symbolically; batch elements where they are alike."""
    at, shape = dim % 4, list(mask.shape)
    a, b, each = slice(start, end, step).indices(shape[at])
    a, b = a, max(a, b)
    if (a, b) == (0, shape[at]) and each == 1:
        return mask._like()
    if each != 1 or (at == 0 and mask.mask.batches is not None) or at == 1:
        return None
    q_len, kv_len = shape[2:]
    shape[at] = b - a
    rows, keys = (a, b) if at == 2 else (0, q_len), (a, b) if at == 3 else (0, kv_len)
    if at == 0 or isinstance(mask.mask, Full):
        return mask._like(shape)
    return mask._like(shape, mask.mask.cut(rows, keys, q_len=q_len, kv_len=kv_len))


def _expand(mask: MaskTensor, sizes: Sequence[int], **_: object) -> MaskTensor | None:
    """Serve more batch elements or heads."""
    want = [own if n == -1 else n for n, own in zip(sizes, mask.shape, strict=False)]
    if len(sizes) != 4 or want[2:] != list(mask.shape[2:]):
        return None
    return mask._like(want)


_SYMBOLIC: dict[Any, Callable[..., MaskTensor | None]] = {
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.clone.default: _same,
    _aten.lift_fresh.default: _same,
    _aten._to_copy.default: _to_copy,
    _aten.slice.Tensor: _slice,
    _aten.expand.default: _expand,
}
