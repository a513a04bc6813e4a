"""`Deferred`: a tensor that nobody has computed yet, and the calls of torch that it would be.

Each call is kept as it was written. So whatever is done to a deferred tensor that is no part of
attention computes it by these very calls, and nothing can come out differently.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit.errors import CompositionError
from attnkit.interop.torch.byhand.names import ASKS, writes

__all__ = ["Deferred", "Recorded", "asked", "computed", "deferred"]

_PLAIN = torch._C.DisableTorchFunction


class Recorded:
    """One call of torch that was not made: `name` is its canonical name, `parent` what it is of.

    In `args` and `kwargs` stand records in place of deferred tensors. `stand_in` is a meta tensor
    of its shape and dtype. `real` is the result, once somebody needed it.
    """

    __slots__ = (
        *("args", "autocast", "func", "grad", "kwargs", "name"),
        *("parent", "real", "stand_in", "versions"),
    )

    def __init__(
        self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.name, self.func, self.args, self.kwargs = name, func, args, kwargs
        self.grad = torch.is_grad_enabled()
        self.real: Tensor | None = None
        own = [one for one in (*args, *kwargs.values()) if isinstance(one, Recorded)]
        self.parent = own[0] if own else None
        flat = [t for one in (*args, *kwargs.values()) for t in _flat(one)]
        self.versions = [(t, _version(t)) for t in flat if isinstance(t, Tensor)]
        with _PLAIN():
            known = _known(self)
            self.stand_in = func(*_standing(args), **_standing(kwargs)) if known is None else known
        self.autocast = _autocast(self.device)
        if self.autocast is not None and name not in ("reshape", "permute", "same", "cast"):
            self.stand_in = self.stand_in.to(_autocast_dtype(self))

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that the call reads."""
        return [tensor for tensor, _ in self.versions]

    @property
    def device(self) -> torch.device:
        """Where the result would be."""
        one: Recorded | None = self
        while one is not None:
            for tensor in one.tensors:
                if tensor.ndim or tensor.device.type != "cpu":
                    return tensor.device
            one = one.parent
        return torch.device("cpu")

    @property
    def requires_grad(self) -> bool:
        """Whether the result would."""
        one: Recorded | None = self
        while one is not None:
            if one.grad and any(tensor.requires_grad for tensor in one.tensors):
                return True
            one = one.parent
        return False

    def check(self) -> None:
        """Raise where a tensor was written to after the call was recorded."""
        for tensor, version in self.versions:
            if version is not None and tensor._version != version:
                raise CompositionError(
                    f"attention weights of shape {list(self.stand_in.shape)} are computed when "
                    "somebody looks at them, and a tensor that they follow from, of shape "
                    f"{list(tensor.shape)}, was written to in the meantime; look at them earlier, "
                    "or leave this module out of attnkit.interop.torch.fuse"
                )

    def compute(self) -> Tensor:
        """Make the call, and those that it needs, as they were written."""
        if self.real is None:
            self.check()
            args, kwargs = _real(self.args), _real(self.kwargs)
            kind = self.device.type
            to = self.autocast
            cast = torch.autocast(kind, to) if to else torch.autocast(kind, enabled=False)
            with torch.set_grad_enabled(self.grad), cast, _PLAIN():
                self.real = self.func(*args, **kwargs)
        return self.real


class Deferred(Tensor):
    """A tensor that is computed when somebody needs its numbers; `record` is the call it is."""

    record: Recorded
    told: Callable[[str], None]
    kin: list[Any]

    @staticmethod
    def __new__(cls, record: Recorded, told: Callable[[str], None]) -> Deferred:
        """Make one; `told` is called with a sentence when it had to be computed."""
        like = record.stand_in
        made: Deferred = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=record.device
        )
        made.record, made.told = record, told
        made.kin = [weakref.ref(made)]
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer what is known, and compute it for everything else."""
        if func in ASKS:
            return asked(func, args, kwargs or {})
        return computed(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute it, unless its gradient would be lost below autograd."""
        one = next(t for t in _flat((args, kwargs)) if isinstance(t, Deferred))
        value = one.record.compute()
        if value.requires_grad:
            raise CompositionError(
                f"{func} reads attention scores of shape {list(one.shape)} that are not computed "
                "yet from inside of a torch.autograd.Function, where their gradient would be lost; "
                "leave the module out of attnkit.interop.torch.fuse (classes=)"
            )
        return func(*_plain(args), **_plain(kwargs or {}))

    def __deepcopy__(self, memo: object) -> Tensor:
        return self.record.compute().detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.record.compute().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return repr(self.record.compute())


def deferred(
    name: str,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    told: Callable[[str], None],
) -> Deferred:
    """Return the result of a call that is not made."""
    return Deferred(Recorded(name, func, _records(args), _records(kwargs)), told)


def asked(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer a question that nobody has to compute the tensor for."""
    if func == _REQUIRES_GRAD:
        return args[0].record.requires_grad
    with _PLAIN():
        return func(*args, **kwargs)


_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


def computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a call that needs the numbers of deferred tensors."""
    for one in _flat((args, kwargs)):
        if isinstance(one, Deferred) and one.record.real is None:
            one.told(getattr(func, "__name__", str(func)))
    with _PLAIN():
        found = func(*_plain(args), **_plain(kwargs))
    # What writes to its first argument and returns it returns the deferred tensor itself.
    first = args[0] if args else None
    return first if isinstance(first, Deferred) and writes(func) else found


def _known(record: Recorded) -> Tensor | None:
    """Return the stand-in of a call that changes neither shape nor dtype; meta takes its time."""
    parent, args = record.parent, record.args
    if parent is None or record.kwargs.get("dtype") is not None:
        return None
    like = parent.stand_in
    if record.name in ("add", "sub", "mul", "div", "masked_fill"):
        if len(args) < 2 or args[0] is not parent:
            return None
        other = args[1]
        if isinstance(other, Tensor) and record.name != "masked_fill":
            if torch.result_type(like, other) != like.dtype:
                return None
        elif not isinstance(other, int | float | Tensor):
            return None
        shape = other.shape if isinstance(other, Tensor) else ()
        own = like.shape[len(like.shape) - len(shape) :]
        fits = len(shape) <= like.ndim and all(n in (1, m) for n, m in zip(shape, own, strict=True))
        return like if fits else None
    if record.name == "softmax" and len(args) < 3:
        return like
    return like if record.name in ("dropout", "tanh", "nan_to_num", "neg") else None


def _records(value: Any) -> Any:
    return _mapped(value, lambda one: one.record if isinstance(one, Deferred) else one)


def _plain(value: Any) -> Any:
    return _mapped(value, lambda one: one.record.compute() if isinstance(one, Deferred) else one)


def _real(value: Any) -> Any:
    return _mapped(value, lambda one: one.compute() if isinstance(one, Recorded) else one)


def _standing(value: Any) -> Any:
    """Return arguments with meta tensors in place of tensors."""

    def stand(one: Any) -> Any:
        if isinstance(one, Recorded):
            return one.stand_in
        if isinstance(one, Tensor):
            # A number in a tensor has a say in no dtype, on meta too.
            return torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta")
        return one

    return _mapped(value, stand)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, tuple | list):
        made = [_mapped(one, change) for one in value]
        # A shape is given as it is.
        return made if isinstance(value, list) else tuple(made)
    if isinstance(value, dict):
        return {key: _mapped(one, change) for key, one in value.items()}
    return change(value)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [leaf for one in value for leaf in _flat(one)]
    if isinstance(value, dict):
        return [leaf for one in value.values() for leaf in _flat(one)]
    return [value]


def _version(tensor: Tensor) -> int | None:
    # Inference tensors count no writes.
    return None if tensor.is_inference() else tensor._version


def _autocast(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast casts to, where it is on."""
    kind = device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def _autocast_dtype(record: Recorded) -> torch.dtype:
    """Return the dtype that a call has under autocast: that of the call on single numbers."""
    if record.name == "einsum":  # a product, that knows its axes
        args: Any = ("i,i->i", *(_single(one, record.device, 1) for one in record.args[1:]))
    else:
        args = _single(record.args, record.device)
    with _PLAIN(), torch.no_grad():
        found = record.func(*args, **_single(record.kwargs, record.device))
    return found.dtype  # type: ignore[no-any-return]


def _single(value: Any, device: torch.device, ndim: int | None = None) -> Any:
    def single(one: Any) -> Any:
        like = one.stand_in if isinstance(one, Recorded) else one
        if not isinstance(like, Tensor):
            return one
        axes = like.ndim if ndim is None else ndim
        return torch.zeros((1,) * axes, dtype=like.dtype, device=device)

    return _mapped(value, single)
