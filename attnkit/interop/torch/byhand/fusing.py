"""`fuse`: attention that a model writes out as products and a softmax, run by attnkit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from attnkit.attend import is_tracing
from attnkit.display import Told
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.interop.torch.byhand.watch import Spot, Watch

__all__ = ["Fusion", "fuse"]


class _Watched:
    """In the place of a module's forward: the same, watched. It copies and pickles with it."""

    def __init__(self, module: nn.Module, instead: Callable[..., Any] | None, spot: Spot) -> None:
        self.module, self.instead, self.spot = module, instead, spot

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The forward as it is written; `inspect.signature` asks for it."""
        if self.instead is not None:
            return self.instead
        bound: Callable[..., Any] = type(self.module).forward.__get__(self.module)
        return bound

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_tracing():  # a graph sees the calls as they are written
            return self.__wrapped__(*args, **kwargs)
        self.spot.forwards += 1
        with Watch(self.spot):
            return self.__wrapped__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watched:
        module = copy.deepcopy(self.module, memo)
        return _Watched(module, copy.deepcopy(self.instead, memo), Spot())


class Fusion(Told):
    """The report of `fuse`, and the way back: ``undo()``, or leaving it as a context.

    `spots` has for each module, by name, how often attnkit was called (`fused`), by which plan
    (`latest`), and why something was left as it is written (`left`, counted).
    """

    def __init__(self, spots: dict[str, tuple[nn.Module, Spot]]) -> None:
        self._modules = {name: module for name, (module, _) in spots.items()}
        self.spots = {name: spot for name, (_, spot) in spots.items()}

    def undo(self) -> None:
        """Give every module its own forward back."""
        for module in self._modules.values():
            found = vars(module).get("forward")
            if isinstance(found, _Watched):
                if found.instead is None:
                    del module.forward
                else:
                    module.forward = found.instead

    def __enter__(self) -> Fusion:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    @property
    def calls(self) -> int:
        """How often attnkit was called so far."""
        return sum(spot.fused for spot in self.spots.values())

    @property
    def left(self) -> dict[str, dict[str, int]]:
        """Of each module that has not called attnkit although it ran, the reasons."""
        ran = {name: s for name, s in self.spots.items() if s.forwards and not s.fused}
        return {name: dict(spot.left) for name, spot in ran.items()}

    def __str__(self) -> str:
        lines = [f"{len(self.spots)} modules watched, {self.calls} calls of attnkit"]
        for name, spot in self.spots.items():
            told = f"{type(self._modules[name]).__name__}: {spot.fused} calls"
            if not spot.forwards:
                told += "; has not run"
            elif not spot.fused:
                why = "; ".join(f"{why} ({n})" for why, n in spot.left.items())
                told += f"; not fused because {why or 'it makes no product of activations'}"
            lines.append(f"  {name or '(model)'}  {told}")
        return "\n".join(lines)


def fuse(model: nn.Module, classes: Iterable[str | type[nn.Module]] | None = None) -> Fusion:
    """Run attention that a model writes out by hand through attnkit, in place.

    ``softmax(q @ k.T * scale + ...) @ v`` in any of its spellings (matmul, bmm, baddbmm, einsum;
    scale before or after; masks added, filled or chosen by where; tanh soft-cap; casts; dropout)
    becomes one call. While the forward of a watched module runs, the product of two activations
    is not computed but remembered, with every call that is made on it. When the weights meet the
    values, these calls are read exactly: additive masks as sets, what else is added as a bias
    with its gradient. No tensor of q_len x kv_len is made but those that the model makes. If the
    calls are no attention, or somebody looks at the numbers, they are computed by the very calls
    that were recorded: nothing can come out differently, and the report says why.

    `classes` are the classes to watch, or their names; by default the innermost modules whose
    class name says attention. State, parameters and the modules themselves stay as they are; in
    graphs of `torch.compile` modules run as written. What differs from the code as written: a
    row whose keys are all masked gives 0, where ``finfo.min`` gives a mean of the values and -inf
    NaN; a score that is *set* to -1e4 or less takes no part; dropout draws other weights, and
    weights that are returned are computed when somebody looks, with a draw of their own.

    Raises `CompositionError` where no module of the model is of these classes.

    >>> import torch
    >>> class SelfAttention(torch.nn.Module):
    ...     def forward(self, q, k, v):
    ...         return torch.softmax(q @ k.mT / 4, -1) @ v
    >>> layer, x = SelfAttention(), torch.randn(2, 3, 5, 16)
    >>> before = layer(x, x, x)
    >>> report = fuse(layer)
    >>> torch.allclose(layer(x, x, x), before, atol=1e-6), report.calls
    (True, 1)
    >>> report.undo()
    """
    if not isinstance(model, nn.Module):
        raise CompositionTypeError(f"fuse got model={shown(model)}; it takes an nn.Module")
    chosen = _innermost(model) if classes is None else _of(model, tuple(classes))
    if not chosen:
        asked = "whose class name says attention" if classes is None else "of these classes"
        raise CompositionError(
            f"{type(model).__name__} has no module {asked}; give classes=, the classes whose "
            "forward multiplies queries and keys"
        )
    spots: dict[str, tuple[nn.Module, Spot]] = {}
    for name, module in chosen.items():
        found = vars(module).get("forward")
        if isinstance(found, _Watched):
            spots[name] = (module, found.spot)
            continue
        spot = Spot()
        module.forward = _Watched(module, found, spot)
        spots[name] = (module, spot)
    return Fusion(spots)


def _of(model: nn.Module, classes: tuple[str | type[nn.Module], ...]) -> dict[str, nn.Module]:
    names = {one for one in classes if isinstance(one, str)}
    types = tuple(one for one in classes if isinstance(one, type))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, types) or names & {base.__name__ for base in type(module).__mro__}
    }


def _innermost(model: nn.Module) -> dict[str, nn.Module]:
    named = {name: module for name, module in model.named_modules() if _says_attention(module)}
    return {
        name: module
        for name, module in named.items()
        if not any(_says_attention(one) for one in module.modules() if one is not module)
    }


def _says_attention(module: nn.Module) -> bool:
    said = type(module).__name__.lower()
    return ("attention" in said or "attn" in said) and not isinstance(module, nn.MultiheadAttention)
