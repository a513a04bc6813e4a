"""What ``import attnkit`` loads beside torch, counted in modules: each is paid at every start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import attnkit

ROOT = Path(__file__).parents[1]
NEEDED = {"attnkit", "einops", "numpy", "torch"}
# Parts of torch that load a compiler, and what they load.
COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch.aot_autograd", "sympy")

PROGRAM = """
import json, sys, torch, numpy

def told(names):
    print(json.dumps(sorted(names)))

bare = set(sys.modules)
import attnkit
dir(attnkit), hasattr(attnkit, "no such name")
told(set(sys.modules) - bare)
from attnkit import *
AttentionConfig(num_heads=1, head_dim=8)
told(set(sys.modules) - bare)
"""


@pytest.fixture(scope="module")
def loaded() -> list[set[str]]:
    """What a new process loads after torch: with the package, and with a configuration."""
    program = [sys.executable, "-c", PROGRAM]
    told = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [set(json.loads(line)) for line in told.splitlines()]


def test_the_package_loads_neither_configurations_nor_compilers(loaded: list[set[str]]) -> None:
    package, _ = loaded
    assert "attnkit.attention" in package
    others = {name.partition(".")[0] for name in package} - set(sys.stdlib_module_names)
    assert others - NEEDED == set()
    assert [name for name in package if name.startswith(COMPILERS)] == []
    assert [name for name in package if name.startswith("attnkit.config")] == []


def test_configurations_are_loaded_when_they_are_asked_for(loaded: list[set[str]]) -> None:
    package, configured = loaded
    assert {"attnkit.config.models", "pydantic"} <= configured - package


def test_names_that_are_loaded_late_are_listed_and_are_what_they_say() -> None:
    assert set(attnkit.__all__) | {"config"} <= set(dir(attnkit))
    for name in attnkit._OF_CONFIG:
        assert getattr(attnkit, name) is getattr(attnkit.config, name)
        assert attnkit.__getattr__(name) is getattr(attnkit, name)


def test_a_name_that_is_not_there_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'attnkit' has no attribute 'AttentionConfi'"):
        _ = attnkit.AttentionConfi  # type: ignore[attr-defined]
