"""`progress`: a bar for what takes long, for whoever sits at a terminal.

It is drawn on standard error, where that is a terminal, once two seconds have passed; by rich where
that is installed. Files, pipes, notebooks, threads and compilers never see one. Of what is nested
the outermost has it, and what is deep below it says with `pulse` that it is still at work. The bar
is gone when its block is left, by Ctrl-C too: nothing draws but the work itself, between two steps.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from contextvars import ContextVar
from time import monotonic
from types import TracebackType
from typing import Any, Protocol, TextIO

from torch.compiler import is_compiling

__all__ = ["Bar", "progress", "pulse"]

_AFTER = 2.0  # seconds until something is drawn
_EVERY = 0.1  # seconds from one drawing to the next
_WIDTH = 78
_GONE = (OSError, ValueError)  # what writing raises once a terminal is hung up, or its file closed

_OPEN: ContextVar[_AtTerminal | None] = ContextVar("the bar that is open", default=None)


class Bar:
    """How far something is, for nobody: what `progress` gives where there is no terminal."""

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def step(self, name: str = "") -> None:
        """Say that one more is done, and its name."""

    def at(self, done: int, total: int) -> None:
        """Say how many are done, of how many."""

    def line(self, text: str) -> None:
        """Write a line on standard output, where the bar is not in its way."""
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


_SILENT = Bar()


def progress(what: str, total: int | None = None, stream: TextIO | None = None) -> Bar:
    """Return a bar of `total` steps, or of nobody knows how many, to be used as a context.

    >>> with progress("squares", total=3) as bar:
    ...     for k in range(3):
    ...         bar.step(f"{k} squared")
    """
    stream = sys.stderr if stream is None else stream
    if not _is_terminal(stream) or _OPEN.get() is not None or is_compiling():
        return _SILENT
    if threading.current_thread() is not threading.main_thread() or _is_another_rank():
        return _SILENT
    return _AtTerminal(what, total, stream)


def pulse() -> None:
    """Draw the bar that is open again, if there is one and it is time: work goes on."""
    shown = _OPEN.get()
    if shown is not None:
        shown.look()


def _is_another_rank() -> bool:
    """Whether this is a process of a group and not its first: they share a terminal."""
    group = sys.modules.get("torch.distributed")
    return group is not None and group.is_initialized() and group.get_rank() > 0


def _is_terminal(stream: TextIO | None) -> bool:
    """Whether a bar can be drawn there: windows without a console have no standard error."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # it is closed
        return False


class _AtTerminal(Bar):
    """How far something is, at a terminal."""

    def __init__(self, what: str, total: int | None, stream: TextIO) -> None:
        self._what, self._total, self._stream = what, total, stream
        self._done, self._name = 0, ""
        self._drawing: _LastLine | None = None

    def __enter__(self) -> Bar:
        self._token = _OPEN.set(self)
        self._began = monotonic()
        self._next = self._began + _AFTER
        return self

    def __exit__(self, *error: object) -> None:
        _OPEN.reset(self._token)
        self._clear()

    def step(self, name: str = "") -> None:
        self._done, self._name = self._done + 1, name
        self.look()

    def at(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        self.look()

    def line(self, text: str) -> None:
        self._clear()
        super().line(text)

    def look(self) -> None:
        """Draw, if it is time; not in a thread that was handed the context of the main one."""
        now = monotonic()
        if now >= self._next and threading.current_thread() is threading.main_thread():
            self._next = now + _EVERY
            if self._drawing is None:
                self._drawing = _drawing(self._stream)  # kept first, so that it is cleared
            told = self._what, self._done, self._total, self._name, now - self._began
            with suppress(*_GONE):
                self._drawing.draw(*told)

    def _clear(self) -> None:
        if self._drawing is not None:
            with suppress(*_GONE):
                self._drawing.clear()
            self._drawing = None


class _LastLine(Protocol):
    """Something on the last line of a terminal."""

    def draw(self, what: str, done: int, total: int | None, name: str, seconds: float) -> None:
        """Draw it, or draw it again."""

    def clear(self) -> None:
        """Leave the line empty."""


def _drawing(stream: TextIO) -> _LastLine:
    try:
        return _Rich(stream)
    except ImportError:
        return _Plain(stream)


class _Plain:
    """A line of text that is written over."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def draw(self, what: str, done: int, total: int | None, name: str, seconds: float) -> None:
        if total:
            filled = 30 * min(done, total) // total
            what = f"{what} [{'#' * filled}{'.' * (30 - filled)}] {done:,}/{total:,}"
        elif done:
            what = f"{what} {done:,}"
        told, width = f"{what}, {seconds:.0f} s  {name}", self._width()
        self._write(f"\r{told:<{width}.{width}}")

    def clear(self) -> None:
        self._write("\r" + " " * self._width() + "\r")

    def _width(self) -> int:
        """How much of a line is written over: a longer one would go on in the next."""
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError):
            columns = 0
        return min(_WIDTH, columns - 1) if columns > 1 else _WIDTH

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class _Rich:
    """A bar of rich, drawn when it is told to: no thread of its own draws between."""

    def __init__(self, stream: TextIO) -> None:
        from rich import progress as bars
        from rich.console import Console

        counted = bars.TextColumn("{task.fields[counted]}", markup=False)
        named = bars.TextColumn("{task.fields[name]}", markup=False)
        what = bars.TextColumn("{task.description}", markup=False)
        self._bars: Any = bars.Progress(
            *(what, bars.BarColumn(), counted, named),
            console=Console(file=stream),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bars.add_task("", total=None, counted="", name="")

    def draw(self, what: str, done: int, total: int | None, name: str, seconds: float) -> None:
        self._bars.start()
        counted = f"{done:,}/{total:,}, " if total else f"{done:,}, " if done else ""
        self._bars.update(
            self._task,
            description=what,
            completed=done,
            total=total or None,
            counted=f"{counted}{seconds:.0f} s",
            name=name,
            refresh=True,
        )

    def clear(self) -> None:
        self._bars.stop()
