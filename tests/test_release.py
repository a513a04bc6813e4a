"""What a release says of itself in several places says the same, and is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import attnkit
from attnkit.__main__ import main
from attnkit.doctor import findings

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_written_once() -> None:
    project = read("pyproject.toml")
    assert 'version = { attr = "attnkit.__version__" }' in project
    assert re.search(r'^version = "', project, re.MULTILINE) is None
    assert re.fullmatch(r"\d+\.\d+\.\d+", attnkit.__version__)


def test_a_command_tells_the_versions(capsys: Any) -> None:
    assert main(["--version"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"attnkit {attnkit.__version__}, python 3.")
    assert f", torch {torch.__version__}" in told
    assert told.count("\n") == 1


def test_torch_npu_is_told_where_it_is(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(findings, "_version", {"torch_npu": "2.13.0"}.get)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(", torch_npu 2.13.0\n")
