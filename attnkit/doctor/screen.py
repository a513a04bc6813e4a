"""What the commands share: the terminal, exit codes, and a parser that says one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TextIO

from attnkit.errors import AttnkitError

__all__ = [
    "FAILED",
    "GOOD",
    "INTERRUPTED",
    "NO_NPU",
    "WRONG",
    "NoNpu",
    "Parser",
    "Screen",
    "UsageError",
]

GOOD, FAILED, WRONG, NO_NPU, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes: all good; some case failed; wrong usage; no NPU where one was asked for; Ctrl-C."""


class UsageError(AttnkitError):
    """A command line that asks for something that does not exist or cannot be."""


class NoNpu(AttnkitError):
    """An NPU was asked for, and there is none."""


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` instead of leaving the interpreter with a page of text."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as an error."""
        raise UsageError(f"{message} (see {self.prog} --help)")


class Screen:
    """Text for people on `out`, progress and errors on `err`; `quiet` keeps `out` free.

    A progress bar is drawn only where `err` is a terminal.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out = sys.stdout if out is None else out
        self.err = sys.stderr if err is None else err
        self.quiet = False

    def line(self, text: str = "") -> None:
        """Write a line for people, unless quiet."""
        if not self.quiet:
            self.out.write(f"{text}\n")

    def data(self, text: str) -> None:
        """Write text for programs."""
        self.out.write(text)

    def error(self, text: str) -> None:
        """Write one line to `err`, whatever the text was broken into."""
        lines = (line.strip() for line in text.splitlines())
        self.err.write(f"error: {'; '.join(line for line in lines if line)}\n")
        self.err.flush()

    def table(self, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Write a table; the first column is text, the others are figures."""
        body = [titles, *rows]
        widths = [max(map(len, column)) for column in zip(*body, strict=True)]
        for row in (titles, ["-" * width for width in widths], *body[1:]):
            first, *rest = row
            cells = [f"{text:>{width}}" for text, width in zip(rest, widths[1:], strict=True)]
            self.line("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[str], None]]:
        """Show how far something has come: call what this gives with the name of each that is done.

        It draws a bar on a terminal, and nothing elsewhere.
        """
        done = 0

        def advance(name: str) -> None:
            nonlocal done
            done += 1
            if self.err.isatty():
                filled = 30 * done // max(total, 1)
                bar = "#" * filled + "." * (30 - filled)
                text = f"{what} [{bar}] {done}/{total} {name}"
                self.err.write(f"\r{text:<78.78}")
                self.err.flush()

        try:
            yield advance
        finally:
            if self.err.isatty():
                self.err.write("\r" + " " * 78 + "\r")
