"""What the commands share: exit codes, and a parser that says one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from attnkit.errors import AttnkitError

__all__ = ["FAILED", "GOOD", "INTERRUPTED", "NO_NPU", "WRONG", "NoNpu", "Parser", "UsageError"]

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
