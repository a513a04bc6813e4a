"""What a rule of the contract is, and what its predicate may look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from attnkit.kernel.call import KernelCall

__all__ = ["LAYERS", "Layer", "MaskFacts", "Product", "Rule", "Target", "Violation"]

Layer = Literal["torch", "aclnn", "tiling", "backward", "documented", "silent"]
Product = Literal["A2", "A3", "950", "emulator"]

LAYERS: dict[Layer, str] = {
    "torch": "the torch binding raises RuntimeError with a clear text",
    "aclnn": "the operator API returns 161001 or 161002",
    "tiling": "the tiling returns 561002, 561003 or 561103, an 'EZ9999 Inner Error'",
    "backward": "the forward runs; the tiling of the grad op rejects the arguments",
    "documented": "the reference forbids it; what happens is not defined",
    "silent": "accepted, and something else than what was asked for is computed",
}
"""Which part of the stack rejects a call, from the outside in."""


@dataclass(frozen=True)
class MaskFacts:
    """What the content of a full-size or compressed mask tensor says; None = not looked at.

    >>> MaskFacts(empty_rows=2).is_canonical is None
    True
    """

    is_canonical: bool | None = None
    is_binary: bool | None = None
    cells_outside_window: int | None = None
    empty_rows: int | None = None


@dataclass(frozen=True)
class Target:
    """Where and how a call will run: everything a rule depends on beside the call."""

    version: str = "v2"
    product: Product = "A2"
    training: bool = False
    learnable_bias: bool = False
    mask: MaskFacts = MaskFacts()


Predicate = Callable[["KernelCall", Target], "str | None"]


@dataclass(frozen=True)
class Rule:
    """One rule: a stable code, who enforces it, what must hold, and what to do.

    `broken` returns what was found, in words and numbers, or None when the rule holds.
    Other rules may rely on a `structural` one, so they are asked only when those hold; and all
    of them rely on the rule about types, `argument-type`.

    >>> from attnkit.kernel import RULES
    >>> any(rule.code == "mode-without-mask" for rule in RULES)
    True
    """

    code: str
    layer: Layer
    sentence: str
    remedy: str
    broken: Predicate
    type_error: bool = False
    structural: bool = False


@dataclass(frozen=True)
class Violation:
    """A rule that a call breaks, and how.

    >>> import torch
    >>> from attnkit.kernel import KernelCall, TensorSpec
    >>> spec = TensorSpec((1, 4, 2, 16), torch.float16)
    >>> call = KernelCall(spec, spec, spec, head_num=2, input_layout="BSND", sparse_mode=2)
    >>> [violation.code for violation in call.violations()]
    ['mode-without-mask']
    """

    rule: Rule
    found: str

    @property
    def code(self) -> str:
        """The rule's stable code."""
        return self.rule.code

    @property
    def layer(self) -> Layer:
        """Which part of the stack rejects it, or "silent"."""
        return self.rule.layer

    def __str__(self) -> str:
        rule = self.rule
        return f"{self.found}; {rule.sentence} ({rule.layer}). {rule.remedy} [{rule.code}]"
