"""Which rules of the contract a call breaks, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from attnkit.errors import KernelContractError, KernelContractTypeError
from attnkit.kernel.rules import ARGUMENT_TYPE, RULES, Rule, Target, Violation
from attnkit.kernel.versions import op_version

if TYPE_CHECKING:
    from attnkit.kernel.call import KernelCall

__all__ = ["contract_error", "violations"]


def violations(call: KernelCall, target: Target) -> tuple[Violation, ...]:
    """Return every rule that a call breaks, as far as they can be asked.

    Where a type is wrong, no other rule has a meaning; where a structural rule is broken, only
    the structural ones have.
    """
    target = replace(target, version=op_version(target.version).name)
    others = [rule for rule in RULES if rule is not ARGUMENT_TYPE]
    return (
        _broken(call, target, [ARGUMENT_TYPE])
        or _broken(call, target, [rule for rule in others if rule.structural])
        or _broken(call, target, [rule for rule in others if not rule.structural])
    )


def _broken(call: KernelCall, target: Target, rules: Iterable[Rule]) -> tuple[Violation, ...]:
    found = ((rule, rule.broken(call, target)) for rule in rules)
    return tuple(Violation(rule, words) for rule, words in found if words is not None)


def contract_error(broken: Iterable[Violation]) -> KernelContractError:
    """Return one error that carries every violation; a TypeError too when one is about types."""
    broken = tuple(broken)
    lines = "\n".join(f"  - {violation}" for violation in broken)
    count = "1 rule" if len(broken) == 1 else f"{len(broken)} rules"
    head = f"the fused kernel would not compute this call ({count} broken):"
    codes = [violation.code for violation in broken]
    about_types = any(violation.rule.type_error for violation in broken)
    error = KernelContractTypeError if about_types else KernelContractError
    return error(f"{head}\n{lines}", codes)
