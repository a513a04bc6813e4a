"""``python -m attnkit view``: the page of a plan, for a browser."""

from __future__ import annotations

import argparse
import webbrowser
from collections.abc import Iterator
from pathlib import Path

from attnkit.doctor import plans
from attnkit.doctor.screen import GOOD, Screen, UsageError
from attnkit.explorer import save
from attnkit.parallel import ParallelPlan, explored
from attnkit.planner.explored import as_page

__all__ = ["DEFAULT_FILE", "add_arguments", "run"]

DEFAULT_FILE = "attnkit-plan.html"

# What the page repeats of a command line, but for the mask: it is edited there.
_REPEATED = (
    *("config", "at", "num_heads", "head_dim", "batch", "q_len", "kv_len", "lengths"),
    *("kv_lengths", "dtype", "backend", "ranks", "method", "balance", "heads_ways", "stages"),
    "output",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    plans.add_request(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help=f"the page (default {DEFAULT_FILE})",
    )
    parser.add_argument("--open", action="store_true", help="open the page in a browser")


def run(arguments: argparse.Namespace, screen: Screen) -> int:
    """Run the command and return its exit code."""
    plans.check_ranks(arguments)
    path = Path(DEFAULT_FILE) if arguments.output is None else arguments.output
    _check_file(path)
    plan, note = plans.planned(arguments)
    command = [*_command(arguments)]
    if isinstance(plan, ParallelPlan):
        data = explored.as_page(plan, command)
    else:
        data = as_page(plan, command)
    data["note"] = " ".join(filter(None, (data["note"], note and f"{note}.")))
    try:
        save(data, path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--output {path}: {error}") from None
    screen.line(f"page: {path}")
    if arguments.open and not webbrowser.open(path.resolve().as_uri()):
        screen.line("no browser was found that could be opened from here")
    return GOOD


def _check_file(path: Path) -> None:
    """Complain about a page that cannot be written, before the plan is made."""
    try:
        if path.is_dir():
            raise UsageError(f"--output {path}: is a directory; name a file in it")
        if not path.parent.is_dir():
            raise UsageError(f"--output {path}: there is no directory {path.parent}")
    except (OSError, ValueError) as error:
        raise UsageError(f"--output {path}: {error}") from None


def _command(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the command line again, but for its mask."""
    yield from ("attnkit", "view")
    for name in _REPEATED:
        value = getattr(arguments, name)
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            yield from (f"--{name.replace('_', '-')}", text)
    if arguments.train:
        yield "--train"
