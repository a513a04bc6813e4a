"""`Watch`: while it is on, a product of activations waits to see whether it becomes attention."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnkit.attend import Asked, plan_again
from attnkit.backends import Operands, run_plan
from attnkit.errors import AttnkitError
from attnkit.interop.torch.byhand.axes import NotAttention
from attnkit.interop.torch.byhand.calls import Call, call_of
from attnkit.interop.torch.byhand.names import (
    ASKS,
    CONTINUES,
    COPIES,
    OUT_OF_PLACE,
    PRODUCTS,
    SIZED,
    canonical,
    writes,
)
from attnkit.interop.torch.byhand.products import product_of
from attnkit.interop.torch.byhand.reading import read
from attnkit.interop.torch.byhand.records import Deferred, Recorded, asked, computed, deferred
from attnkit.interop.torch.reading import terms_of
from attnkit.interop.torch.sdpa import scaled_dot_product_attention
from attnkit.kept_plans import KeptPlans, Ran
from attnkit.planner import Plan
from attnkit.pse.additive import Additive, split_additive

__all__ = ["Spot", "Watch"]

_MOST_KINDS = 8


class Spot:
    """What is known of one module whose attention is written by hand: plans, calls, reasons.

    `fused` counts calls of attnkit; `left` why attention was computed as it is written. It
    belongs to the module, and neither pickles nor deep-copies what it holds.
    """

    __slots__ = ("_plans", "forwards", "fused", "left")

    def __init__(self) -> None:
        self._plans: dict[Hashable, KeptPlans] = {}
        self.forwards = self.fused = 0
        self.left: Counter[str] = Counter()

    def __deepcopy__(self, memo: object) -> Spot:
        return Spot()

    def __reduce__(self) -> tuple[type[Spot], tuple[()]]:
        return Spot, ()

    def plan(self, call: Call) -> Plan:
        """Return the plan of a call, which is kept here."""
        asked = Asked(
            (None, call.mask),
            (None, call.bias),
            "BNSD",
            call.scale,
            call.dropout,
            call.softcap,
        )
        tensors = call.query, call.key, call.value
        return plan_again(self._kept(call), asked, *tensors, None, None)

    def run(self, plan: Plan, call: Call) -> Tensor:
        """Make a call."""
        self.fused += 1
        self._kept(call).count(plan)
        return run_plan(plan, Operands(call.query, call.key, call.value, call.bias)).output

    def ran(self) -> Iterator[Ran]:
        """Yield the plans that are kept, and how often each ran."""
        for plans in self._plans.values():
            yield from plans.ran()

    def _kept(self, call: Call) -> KeptPlans:
        """Return the plans of calls with such numbers."""
        numbers = call.scale, call.softcap, call.dropout
        if numbers not in self._plans:
            if len(self._plans) >= _MOST_KINDS:
                self._plans.pop(next(iter(self._plans)))
            self._plans[numbers] = KeptPlans()
        return self._plans[numbers]


class Watch(TorchFunctionMode):
    """Records products of activations and what is done to them; computes attention as one call.

    What is no attention in the end is computed by the very calls that were recorded.
    """

    def __init__(self, spot: Spot) -> None:
        super().__init__()
        self.spot = spot
        self._pending: list[weakref.ref[Deferred]] = []
        self._numbers: dict[int, tuple[Tensor, float]] = {}

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See one call of torch."""
        kwargs = kwargs or {}
        if func is torch.einsum and len(args) == 2 and isinstance(args[1], list | tuple):
            args = (args[0], *args[1])
            types = {type(one) for one in args}
        if Deferred not in types:
            return self._plain(func, args, kwargs)
        if func in ASKS:
            return asked(func, args, kwargs)
        if func in SIZED and not isinstance(args[0], Deferred):
            with torch._C.DisableTorchFunction():
                return func(args[0], args[1].record.stand_in)
        name = canonical(func)
        if name == "sdpa":
            return self._sdpa(func, *_known(args, kwargs))
        if name in PRODUCTS:
            return self._product(name, func, args, kwargs)
        if name in CONTINUES and _waits(args, kwargs):
            found = self._continued(name, func, args, kwargs)
            if found is not None:
                return found
        if writes(func):
            self._settle()
        return computed(func, args, kwargs)

    # -- calls without deferred tensors --------------------------------------------------

    def _plain(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = canonical(func)
        if name in _STARTS and _begins(name, args, kwargs):
            try:
                return self._deferred(name, func, args, kwargs)
            except (RuntimeError, TypeError, NotImplementedError):
                return func(*args, **kwargs)  # what is wrong with it, torch says itself
        if name == "sdpa":
            return self._sdpa(func, args, kwargs)
        if self._pending and (writes(func) or "out" in kwargs):
            self._settle(args[0] if args and "out" not in kwargs else None)
        found = func(*args, **kwargs)
        if func is torch.tensor and args and isinstance(args[0], int | float):
            self._numbers[id(found)] = (found, float(args[0]))
        return found

    def _sdpa(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Compute a call of torch's own attention."""
        try:
            with torch._C.DisableTorchFunction():
                found = scaled_dot_product_attention(*args, **kwargs)
        except AttnkitError as reason:
            self.spot.left[str(reason)] += 1
            return func(*args, **kwargs)  # type: ignore[no-any-return]
        self.spot.fused += 1
        return found

    def _deferred(
        self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Deferred:
        made = deferred(name, func, args, kwargs, self._told)
        self._pending.append(weakref.ref(made))
        return made

    def _told(self, why: str) -> None:
        self.spot.left[f"{why} needs the numbers"] += 1

    # -- calls with them -----------------------------------------------------------------

    def _continued(
        self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Recorded a call; None where it cannot be."""
        first = args[0] if args else None
        in_place = writes(func) or kwargs.get("inplace") is True
        if in_place:
            if not isinstance(first, Deferred) or self._kin_lives(first):
                return None
            func = OUT_OF_PLACE.get(func, func)
            kwargs = {k: v for k, v in kwargs.items() if k != "inplace"}
        if name in ("add", "sub", "mul") and len(args) == 2 and isinstance(first, Deferred):
            other = args[1]
            if isinstance(other, Deferred) and other.ndim and other.shape[-1] != 1:
                args = (first, other.record.compute())
        try:
            made = deferred(name, func, args, kwargs, self._told)
        except (RuntimeError, TypeError, NotImplementedError, IndexError, AttributeError):
            return None  # what is wrong with it, torch says itself
        if in_place and isinstance(first, Deferred):
            if made.dtype != first.dtype or made.shape != first.shape:
                return None
            first.record = made.record
            return first
        if not isinstance(first, Deferred):
            pass
        elif name in ("cast", "same") and func not in COPIES and _is_same(made, first):
            return first  # as torch does
        elif name in ("reshape", "permute"):
            made.kin = first.kin
            made.kin.append(weakref.ref(made))
        self._pending.append(weakref.ref(made))
        return made

    def _kin_lives(self, one: Deferred) -> bool:
        """Whether a view of the same numbers is in somebody's hands, who would see them change."""
        return any(kin() is not None and kin() is not one for kin in one.kin)

    def _product(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a product of weights and values as one call, if it is attention."""
        try:
            call = self._call(name, args, kwargs)
            plan = self.spot.plan(call)
        except (NotAttention, AttnkitError) as reason:
            self.spot.left[str(reason)] += 1
            return _quietly(func, args, kwargs)
        with torch._C.DisableTorchFunction():
            found = call.finish(self.spot.run(plan, call)).to(call.dtype)
            # Its gradient needs it as it is, and a product's does not: one may write to that.
            return found.clone() if found.requires_grad else found

    def _call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        product, first, second = product_of(name, args, kwargs)
        weights, value = (first, second) if isinstance(first, Deferred) else (second, first)
        if isinstance(value, Deferred):
            raise NotAttention("a product of two deferred tensors")
        if name == "baddbmm" or weights.record.real is not None:
            raise NotAttention("the weights were computed before they met the values")
        if torch.is_autocast_enabled(value.device.type) and value.dtype != torch.float64:
            value = value.to(torch.get_autocast_dtype(value.device.type))
        elif weights.dtype != value.dtype:
            raise NotAttention("weights and values differ in dtype")
        with torch._C.DisableTorchFunction():
            reading = read(weights.record, self._number)
            return call_of(reading, product, weights is first, value, _read_mask)

    def _number(self, tensor: Tensor) -> float | None:
        """Return the number that a tensor is, where the host knows it."""
        if (
            tensor.ndim
            or tensor.requires_grad
            or not (tensor.is_floating_point() or tensor.dtype == torch.int64)
        ):
            return None
        known = self._numbers.get(id(tensor))
        if known is not None:
            return known[1]
        return float(tensor) if tensor.device.type == "cpu" else None

    def _settle(self, written: Tensor | None = None) -> None:
        """Compute what waits before something that it follows from is written to."""
        alive = [one for one in (ref() for ref in self._pending) if one is not None]
        self._pending = [weakref.ref(one) for one in alive]
        for one in alive:
            if one.record.real is None and _follows(one, written):
                self._told("a write")
                one.record.compute()


_STARTS = PRODUCTS - {"sdpa"}


def _known(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments with deferred tensors computed."""

    def known(one: Any) -> Any:
        return one.record.compute() if isinstance(one, Deferred) else one

    return tuple(known(one) for one in args), {name: known(one) for name, one in kwargs.items()}


def _is_same(made: Deferred, first: Deferred) -> bool:
    return (made.dtype, made.stride()) == (first.dtype, first.stride())


def _waits(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return all(
        one.record.real is None for one in (*args, *kwargs.values()) if isinstance(one, Deferred)
    )


def _begins(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a product may be one of queries and keys: of two batches of matrices."""
    try:
        product, first, second = product_of(name, args, kwargs)
    except (NotAttention, AttributeError, IndexError, KeyError):
        return False
    for one in (first, second):
        if not isinstance(one, Tensor) or isinstance(one, nn.Parameter):
            return False
        if one.ndim < 3 or not one.is_floating_point() or one.is_nested:
            return False
    summed = len(product.summed) == 1
    return (
        summed and bool(product.free(0)) and bool(product.free(1)) and first.dtype == second.dtype
    )


def _follows(one: Deferred, written: Tensor | None) -> bool:
    """Whether a deferred tensor follows from the memory of another."""
    if type(written) is not Tensor:
        return True
    record: Recorded | None = one.record
    while record is not None:
        if any(type(t) is not Tensor or _memory(t) == _memory(written) for t in record.tensors):
            return True
        record = record.parent
    return False


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _quietly(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute, where the reason was told already."""
    for one in (*args, *kwargs.values()):
        if isinstance(one, Deferred):
            one.record.compute()
    return computed(func, args, kwargs)


def _read_mask(tensor: Tensor, keep: bool | None, keys: int) -> Additive:
    """Read a mask or what is added; masks, which all layers share, once."""
    if keep is None and tensor.shape[1] > 1:  # of each head: a bias, and new in each layer
        return split_additive(tensor, kv_len=keys)
    return terms_of(tensor, keep=bool(keep), kv_len=keys)
