"""docs/reference/commands.md: its commands run and print what it shows, dots for the rest."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from attnkit.__main__ import main

TEXT = (Path(__file__).parents[2] / "docs" / "reference" / "commands.md").read_text(
    encoding="utf-8"
)
CONSOLE = re.findall(r"```console\n\$ python -m attnkit (.*)\n((?:.*\n)*?)```", TEXT)
FILES = dict(re.findall(r"```yaml\n# (\S+)\n((?:.*\n)*?)```", TEXT))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name, text in FILES.items():
        Path(name).write_text(text)


def test_the_page_has_what_is_tested():
    assert len(CONSOLE) == 9
    assert set(FILES) == {"model.yaml", "packed.yaml"}


@pytest.mark.parametrize(("command_line", "shown"), CONSOLE, ids=[line for line, _ in CONSOLE])
def test_commands_print_what_the_page_shows(command_line: str, shown: str, capsys: Any):
    given = shlex.split(command_line)
    if given == ["doctor"]:
        given += ["--device", "cpu"]  # the page is from a machine without an NPU
    assert main(given) == 0
    printed = capsys.readouterr().out.splitlines()
    at, anywhere = 0, False
    for line in shown.splitlines():
        if line == "...":
            anywhere = True
            continue
        rest = printed[at:]
        assert line in (rest if anywhere else rest[:1]), f"{line!r} is not in {rest}"
        at, anywhere = at + rest.index(line) + 1, False


def test_the_program_on_the_page_runs():
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    exec(program, {})


def test_options_on_the_page_exist(capsys: Any):
    pages = ""
    for name in ("doctor", "plan", "view"):
        main([name, "--help"])
        pages += capsys.readouterr().out
    for option in set(re.findall(r"`(--[a-z-]+)", TEXT)):
        assert option in pages
