"""The rules of the fused kernel's contract, one function each, by subject.

A rule is asked about a `KernelCall` and a `Target`. It yields what is wrong, in words and
numbers; only the first is told. Its docstring says what must hold.
"""

from __future__ import annotations

from importlib import import_module

from attnkit.kernel.legality import Rule, known_rules

__all__ = ["RULES"]

# The order in which rules are asked and told: the one about types is the first of all.
for _subject in ("shapes", "masks", "windows", "biases", "extras"):
    import_module(f"{__name__}.{_subject}")

RULES: tuple[Rule, ...] = known_rules()
"""Every rule, in that order."""
