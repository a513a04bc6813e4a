"""The one object that writes to the terminal: with rich where it is installed, plain else."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

__all__ = ["Screen"]


class Screen:
    """Text for people on `out`, progress and errors on `err`; `quiet` keeps `out` free.

    A progress bar is drawn only where `err` is a terminal.
    """

    def __init__(
        self, out: TextIO | None = None, err: TextIO | None = None, *, quiet: bool = False
    ) -> None:
        self.out = sys.stdout if out is None else out
        self.err = sys.stderr if err is None else err
        self.quiet = quiet

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
        if self.quiet:
            return
        body = [tuple(row) for row in rows]
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            for text in _plain_table(titles, body):
                self.line(text)
            return
        table = Table()
        for k, title in enumerate(titles):
            table.add_column(title, justify="right" if k else "left")
        for row in body:
            table.add_row(*row)
        Console(file=self.out).print(table)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Progress]:
        """Show how far something has come."""
        bar = Progress(self.err, what, total)
        try:
            yield bar
        finally:
            bar.close()


class Progress:
    """A bar on a terminal; nothing elsewhere."""

    def __init__(self, stream: TextIO, what: str, total: int) -> None:
        self._stream, self._what, self._total, self._done = stream, what, total, 0
        self._shown = stream.isatty()
        self._rich = None
        if not self._shown:
            return
        try:
            from rich.console import Console
            from rich.progress import Progress as Rich
        except ImportError:
            return
        self._rich = Rich(console=Console(file=stream), transient=True)
        self._task = self._rich.add_task(what, total=total)
        self._rich.start()

    def advance(self, name: str) -> None:
        """Say that one more thing is done, and which."""
        self._done += 1
        if self._rich is not None:
            self._rich.update(self._task, advance=1, description=f"{self._what}: {name}")
        elif self._shown:
            filled = 30 * self._done // max(self._total, 1)
            bar = "#" * filled + "." * (30 - filled)
            text = f"{self._what} [{bar}] {self._done}/{self._total} {name}"
            self._stream.write(f"\r{text:<78.78}")
            self._stream.flush()

    def close(self) -> None:
        """Take the bar away."""
        if self._rich is not None:
            self._rich.stop()
        elif self._shown:
            self._stream.write("\r" + " " * 78 + "\r")


def _plain_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, ["-" * width for width in widths], *rows):
        first, *rest = row
        cells = [f"{text:>{width}}" for text, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join([f"{first:<{widths[0]}}", *cells]).rstrip()
