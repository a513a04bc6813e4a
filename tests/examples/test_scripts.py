"""The example files as a person runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_transformer

ROOT = Path(__file__).parents[2]


def test_the_training_script_runs_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/train_lm.py"), "--config", "nowhere.yaml"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("train_lm: error: cannot read the config nowhere.yaml")
    assert done.stderr.count("\n") == 1


def test_the_tiny_transformer_says_what_plan_it_got(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_transformer.main()
    printed = capsys.readouterr().out
    assert str(tiny_transformer.MASK) in printed
    assert "ALiBi" in printed
