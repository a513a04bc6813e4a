"""``python -m attnkit``: the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from attnkit.doctor import command, plans
from attnkit.doctor.screen import Screen
from attnkit.doctor.usage import INTERRUPTED, NO_NPU, WRONG, NoNpu, Parser
from attnkit.errors import AttnkitError

__all__ = ["main"]

COMMANDS = {
    "doctor": (command, "test the fused kernel of this machine, or the emulator, and report"),
    "plan": (plans, "print the plan of a configuration"),
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
        return int(module.run(arguments, screen))
    except SystemExit:  # --help has been printed
        return 0
    except NoNpu as error:
        screen.error(str(error))
        return NO_NPU
    except AttnkitError as error:
        screen.error(str(error))
        return WRONG
    except KeyboardInterrupt:
        screen.error("interrupted")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
