"""The exception tree, and the `Refusal` value that two of its members carry.

Every failure attnkit raises on purpose derives from `AttnkitError` and from the builtin
a caller would catch anyway. A message names what was given, the rule it breaks and what
to do about it, and is raised before any computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = [
    "AttnkitError",
    "BackendRefused",
    "CompositionError",
    "CompositionTypeError",
    "ConfigError",
    "KernelContractError",
    "KernelContractTypeError",
    "Refusal",
    "shown",
]


def shown(value: object) -> str:
    """Return a given value for a message: a tensor by its shape and dtype, others by their repr.

    >>> import torch
    >>> shown(torch.zeros(2, 3))
    '<tensor [2, 3] of torch.float32>'
    >>> shown("causal")
    "'causal'"
    """
    if isinstance(value, Tensor) and value.numel() > 1:
        return f"<tensor {list(value.shape)} of {value.dtype}>"
    return repr(value)


@dataclass(frozen=True)
class Refusal:
    """Why a candidate or a backend was not taken.

    `code` is stable and meant for programs, `reason` is the sentence for people,
    `subject` names what was refused (a backend, or a candidate such as ``"mode 2"``).

    >>> print(Refusal("no-softcap", "the fused kernel has no soft-cap term", "ascend"))
    ascend: the fused kernel has no soft-cap term [no-softcap]
    """

    code: str
    reason: str
    subject: str = ""

    def __str__(self) -> str:
        head = f"{self.subject}: " if self.subject else ""
        return f"{head}{self.reason} [{self.code}]"


class AttnkitError(Exception):
    """Base class of every error that attnkit raises on purpose."""


class CompositionError(AttnkitError, ValueError):
    """The author's request is inconsistent: shapes, lengths, heads, mask, bias or layout."""


class CompositionTypeError(CompositionError, TypeError):
    """A `CompositionError` about the type or dtype of an argument."""


class KernelContractError(AttnkitError, ValueError):
    """An argument set that the fused kernel rejects or would compute wrongly.

    `codes` are the codes of the rules that are broken.
    """

    def __init__(self, message: str, codes: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.codes = tuple(codes)


class KernelContractTypeError(KernelContractError, TypeError):
    """A `KernelContractError` about the type or dtype of an argument."""


class BackendRefused(AttnkitError, RuntimeError):
    """The backend that was asked for by name cannot run the composition.

    `refusals` holds every reason, not only the first one.
    """

    def __init__(self, message: str, refusals: Sequence[Refusal] = ()) -> None:
        super().__init__(message)
        self.refusals = tuple(refusals)


class ConfigError(AttnkitError, ValueError):
    """A configuration names an unknown key, kind or value; the message lists what is possible."""
