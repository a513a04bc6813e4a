"""The exception tree, and the `Refusal` value that two of its members carry.

Every failure attnkit raises on purpose derives from `AttnkitError` and from the builtin
a caller would catch anyway. A message names what was given, the rule it breaks and what
to do about it, and is raised before any computation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from reprlib import Repr
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "AttnkitError",
    "BackendRefused",
    "CompositionError",
    "CompositionTypeError",
    "ConfigError",
    "ExchangeError",
    "KernelContractError",
    "KernelContractTypeError",
    "Refusal",
    "clipped",
    "contract",
    "reasons_told",
    "shown",
]


LONGEST = 200
"""Characters that a given value takes in a message, at most."""

_MOST_ADVICE = 4

LONGEST_MESSAGE = 2_000
"""Characters of a whole message, at most: its beginning and its end are kept."""


class _Shown(Repr):
    """A repr of bounded length, that costs no more than it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxtuple = self.maxlist = self.maxarray = self.maxset = self.maxfrozenset = 8
        self.maxdeque = self.maxdict = 8
        self.maxstring = self.maxother = LONGEST

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, Tensor):
            return _tensor(x)
        if isinstance(x, str | bytes | bytearray):
            if len(x) <= LONGEST:
                return repr(x)
            unit = "characters" if isinstance(x, str) else "bytes"
            return f"{x[: LONGEST // 2]!r}... ({len(x)} {unit})"
        if isinstance(x, int) and not isinstance(x, bool):
            # Python refuses to write integers of more than some thousand digits.
            return repr(x) if x.bit_length() <= 512 else f"<int of {x.bit_length()} bits>"
        return super().repr1(x, level)


def shown(value: object) -> str:
    """Return a given value for a message, in `LONGEST` characters or little more.

    A tensor by its shape and dtype, a long text or list by its beginning and its length, a huge
    integer by its size, others by their repr.

    >>> import torch
    >>> shown(torch.zeros(2, 3))
    '<tensor [2, 3] of torch.float32>'
    >>> shown("causal")
    "'causal'"
    >>> shown(10**400)
    '<int of 1329 bits>'
    >>> len(shown("causal" * 10**6)) < 250
    True
    """
    return clipped(_SHOWN.repr(value), LONGEST + 60)


def clipped(text: str, most: int) -> str:
    """Return a text with its middle left out, where it is longer than `most` characters.

    >>> clipped("abcdefghijklmnopqrstuvwxyz", 12)
    'abcd ... xyz'
    """
    if len(text) <= most:
        return text
    left = max(1, (most - 5) * 2 // 3)
    return f"{text[:left]} ... {text[len(text) - max(1, most - 5 - left) :]}"


def _tensor(tensor: Tensor) -> str:
    try:
        shape = str(list(tensor.shape))
    except RuntimeError:  # a nested tensor has no one shape
        shape = f"of {tensor.dim()} axes"
    plain = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_meta)
    if plain and not tensor.is_quantized and tensor.numel() == 1:
        return clipped(repr(tensor), LONGEST)
    layout = "" if tensor.layout == torch.strided else f", {tensor.layout}"
    place = ", on meta" if tensor.is_meta else ""
    return f"<{'nested ' * tensor.is_nested}tensor {shape} of {tensor.dtype}{layout}{place}>"


_SHOWN = _Shown()


@dataclass(frozen=True)
class Refusal:
    """Why a candidate or a backend was not taken.

    `code` is stable and meant for programs, `reason` is the sentence for people,
    `subject` names what was refused (a backend, or a candidate such as ``"mode 2"``).

    >>> refusal = Refusal("flex-dropout", "FlexAttention has no dropout", "flex")
    >>> print(refusal)
    flex: FlexAttention has no dropout [flex-dropout]
    >>> print(refusal.remedy)
    Leave `backend` at "auto", or ask for "tiled", which computes the same.
    """

    code: str
    reason: str
    subject: str = ""

    @property
    def remedy(self) -> str:
        """What to do about it, as docs/reference/refusals.md has it; empty for an unknown code."""
        from attnkit.remedies import REMEDIES

        return REMEDIES[self.code].remedy if self.code in REMEDIES else ""

    def __str__(self) -> str:
        head = f"{self.subject}: " if self.subject else ""
        return f"{head}{self.reason} [{self.code}]"


def reasons_told(refusals: Sequence[Refusal]) -> str:
    """Return refusals as lines, and then what to do about the first that something helps against.

    >>> print(reasons_told([Refusal("flex-empty", "no keys", "flex"), Refusal("mine", "not here")]))
      flex: no keys [flex-empty]
      not here [mine]
    what to do:
      Leave `backend` at "auto", or ask for "tiled", which computes the same. [flex-empty]
    """
    remedies = {refusal.code: refusal.remedy for refusal in refusals}
    some = {code: do for code, do in remedies.items() if do and not do.startswith("Nothing")}
    advice = [f"  {do} [{code}]" for code, do in some.items()][:_MOST_ADVICE]
    lines = list(dict.fromkeys(f"  {refusal}" for refusal in refusals))  # each sentence once
    return "\n".join([*lines, *(["what to do:", *advice] if advice else [])])


class AttnkitError(Exception):
    """Base class of every error that attnkit raises on purpose.

    Its message has at most 2,000 characters, whatever was given: the middle of a longer one is
    left out.

    >>> import attnkit as ak
    >>> try:
    ...     ak.masks.Columns(0, 8).region("16", 16)
    ... except ak.AttnkitError as error:
    ...     print(type(error).__name__)
    CompositionTypeError
    """

    def __str__(self) -> str:
        return clipped(super().__str__(), LONGEST_MESSAGE)


class CompositionError(AttnkitError, ValueError):
    """The author's request is inconsistent: shapes, lengths, heads, mask, bias or layout.

    >>> import attnkit as ak
    >>> ak.layouts.get("BSDN")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionError: unknown layout 'BSDN'; did you mean 'BSND'? Known: ...
    """


class CompositionTypeError(CompositionError, TypeError):
    """A `CompositionError` about the type or dtype of an argument.

    >>> issubclass(CompositionTypeError, TypeError) and issubclass(CompositionError, ValueError)
    True
    """


class KernelContractError(AttnkitError, ValueError):
    """An argument set that the fused kernel rejects or would compute wrongly.

    `codes` are the codes of the rules that are broken.

    >>> import torch
    >>> import attnkit as ak
    >>> x = torch.zeros(1, 4, 2, 16)
    >>> try:
    ...     _ = ak.fusion_attention(x, x, x, 2, "BSND", sparse_mode=2)
    ... except ak.KernelContractError as error:
    ...     print(error.codes)
    ('mode-without-mask',)
    """

    def __init__(self, message: str = "", codes: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.codes = tuple(codes)


class KernelContractTypeError(KernelContractError, TypeError):
    """A `KernelContractError` about the type or dtype of an argument.

    >>> issubclass(KernelContractTypeError, TypeError)
    True
    """


@contextmanager
def contract(code: str) -> Iterator[None]:
    """Raise what is found inconsistent inside as a `KernelContractError` with a rule's code."""
    try:
        yield
    except CompositionError as error:
        about_types = isinstance(error, CompositionTypeError)
        kind = KernelContractTypeError if about_types else KernelContractError
        raise kind(str(error), [code]) from None


class BackendRefused(AttnkitError, RuntimeError):
    """The backend that was asked for by name cannot run the composition.

    `refusals` holds every reason, not only the first one.

    >>> import attnkit as ak
    >>> try:
    ...     _ = ak.Attention(2, 8, softcap=30.0, backend="emulated")
    ... except ak.BackendRefused as error:
    ...     print([refusal.code for refusal in error.refusals])
    ['softcap']
    """

    def __init__(self, message: str = "", refusals: Sequence[Refusal] = ()) -> None:
        super().__init__(message)
        self.refusals = tuple(refusals)


class ExchangeError(AttnkitError, RuntimeError):
    """Processes that compute together did not get through an exchange.

    One is absent, late, gone, or does something else. The message names the pair, what it was
    to exchange, and what to do; raised at the deadline at the latest.

    >>> issubclass(ExchangeError, RuntimeError)
    True
    """


class ConfigError(AttnkitError, ValueError):
    """A configuration names an unknown key, kind or value; the message lists what is possible.

    >>> import attnkit as ak
    >>> ak.AttentionConfig(num_heads=2, head_dim=8, dropout=2.0)
    Traceback (most recent call last):
    ...
    attnkit.errors.ConfigError: AttentionConfig: 1 problem
      dropout: must be less than 1; got 2.0
    """
