"""benchmarks/gpu.py without a GPU: it says so, and on the CPU it compares before it times."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("gpu", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)  # where its dataclasses look for their names
    spec.loader.exec_module(module)
    return module


def rows(gpu: ModuleType) -> dict[str, Any]:
    scale = gpu.Scale(True, CPU)
    every = (*gpu.encoders(scale), *gpu.decoders(scale), *gpu.decoding(scale))
    return {row.name: row for row in every}


def test_without_a_gpu_one_line_says_so(gpu: ModuleType, capsys: Any) -> None:
    assert gpu.main(["--device", f"cuda:{torch.cuda.device_count()}"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "no CUDA device" in out


def test_masks_by_hand_are_those_of_attnkit(gpu: ModuleType) -> None:
    for row in rows(gpu).values():
        allowed = row.mask.materialize(row.q_len, row.kv_len, batch=row.batch)[:, 0]
        b, i, j = (torch.arange(n) for n in allowed.shape)
        place = (b[:, None, None], torch.tensor(0), i[:, None], j)
        if row.cells is None:
            assert allowed.all(), row.name
        else:
            assert torch.equal(row.cells(*place).expand_as(allowed), allowed), row.name
        if row.flag:
            assert torch.equal(torch.ones_like(allowed).tril(), allowed), row.name


@pytest.mark.parametrize(
    "name", ["BERT, padding", "ALiBi 4k", "soft-cap 4k", "decode, 8 x 1 on 8k"]
)
def test_a_row_is_measured(name: str, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def uncompiled(function: Any, dynamic: bool) -> Any:
        return function  # compiling takes seconds

    monkeypatch.setattr(torch, "compile", uncompiled)
    row = rows(gpu)[name]
    line, notes = gpu.measure(row, CPU, row.trains, 1)
    assert line.startswith(f"| {name}, {'both' if row.trains else 'forward'} | ")
    cells = [cell.strip() for cell in line.strip("| ").split("|")]
    assert float(cells[1]) > 0
    assert (cells[gpu.COLUMNS.index("SDPA math") + 2] == "-") == (name == "soft-cap 4k")
    assert "flash-attn" in {who for who, _ in notes}  # installed or not, it is for GPUs
    assert not any("differs" in reason for _, reason in notes)


def test_who_computes_something_else_is_not_timed(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*given: Any) -> Any:
        return lambda query, key, value: query

    monkeypatch.setattr(gpu, "by_flex", wrong)
    _, notes = gpu.measure(rows(gpu)["causal 4k"], CPU, False, 1)
    ((who, reason),) = [note for note in notes if "differs" in note[1]]
    assert who == "FlexAttention"
    assert reason.endswith("was not timed")


def test_rows_beyond_the_time_are_told(gpu: ModuleType, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "gpu.md"
    gpu.compare(CPU, 1, -1.0, out)
    assert "- not measured: -1 minutes were spent (everywhere)" in out.read_text()
    assert "not measured" in capsys.readouterr().out
