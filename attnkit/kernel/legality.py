"""Which rules of the contract a call breaks, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from attnkit.errors import KernelContractError, KernelContractTypeError
from attnkit.kernel.rules import RULES, Target, Violation
from attnkit.kernel.versions import op_version

if TYPE_CHECKING:
    from attnkit.kernel.call import KernelCall

__all__ = ["contract_error", "violations"]


def violations(call: KernelCall, target: Target) -> tuple[Violation, ...]:
    """Return every rule that a call breaks; only the structural ones when any of those is."""
    target = replace(target, version=op_version(target.version).name)
    structural = _broken(call, target, structural=True)
    return structural or _broken(call, target, structural=False)


def _broken(call: KernelCall, target: Target, *, structural: bool) -> tuple[Violation, ...]:
    asked = (rule for rule in RULES if rule.structural == structural)
    found = ((rule, rule.broken(call, target)) for rule in asked)
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
