"""`routed` and `install`: calls of torch's attention in code that one cannot edit."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from types import TracebackType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnkit.arguments import check_choice
from attnkit.attend import is_tracing
from attnkit.display import Told
from attnkit.errors import AttnkitError, CompositionError
from attnkit.interop.torch.sdpa import scaled_dot_product_attention

__all__ = ["Calls", "Installed", "install", "routed"]

_TORCHS: Callable[..., Tensor] = F.scaled_dot_product_attention
_PLACES = (F, torch._C._nn)  # who looks the name up there finds another function
_NAME = "scaled_dot_product_attention"

Otherwise = Literal["raise", "torch"]
_OTHERWISE = {"raise": "attnkit's error is raised", "torch": "torch computes the call"}


@dataclass
class Calls(Told):
    """What became of the calls of torch's `scaled_dot_product_attention`.

    `routed` counts those that attnkit computed, `left` those that torch did, by the reason.

    >>> print(Calls(12))
    12 calls of scaled_dot_product_attention by attnkit, 0 by torch
    """

    routed: int = 0
    left: Counter[str] = field(default_factory=Counter)
    otherwise: Otherwise = field(default="raise", repr=False)
    _own: threading.local = field(default_factory=threading.local, repr=False, compare=False)

    def __str__(self) -> str:
        head = f"{self.routed} calls of {_NAME} by attnkit, {self.left.total()} by torch"
        return "\n".join([head, *(f"  {count} x {why}" for why, count in self.left.items())])

    def __call__(self, *args: Any, **named: Any) -> Tensor:
        """Compute a call; what its arguments are is checked there."""
        if is_tracing():
            return scaled_dot_product_attention(*args, **named)
        if getattr(self._own, "within", False):  # a backend of ours asks torch
            return _TORCHS(*args, **named)
        self._own.within = True
        self.routed += 1  # now: a checkpoint leaves from within, once it has all it wants
        try:
            return scaled_dot_product_attention(*args, **named)
        except AttnkitError as error:
            self.routed -= 1
            if self.otherwise == "raise":
                raise
            self.left[str(error)] += 1
            return _TORCHS(*args, **named)
        finally:
            self._own.within = False


class _Routing(TorchFunctionMode):
    """Sees calls of torch's function by whatever name; its own thread's, outside of graphs."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute calls of attention, and hand on all others."""
        return (self.calls if func is _TORCHS else func)(*args, **(kwargs or {}))


@contextmanager
def routed(*, otherwise: Otherwise = "raise") -> Iterator[Calls]:
    """Compute every `scaled_dot_product_attention` inside by attnkit, and count.

    For models whose code stays as it is (timm, diffusers, torchtune and others). Calls by any name
    are seen: ``F.scaled_dot_product_attention``, and what was imported from there. Look at
    what was counted: 0 means that the model attends in another way.

    `otherwise`: "raise" attnkit's error where it cannot compute a call, or let "torch" do so; the
    reasons are counted.

    Not seen, and so not counted: attention written as matmul and softmax
    (`nn.MultiheadAttention` with weights asked for is such), FlexAttention, graphs that were
    compiled before, and, for names that were imported, other threads: a checkpoint that is
    recomputed by CUDA's backward thread is one. Where that matters, `install`. Calls in what is
    compiled inside are computed by attnkit, but not counted. Every other function of torch that
    runs inside takes some 0.3 us longer.

    >>> import torch
    >>> x = torch.randn(1, 2, 6, 8)
    >>> with routed() as calls:
    ...     y = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    >>> print(calls)
    1 calls of scaled_dot_product_attention by attnkit, 0 by torch
    """
    with install(otherwise=otherwise) as installed, _Routing(installed.calls):
        yield installed.calls


class Installed:
    """attnkit's function in the place of torch's, until `undo` is called or its ``with`` ends."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self._before = [getattr(place, _NAME) for place in _PLACES]

        @wraps(_TORCHS)
        def scaled_dot_product_attention(*args: Any, **named: Any) -> Tensor:
            return calls(*args, **named)

        self._ours = scaled_dot_product_attention
        for place in _PLACES:
            setattr(place, _NAME, self._ours)

    def undo(self) -> None:
        """Put back what was there before; the latest of several is undone first.

        >>> installed = install()
        >>> installed.undo()
        """
        if not self._before:
            return
        if any(getattr(place, _NAME) is not self._ours for place in _PLACES):
            raise CompositionError(
                f"{_NAME} was replaced once more after this installation; undo that one first"
            )
        for place, before in zip(_PLACES, self._before, strict=True):
            setattr(place, _NAME, before)
        self._before = []

    def __enter__(self) -> Installed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def install(*, otherwise: Otherwise = "raise") -> Installed:
    """Put attnkit's function where torch's `scaled_dot_product_attention` is looked up.

    In ``torch.nn.functional`` and where that has it from, for all threads, until `undo`; nothing
    else becomes slower. Seen are calls that look the name up there, such as
    ``F.scaled_dot_product_attention``; not those of modules that imported the function itself, and
    not what `nn.TransformerEncoderLayer` and `nn.MultiheadAttention` compute by one operator when
    they do not train: `replace` does that. `otherwise` is that of `routed`.

    >>> import torch
    >>> x = torch.randn(1, 2, 6, 8)
    >>> with install() as installed:
    ...     y = torch.nn.functional.scaled_dot_product_attention(x, x, x)
    >>> installed.calls.routed
    1
    """
    check_choice("otherwise", otherwise, _OTHERWISE)
    return Installed(Calls(otherwise=otherwise))
