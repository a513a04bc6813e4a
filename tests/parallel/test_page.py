"""docs/guides/parallel.md: its scripts run on as many processes as it says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import attnkit as ak
from attnkit import masks
from attnkit.errors import CompositionError
from attnkit.parallel import ContextParallel, Shards
from attnkit.parallel.guard import Guard
from attnkit.parallel.wires import Alone, Wires
from tests.parallel.processes import Pool
from tests.parallel.threads import run_ranks

TEXT = (Path(__file__).parents[2] / "docs" / "guides" / "parallel.md").read_text(encoding="utf-8")
SCRIPTS = dict(re.findall(r"```py\n# (\S+)\n(.*?)```", TEXT, re.S))
COMMANDS = re.findall(r"```console\n\$ ([^\n]*) (\S+\.py)\n(.*?)```", TEXT, re.S)


def run(group: dist.ProcessGroup, script: str) -> str:
    """Run a script in a process whose group is made already; return what it prints."""
    printed = io.StringIO()
    kept = (
        mock.patch.object(dist, "init_process_group"),
        mock.patch.object(dist, "destroy_process_group"),
    )
    with kept[0], kept[1], contextlib.redirect_stdout(printed):
        exec(compile(script, "a script", "exec"), {"__name__": "__main__"})
    return printed.getvalue()


def test_the_page_has_what_is_tested() -> None:
    assert [name for _, name, _ in COMMANDS] == [*SCRIPTS]
    assert [*SCRIPTS] == ["one.py", "four.py", "decode.py", "mesh.py"]
    launched = [f"python -m torch.distributed.run --nproc-per-node {n}" for n in (4, 4, 8)]
    assert [command for command, _, _ in COMMANDS] == ["python", *launched]


def test_scripts_print_what_the_page_shows(processes: Pool) -> None:
    for command, name, shown in COMMANDS:
        if command == "python":
            assert run(dist.group.WORLD, SCRIPTS[name]) == shown
        elif command.endswith(" 4"):
            assert processes.run(run, SCRIPTS[name])[0] == shown


def test_the_script_of_a_mesh_runs_on_half_of_it(processes: Pool) -> None:
    half = SCRIPTS["mesh.py"].replace("(2, 2, 2)", "(1, 2, 2)")
    assert processes.run(run, half)[0].startswith("loss 5.5")


@pytest.mark.sweep
def test_the_script_of_a_mesh_prints_what_the_page_shows() -> None:
    pool = Pool(8)
    try:
        assert pool.run(run, SCRIPTS["mesh.py"])[0] == COMMANDS[-1][2]
    finally:
        pool.close()


def test_the_words_of_ranks_that_disagree_are_those_of_the_page() -> None:
    store = dist.HashStore()

    def act(wires: Wires) -> str:
        wires.guard = Guard(store, wires.rank, wires.size, timeout=20.0)
        mask = masks.SlidingWindow(4) if wires.rank else masks.Causal()
        here = ContextParallel(wires, method="needed").shards(tokens=12)
        x = torch.zeros(1, 6, 2, 8)
        with pytest.raises(CompositionError) as told:
            ak.attention(x, x, x, mask=mask, shards=here)
        return str(told.value)

    for told in run_ranks(2, act):
        assert f"```log\n{told}\n```" in TEXT


def test_choices_on_the_page_are_there() -> None:
    for method in set(re.findall(r'method="(\w+)"', TEXT)) - {"hybrid"}:
        assert ContextParallel(Alone(), method=method).size == 1
    for balance in re.findall(r'balance="(\w+)"', TEXT):
        assert ContextParallel(Alone(), balance=balance).shards(tokens=4).sizes == (4,)
    for name in re.findall(r"here\.(\w+)\(", TEXT):
        assert callable(getattr(Shards, name))
    assert callable(masks.from_magi)
