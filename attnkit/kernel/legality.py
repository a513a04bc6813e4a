"""What a rule of the contract is, and which of them a call breaks, before anything is computed.

The rules are functions, in `attnkit.kernel.rules`. Each registers itself here by `rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from attnkit.errors import KernelContractError, KernelContractTypeError
from attnkit.kernel.versions import op_version
from attnkit.registry import Registry
from attnkit.remedies import REMEDIES, Remedy

__all__ = [
    "LAYERS",
    "SOURCES",
    "Found",
    "Layer",
    "MaskFacts",
    "Product",
    "Rule",
    "Source",
    "Target",
    "Violation",
    "broken",
    "contract_error",
    "known_rules",
    "rule",
    "violations",
]

Layer = Literal["torch", "aclnn", "tiling", "backward", "documented", "silent"]
Source = Literal["binding", "aclnn", "tiling", "kernel", "reference", "MindSpeed", "block-sparse"]
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

SOURCES: dict[Source, str] = {
    "binding": "op-plugin: its checks, dispatch, dropout, and the schemas of each release",
    "aclnn": "the parameter checks of CANN's operator API, aclnn_flash_attention_score",
    "tiling": "CANN's tiling of flash_attention_score (general, varlen) and of its grad",
    "kernel": "CANN's kernels of flash_attention_score: mask addressing, pse.h, dropout",
    "reference": "the operator's reference pages and their tables of limits",
    "MindSpeed": "the binding fusion_attention_v2 of MindSpeed",
    "block-sparse": "the pages, checks and tiling of block_sparse_attention and of its grad",
}
"""Where a rule was read."""

_CODE_OF: dict[Layer, Source] = {
    "torch": "binding",
    "aclnn": "aclnn",
    "tiling": "tiling",
    "backward": "tiling",
    "documented": "reference",
    "silent": "kernel",
}


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


Found = Iterator[str]
"""What a rule says about a call and a `Target`: what is wrong, in words and numbers, or nothing."""


@dataclass(frozen=True)
class Rule:
    """One rule: a stable code, who enforces it, where that was read, what must hold, what to do.

    Other rules may rely on a `structural` one, so they are asked only when those hold; and all
    of them rely on the rule about types, `argument-type`.

    >>> from attnkit.kernel import RULES
    >>> any(rule.code == "mode-without-mask" for rule in RULES)
    True
    """

    code: str
    layer: Layer
    source: Source
    sentence: str
    remedy: str
    predicate: Callable[..., Found] = field(compare=False)
    type_error: bool = False
    structural: bool = False

    def broken(self, call: object, on: Target) -> str | None:
        """Return what is wrong with a call, or None where the rule holds.

        >>> from attnkit.kernel import RULES
        >>> import torch
        >>> from attnkit.kernel import KernelCall, TensorSpec
        >>> spec = TensorSpec((1, 4, 2, 16), torch.float16)
        >>> RULES[0].broken(KernelCall(spec, spec, spec, 2, "BSND"), Target()) is None
        True
        """
        return next(self.predicate(call, on), None)


_RULES: Registry[Rule] = Registry("rule")


def rule(
    *,
    layer: Layer,
    remedy: str,
    source: Source | None = None,
    type_error: bool = False,
    structural: bool = False,
    rules: Registry[Rule] = _RULES,
) -> Callable[[Callable[..., Found]], Rule]:
    """Make a rule of a function that yields what is wrong; its docstring says what must hold.

    Its name is the code, with hyphens. It was read in the code of its layer, unless `source` names
    another place. Rules are asked and told in the order in which they are made; those of another
    op have `rules` of their own.
    """

    def made(predicate: Callable[..., Found]) -> Rule:
        code = predicate.__name__.replace("_", "-")
        sentence = " ".join((predicate.__doc__ or code).split()).removesuffix(".")
        read = source or _CODE_OF[layer]
        parts = (code, layer, read, sentence, remedy, predicate, type_error, structural)
        REMEDIES.add(code, Remedy("rule", f"{sentence}.", remedy))
        return rules.add(code, Rule(*parts))

    return made


def known_rules() -> tuple[Rule, ...]:
    """Return every rule that was made so far."""
    return tuple(known for _, known in _RULES.items())


@dataclass(frozen=True)
class Violation:
    """A rule that a call breaks, and how.

    >>> import torch
    >>> from attnkit.kernel import KernelCall, TensorSpec
    >>> spec = TensorSpec((1, 4, 2, 16), torch.float16)
    >>> call = KernelCall(spec, spec, spec, head_num=2, input_layout="BSND", sparse_mode=2)
    >>> [(violation.code, violation.layer) for violation in call.violations()]
    [('mode-without-mask', 'silent')]
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
        of = self.rule
        return f"{self.found}. {of.sentence} ({of.layer}). {of.remedy} [{of.code}]"


def violations(call: object, target: Target) -> tuple[Violation, ...]:
    """Return every rule that a call breaks, as far as they can be asked.

    Where a type is wrong, no other rule has a meaning; where a structural rule is broken, only
    the structural ones have.
    """
    op_version(target.version)  # refuses one that does not exist
    types, *others = known_rules()
    return (
        broken(call, target, [types])
        or broken(call, target, [rule for rule in others if rule.structural])
        or broken(call, target, [rule for rule in others if not rule.structural])
    )


def broken(call: object, target: Target, rules: Iterable[Rule]) -> tuple[Violation, ...]:
    """Return which of some rules a call breaks."""
    found = ((rule, rule.broken(call, target)) for rule in rules)
    return tuple(Violation(rule, words) for rule, words in found if words is not None)


def contract_error(found: Iterable[Violation]) -> KernelContractError:
    """Return one error that carries every violation; a TypeError too when one is about types."""
    found = tuple(found)
    lines = "\n".join(f"  - {violation}" for violation in found)
    count = "1 rule" if len(found) == 1 else f"{len(found)} rules"
    head = f"the fused kernel would not compute this call ({count} broken):"
    codes = [violation.code for violation in found]
    about_types = any(violation.rule.type_error for violation in found)
    error = KernelContractTypeError if about_types else KernelContractError
    return error(f"{head}\n{lines}", codes)
