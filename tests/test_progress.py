"""The bar: who sees one, when, what is left of it, and what Ctrl-C leaves of the work."""

from __future__ import annotations

import contextvars
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import attnkit as ak
from attnkit import masks, parallel, progress
from attnkit.progress import Bar, pulse

ROOT = Path(__file__).parents[1]
open_bar = progress.progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """What sets the time; nothing waits."""
    now = [100.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.progress", None)


Clock = Callable[[float], None]


def left_on(screen: str) -> str:
    """What a terminal shows in its last line once all of a text was written to it."""
    line: list[str] = []
    at = 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.", screen, re.S):
        if part == "\r":
            at = 0
        elif part == "\x1b[2K":
            line.clear()
        elif not part.startswith("\x1b"):
            line[at : at + 1] = [*[" "] * (at - len(line)), part]
            at += 1
    return "".join(line).rstrip()


# -- when --------------------------------------------------------------------------------------


def test_nothing_is_drawn_for_two_seconds(plain: None, clock: Clock) -> None:
    err = Terminal()
    with open_bar("cases", 4, err) as bar:
        clock(1.9)
        bar.step("one")
        pulse()
        assert err.getvalue() == ""
        clock(0.2)
        bar.step("two")
        assert err.getvalue().strip() == "cases [###############...............] 2/4, 2 s  two"
    assert left_on(err.getvalue()) == ""


def test_it_is_drawn_ten_times_a_second_and_not_more(plain: None, clock: Clock) -> None:
    err = Terminal()
    with open_bar("cases", 400, err) as bar:
        clock(2.0)
        for _ in range(300):
            bar.step()
            clock(0.01)
    assert 30 <= err.getvalue().count("cases") <= 31


def test_what_ends_early_writes_nothing(plain: None, clock: Clock) -> None:
    err = Terminal()
    with open_bar("cases", 2, err) as bar:
        bar.step()
        bar.step()
    assert err.getvalue() == ""


def test_what_nobody_can_count_says_how_long_it_has_been(plain: None, clock: Clock) -> None:
    err = Terminal()
    with open_bar("planning", stream=err) as bar:
        clock(12)
        pulse()
        assert left_on(err.getvalue()) == "planning, 12 s"
        clock(1)
        bar.step("a way")
        assert left_on(err.getvalue()) == "planning 1, 13 s  a way"
        clock(1)
        bar.at(30, 40)
        assert "30/40, 14 s" in left_on(err.getvalue())


def test_a_line_is_written_beside_it(plain: None, clock: Clock) -> None:
    both = Terminal()  # standard output and standard error are one
    with pytest.MonkeyPatch.context() as patch, open_bar("rows", 3, both) as bar:
        patch.setattr(sys, "stdout", both)
        clock(3)
        bar.step()
        bar.line("a row of a table")
    assert both.getvalue().endswith("\ra row of a table\n")


# -- who ---------------------------------------------------------------------------------------


class Closed(io.StringIO):
    def isatty(self) -> bool:
        raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize("stream", [io.StringIO(), Closed()])
def test_what_is_no_terminal_gets_none(stream: io.StringIO, clock: Clock) -> None:
    with open_bar("cases", 2, stream) as bar:
        clock(60)
        bar.step("one")
        bar.at(2, 2)
        pulse()
    assert type(bar) is Bar
    assert stream.getvalue() == ""


def test_a_process_without_standard_error_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with open_bar("cases") as bar:
        bar.step()
    assert type(bar) is Bar


def test_a_bar_in_a_bar_is_not_drawn_and_keeps_the_outer_alive(plain: None, clock: Clock) -> None:
    err = Terminal()
    with open_bar("outer", 2, err) as outer:
        outer.step("one")
        with open_bar("inner", 5, err) as inner:
            clock(3)
            inner.step("two")
            assert err.getvalue() == ""
            pulse()
    assert "outer [###############" in err.getvalue()
    assert "inner" not in err.getvalue()
    with open_bar("next", 2, err) as after:
        assert type(after) is not Bar


def test_threads_and_compilers_get_none(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Bar] = []
    thread = threading.Thread(target=lambda: found.append(open_bar("x", stream=Terminal())))
    thread.start()
    thread.join()
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    found.append(open_bar("x", stream=Terminal()))
    assert [type(one) for one in found] == [Bar, Bar]


def test_a_thread_that_has_the_context_does_not_draw(plain: None, clock: Clock) -> None:
    err = Terminal()
    with open_bar("outer", 2, err):
        clock(5)
        context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: context.run(pulse))
        thread.start()
        thread.join()
        assert err.getvalue() == ""
        pulse()
        assert "outer" in err.getvalue()


@pytest.mark.parametrize("gone", [OSError(5, "Input/output error"), ValueError("closed file")])
def test_work_goes_on_where_the_terminal_is_gone(gone: Exception, clock: Clock) -> None:
    class Gone(Terminal):
        def write(self, text: str) -> int:
            raise gone

    with open_bar("work", 2, Gone()) as bar:
        for _ in range(2):
            clock(5)
            bar.step()


def test_of_processes_at_one_terminal_the_first_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Group:
        rank: int
        is_initialized: Callable[[], bool] = lambda: True
        get_rank: Callable[[], int] = field(init=False)

        def __post_init__(self) -> None:
            self.get_rank = lambda: self.rank

    for rank in (0, 1):
        monkeypatch.setitem(sys.modules, "torch.distributed", Group(rank))  # type: ignore[arg-type]
        assert (type(open_bar("x", stream=Terminal())) is Bar) == (rank == 1)


def test_a_compiled_layer_at_a_terminal_stays_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "_AFTER", -1.0)
    layer = ak.Attention(2, 8, mask=masks.Causal() & masks.SlidingWindow(5), backend="emulated")
    x = torch.randn(1, 24, 2, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, x, x), layer(x, x, x))


# -- what has one ------------------------------------------------------------------------------


def seen(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> str:
    """What a terminal gets while something works, each step of which takes three seconds."""
    err = Terminal()
    times = iter(range(0, 10**9, 3))
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(progress, "monotonic", lambda: float(next(times)))
    work()
    assert left_on(err.getvalue()) == ""
    return err.getvalue()


def test_reading_and_naming_a_mask_have_one(monkeypatch: pytest.MonkeyPatch, plain: None) -> None:
    cells = masks.SlidingWindow(5).materialize(40, 40)[0, 0]
    told = seen(monkeypatch, lambda: masks.recover(cells))
    assert "reading a mask [##############################] 40/40" in told
    assert "naming a mask, " in told


def test_planning_has_one(monkeypatch: pytest.MonkeyPatch, plain: None) -> None:
    x = torch.empty(1, 61, 4, 16, device="meta")
    mask = masks.Causal() & (masks.SlidingWindow(7) | masks.Prefix(3))
    told = seen(monkeypatch, lambda: ak.plan(x, x, x, mask=mask, backend="emulated"))
    assert "planning, " in told


def test_plans_of_ranks_have_one(monkeypatch: pytest.MonkeyPatch, plain: None) -> None:
    x = torch.empty(1, 64, 4, 16, device="meta")

    def work() -> None:
        parallel.plan(x, x, x, ranks=4, mask=masks.SlidingWindow(9)).verify()

    told = seen(monkeypatch, work)
    assert "pricing plans of ranks [" in told
    assert "proving what ranks compute, " in told


# -- at a terminal -----------------------------------------------------------------------------

PROGRAM = """
import sys
from attnkit import progress
{before}
now = iter(range(0, 10**9, 3))
progress.monotonic = lambda: float(next(now))
{work}
"""

NO_RICH = "sys.modules['rich'] = sys.modules['rich.progress'] = None"
LOOP = """
with progress.progress("cases", 3) as bar:
    for name in ("one", "two", "three"):
        bar.step(name)
sys.stderr.write("END")
"""


def at_a_terminal(
    program: str, answer: Callable[[subprocess.Popen[bytes], str], None] | None = None
) -> tuple[int, str, str]:
    """Run a program at a terminal: its exit code, its standard output, what the terminal got.

    `answer` is told whenever the terminal got something.
    """
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=theirs,
        stdin=theirs,
        env=environment,
        start_new_session=True,
    )
    os.close(theirs)
    got = ""
    with closing(os.fdopen(ours, "rb", buffering=0)), started:
        try:
            for chunk in _chunks(ours):
                got += chunk
                if answer is not None:
                    answer(started, got)
        except TimeoutError:
            started.kill()
            raise
        assert started.stdout is not None
        out = started.stdout.read().decode()
    return started.returncode, out, got


def _chunks(terminal: int) -> Iterator[str]:
    while select.select([terminal], [], [], 60)[0]:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # nobody has the other side open
            return
        if not chunk:
            return
        yield chunk.decode()
    raise TimeoutError("the program says nothing")


@pytest.mark.parametrize("before", ["", NO_RICH], ids=["rich", "plain"])
def test_a_real_terminal_gets_a_bar_and_keeps_nothing_of_it(before: str) -> None:
    code, out, got = at_a_terminal(PROGRAM.format(before=before, work=LOOP))
    assert (code, out) == (0, "")
    assert all(name in got for name in ("cases", "2/3", "two"))
    assert left_on(got) == "END"
    assert got.count("\x1b[?25l") == got.count("\x1b[?25h")  # the cursor is seen again
    assert ("\x1b[" in got) == (before == "")


INTERRUPTED = """
import attnkit as ak, torch
from attnkit import masks
from attnkit.planner import lower
from attnkit.planner.lower import lower as kept

x = torch.empty(1, 509, 4, 16, device="meta")
mask = masks.Causal() & (masks.SlidingWindow(37) | masks.Prefix(5)) - masks.Columns(100, 130)
find = lambda: ak.plan(x, x, x, mask=mask, backend="emulated")
from attnkit.planner import proof
import signal, time

once = []
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until the bar has been drawn

def slow(seen=progress.pulse):
    seen()
    if not once and progress._OPEN.get() and progress._OPEN.get()._drawing:
        once.append(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        while True:
            time.sleep(0.01)

proof.pulse = slow
registries = list(masks.MASKS)
try:
    find()
except KeyboardInterrupt:
    print("interrupted", kept.cache_info().currsize, progress._OPEN.get())
sys.stderr.write("END")
plan = find()
plan.verify()
kept.cache_clear()
print(plan == find(), registries == list(masks.MASKS))
"""


@pytest.mark.parametrize("before", ["", NO_RICH], ids=["rich", "plain"])
def test_ctrl_c_leaves_a_clean_terminal_and_no_half_state(before: str) -> None:
    sent: list[int] = []

    def stop(started: subprocess.Popen[bytes], got: str) -> None:
        if "planning" in got and not sent:
            sent.append(1)
            started.send_signal(signal.SIGINT)

    program = PROGRAM.format(before=before, work=INTERRUPTED)
    code, out, got = at_a_terminal(program, stop)
    assert code == 0, got
    assert out == "interrupted 0 None\nTrue True\n"
    beside = got.partition("END")[0]
    assert left_on(beside) == ""
    assert beside.count("\x1b[?25l") == beside.count("\x1b[?25h")
