"""``python -m attnkit``: the command line."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress

from pydantic import BaseModel

from attnkit.config import AttentionConfig, MultiHeadAttentionConfig
from attnkit.doctor import command, plans, view
from attnkit.doctor.findings import told_versions
from attnkit.doctor.screen import GOOD, INTERRUPTED, NO_DEVICE, WRONG, NoDevice, Parser, Screen
from attnkit.errors import AttnkitError

__all__ = ["main"]

_MODELS: dict[str, type[BaseModel]] = {
    "attention": AttentionConfig,
    "multi-head-attention": MultiHeadAttentionConfig,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    screen = Screen()
    parser = Parser(prog="python -m attnkit", description=__doc__)
    parser.add_argument("--version", action="version", version=told_versions())
    chosen = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Callable[[Namespace, Screen], int], text: str) -> ArgumentParser:
        added = chosen.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    told = "test the fused kernel of this machine, or the emulator, and report"
    command.add_arguments(add("doctor", command.run, told))
    plans.add_arguments(add("plan", plans.run, "print the plan of a configuration"))
    view.add_arguments(add("view", view.run, "write the plan as a page for a browser"))
    schema = add("schema", _print_schema, "print the JSON schema of configurations")
    schema.add_argument("module", choices=_MODELS, nargs="?", default="attention")
    try:
        arguments = parser.parse_args(argv)
        code = int(arguments.run(arguments, screen))
        screen.out.flush()
        return code
    except SystemExit:  # --help or --version has been printed
        return GOOD
    except AttnkitError as error:
        screen.error(str(error))
        return NO_DEVICE if isinstance(error, NoDevice) else WRONG
    except OSError as error:  # files are told by the commands: this is standard output
        _close(screen)
        if isinstance(error, BrokenPipeError):  # `| head`: whoever read has seen enough
            return GOOD
        screen.error(f"cannot write: {error.strerror or error}")
        return WRONG
    except KeyboardInterrupt:
        screen.error("interrupted")
        return INTERRUPTED


def _print_schema(arguments: Namespace, screen: Screen) -> int:
    screen.line(json.dumps(_MODELS[arguments.module].model_json_schema(), indent=1))
    return GOOD


def _close(screen: Screen) -> None:
    """Throw away what could not be written, or the interpreter tries again when it ends."""
    with suppress(OSError, ValueError):  # an output without a file: there is nothing to try again
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, screen.out.fileno())
        os.close(sink)


if __name__ == "__main__":
    sys.exit(main())
