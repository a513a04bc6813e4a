"""The training script on several processes: the run of one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ruamel.yaml import YAML

import train_lm
from lm.data import Corpus, load_corpus
from lm.ranks import Ranks
from tests.examples.conftest import TINY
from tests.parallel.processes import Pool

CLOSE = {torch.float64: 1e-10, torch.float32: 1e-4}


def small() -> Corpus:
    by_size = sorted(load_corpus().train, key=lambda d: len(d.text))
    return Corpus(train=tuple(by_size[:2]), held_out=tuple(by_size[2:3]))


def trained(group: dist.ProcessGroup | None, argv: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """Run the command line as one process of a group, or alone; return the state of the end."""
    load, before = train_lm.load_corpus, torch.get_default_dtype()
    train_lm.load_corpus = small
    torch.set_default_dtype(dtype)
    try:
        ranks = Ranks() if group is None else Ranks.of(group)
        arguments = train_lm.parse_arguments(argv)
        assert train_lm.run_here(arguments, ranks) == 0
    finally:
        torch.set_default_dtype(before)
        train_lm.load_corpus = load
    if not ranks.first:
        return {}
    state: dict[str, Any] = torch.load(arguments.out / "checkpoint.pt", weights_only=True)
    return state


def written(folder: Path, **changes: dict[str, Any]) -> Path:
    """Return the path of the tiny config, with sections changed as it is told."""
    content = {name: section | changes.get(name, {}) for name, section in TINY.items()}
    path = folder / "tiny.yaml"
    YAML(typ="safe", pure=True).dump(content, path)
    return path


def command(config: Path, out: Path, *flags: str) -> list[str]:
    return ["--config", str(config), "--out", str(out), "--device", "cpu", *flags]


def far(some: dict[str, Any], other: dict[str, Any]) -> float:
    """Return how far losses and weights of two runs are apart."""
    a, b = (one["progress"]["train_bits"] for one in (some, other))
    losses = max(abs(x - y) for x, y in zip(a, b, strict=True))
    weights = (one["model"] for one in (some, other))
    a, b = weights
    return max(losses, *((a[name] - b[name]).abs().max().item() for name in a))


def test_two_processes_train_like_one_and_one_goes_on_from_there(
    processes: Pool, tmp_path: Path
) -> None:
    config = written(tmp_path)  # with dropout
    alone = trained(None, command(config, tmp_path / "one"), torch.float64)
    two = command(config, tmp_path / "two", "--stop-at", "4")
    processes.run(trained, two, torch.float64, ranks=2, limit=180.0)
    both = trained(None, command(config, tmp_path / "two", "--resume"), torch.float64)
    assert both["progress"]["step"] == 6
    assert far(alone, both) < CLOSE[torch.float64]


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("attention", ["alibi", "window"])
def test_twenty_steps_have_the_losses_of_one_process(
    processes: Pool,
    tmp_path: Path,
    ranks: int,
    dtype: torch.dtype,
    attention: str,
) -> None:
    changes = {
        "alibi": {"pse": "ALiBi(4)", "num_kv_heads": 4},
        "window": {"mask": "Causal() & (SlidingWindow(9) | Columns(0, 2))", "sink": True},
    }
    config = written(tmp_path, training={"steps": 20}, attention=changes[attention])
    alone = trained(None, command(config, tmp_path / "one"), dtype)
    processes.run(trained, command(config, tmp_path / "many"), dtype, ranks=ranks, limit=240.0)
    many = torch.load(tmp_path / "many" / "checkpoint.pt", weights_only=True)
    assert len(many["progress"]["train_bits"]) == 20
    assert math.isfinite(many["progress"]["train_bits"][-1])
    assert far(alone, many) < CLOSE[dtype]


@pytest.mark.sweep
def test_the_script_starts_its_processes_and_others_go_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, out = written(tmp_path, training={"validate_every": 100}), tmp_path / "out"
    for count, stop in (("2", "2"), ("3", "4")):
        flags = ["--context-parallel", count, "--stop-at", stop]
        flags += ["--resume"] if count == "3" else []
        assert train_lm.main(command(config, out, *flags)) == 0
        printed = capfd.readouterr().out
        assert printed.count(f"stopped after step {stop}") == 1  # one process speaks
        assert f"{count} ranks" in printed  # the plan of all of them


def test_processes_that_are_there_already_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun starts one."""
    there = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in (there | {"TORCHELASTIC_RUN_ID": "none"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train_lm, "load_corpus", small)
    flags = command(written(tmp_path), tmp_path / "out", "--context-parallel")
    assert train_lm.main([*flags, "1", "--stop-at", "1"]) == 0
    assert train_lm.main([*flags, "2"]) == 2
    assert not dist.is_initialized()


@pytest.mark.parametrize("count", ["0", "-1"])
def test_no_process_at_all_is_refused(
    count: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = command(written(tmp_path), tmp_path / "out", "--context-parallel", count)
    assert train_lm.main(flags) == 2
    assert f"--context-parallel {count}" in capsys.readouterr().err
