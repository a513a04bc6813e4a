"""``python -m attnkit``: the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from attnkit.doctor import command, plans, schema
from attnkit.doctor.screen import Screen
from attnkit.doctor.usage import GOOD, INTERRUPTED, NO_NPU, WRONG, NoNpu, Parser
from attnkit.errors import AttnkitError

__all__ = ["main"]

COMMANDS = {
    "doctor": (command, "test the fused kernel of this machine, or the emulator, and report"),
    "plan": (plans, "print the plan of a configuration"),
    "schema": (schema, "print the JSON schema of configurations"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    screen = Screen()
    parser = Parser(prog="python -m attnkit", description=__doc__)
    chosen = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        module.add_arguments(chosen.add_parser(name, help=text, description=text))
    try:
        arguments = parser.parse_args(argv)
        module, _ = COMMANDS[arguments.command]
        code = int(module.run(arguments, screen))
        screen.out.flush()
        return code
    except SystemExit:  # --help has been printed
        return GOOD
    except NoNpu as error:
        screen.error(str(error))
        return NO_NPU
    except AttnkitError as error:
        screen.error(str(error))
        return WRONG
    except BrokenPipeError:  # `| head`: whoever read has seen enough
        _close(screen)
        return GOOD
    except OSError as error:  # files are told by the commands: this is standard output
        _close(screen)
        screen.error(f"cannot write: {error.strerror or error}")
        return WRONG
    except KeyboardInterrupt:
        screen.error("interrupted")
        return INTERRUPTED


def _close(screen: Screen) -> None:
    """Throw away what could not be written, or the interpreter tries again when it ends."""
    try:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, screen.out.fileno())
        os.close(sink)
    except (OSError, ValueError):  # an output without a file: there is nothing to try again
        return


if __name__ == "__main__":
    sys.exit(main())
