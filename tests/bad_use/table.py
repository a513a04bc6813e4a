"""Every wrong use there is, and the judge of what comes of one."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from attnkit.errors import AttnkitError
from tests.bad_use import calls, kernel, sets, text
from tests.bad_use.values import Case

__all__ = ["CASES", "LONGEST", "verdict"]

LONGEST = 2_000
"""How many characters a message has at most."""

SECONDS = 30
"""After this long a call counts as one without an end; it is no measure of speed."""

CASES = [case for module in (calls, sets, kernel, text) for case in module.cases()]


class Endless(BaseException):
    """The call did not end in time."""


@contextlib.contextmanager
def guard(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise Endless

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def verdict(case: Case) -> str:
    """Return what is wrong with what a wrong use got; nothing if it got its due."""
    try:
        with guard(SECONDS):
            case.call()
    except AttnkitError as error:
        length = len(str(error))
        if not length:
            return "an error without a message"
        return "" if length <= LONGEST else f"a message of {length} characters"
    except Endless:
        return f"no end in {SECONDS} seconds"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return "accepted"
