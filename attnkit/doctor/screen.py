"""What the commands share: the terminal, exit codes, and a parser that says one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NoReturn, TextIO

from attnkit.display import Text
from attnkit.errors import AttnkitError

__all__ = [
    "FAILED",
    "GOOD",
    "INTERRUPTED",
    "NO_DEVICE",
    "WRONG",
    "NoDevice",
    "Parser",
    "Screen",
    "UsageError",
    "table",
]

GOOD, FAILED, WRONG, NO_DEVICE, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes: all good; some case failed; wrong usage; no NPU or GPU where one was asked for;
Ctrl-C."""


class UsageError(AttnkitError):
    """A command line that asks for something that does not exist or cannot be."""


class NoDevice(AttnkitError):
    """An NPU or a GPU was asked for, and there is none."""


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` instead of leaving the interpreter with a page of text."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as an error."""
        raise UsageError(f"{message} (see {self.prog} --help)")


class Screen:
    """Text on `out`, bars and errors on `err`."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out = sys.stdout if out is None else out
        self.err = sys.stderr if err is None else err

    def line(self, text: str) -> None:
        """Write a line."""
        self.out.write(f"{text}\n")

    def text(self, text: Text) -> None:
        """Write lines; with rich, where it is installed, on a terminal."""
        if self.out.isatty():
            with suppress(ImportError):
                from rich.console import Console

                Console(file=self.out).print(text, soft_wrap=True)
                return
        self.line(text)

    def error(self, text: str) -> None:
        """Write one line to `err`, whatever the text was broken into."""
        lines = (line.strip() for line in text.splitlines())
        self.err.write(f"error: {'; '.join(line for line in lines if line)}\n")
        self.err.flush()


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table; the first column is text, the others are figures."""
    body = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    for row in (titles, ["-" * width for width in widths], *body[1:]):
        first, *rest = row
        cells = [f"{text:>{width}}" for text, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join([f"{first:<{widths[0]}}", *cells]).rstrip()
