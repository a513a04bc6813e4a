"""What operators allocate: the largest tensor, and the most bytes that lived at a time."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Allocated"]


class Allocated(TorchDispatchMode):
    """Watches what operators give back: `numbers` of the largest, `peak` bytes of all that lives.

    Memory inside of an operator is not seen, and what was there before does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers = self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {self._address(t) for t in (*args, *(kwargs or {}).values())}
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numbers = max(self.numbers, size)
                if self._address(tensor) not in given:
                    self._add(tensor)
        return out

    @staticmethod
    def _address(value: object) -> int:
        return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else 0

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in self._known:
            return
        self._known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size
