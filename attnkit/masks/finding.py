"""`Finding`: what `Mask.lint` and `masks.lint_stack` have to say, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attnkit.display import Told

__all__ = ["Finding", "counted", "ranges"]


@dataclass(frozen=True)
class Finding(Told):
    """Something about a mask that its author may not have meant.

    `code` is stable and meant for programs, `message` says what is so, `remedy` what to write.
    Codes of `Mask.lint`:

    - ``empty-rows``: queries that see no key
    - ``unseen-keys``: keys that no query sees (those that a part which is one range of keys, as
      `Padding` and `Columns` are, rules out aside)
    - ``window-exceeds-sequence``: a window, band, chunk or block that cuts nothing off
    - ``documents-leak``: queries that see keys of another document
    - ``documents-share-positions``: beside documents of unequal lengths, a mask whose positions
      count through the whole score matrix
    - ``sees-the-future``: cells that look ahead, in a mask that has a causal part
    - ``part-changes-nothing``: a part whose removal leaves the mask as it is (sought in masks of
      up to 1,000 parts)
    - ``equals-a-named-mask``: a dense mask, slices or a function that is a named composition
    - ``not-a-region``: the mask is not a union of slices, so some checks were not made

    Codes of `masks.lint_stack`: ``stack-sees-the-future``, ``stack-documents-leak``,
    ``stack-is-short-sighted``, ``stack-is-bounded``.

    >>> from attnkit import masks
    >>> (found,) = masks.SlidingWindow(9).lint(4, 4)
    >>> found.code, found.remedy
    ('window-exceeds-sequence', 'write Causal(), or a smaller size if a limit was meant')
    """

    code: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy} [{self.code}]"


def ranges(spans: Iterable[tuple[int, int]]) -> str:
    """Return ranges ``(start, stop)`` in words, the first few of them.

    >>> ranges([(0, 1), (4, 8)])
    '0, 4 to 7'
    """
    told = [str(a) if b == a + 1 else f"{a} to {b - 1}" for a, b in spans]
    return ", ".join(told[:4]) + (f", ... {len(told)} ranges in all" if len(told) > 4 else "")


def counted(count: int, what: str) -> str:
    """Return how many of what there are, in words.

    >>> counted(2, "cell")
    '2 cells'
    """
    return f"{count} {what}{'s' * (count != 1)}"
