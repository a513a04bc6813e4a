"""Messages between ranks arrive, are counted, and those that do not come are errors in words."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from attnkit.errors import CompositionError, ExchangeError
from attnkit.parallel import wires as wires_of
from attnkit.parallel.guard import Statement
from attnkit.parallel.wires import Alone, GroupWires, Wires
from tests.parallel.processes import Pool
from tests.parallel.threads import ThreadWires, run_ranks

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8)


def deal(wires: Wires, dtype: torch.dtype = torch.float32) -> list[list[float]]:
    """Send every other rank its own number as often as it has a rank: rank 0 gets nothing."""
    got = []
    for what in ("first", "second"):
        into = [(r, torch.zeros(wires.rank, dtype=dtype)) for r in range(wires.size)]
        into = [one for one in into if one[0] != wires.rank]
        mine = [(r, torch.full((r,), 10 * wires.rank + r, dtype=dtype)) for r, _ in into]
        wires.post(mine, into, what).wait()
        got = [tensor.tolist() for _, tensor in into]
    return got


def expected(rank: int, size: int) -> list[list[float]]:
    return [[10.0 * r + rank] * rank for r in range(size) if r != rank]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_threads_exchange_and_count(size: int) -> None:
    def work(wires: ThreadWires) -> tuple[list[list[float]], list[int], list[int]]:
        return deal(wires), wires.sent, wires.received

    for rank, (got, sent, received) in enumerate(run_ranks(size, work)):
        assert got == expected(rank, size)
        assert sent == [2 * 4 * r if r != rank else 0 for r in range(size)]
        assert received == [2 * 4 * rank if r != rank else 0 for r in range(size)]


def test_one_rank_posts_nothing() -> None:
    alone = Alone()
    alone.post([], [(0, torch.empty(0))], "nothing").wait()
    with pytest.raises(CompositionError, match="nobody to exchange with"):
        alone.post([], [(0, torch.empty(1))], "keys of stage 1")


def test_what_a_thread_raises_is_raised_and_the_others_end() -> None:
    def work(wires: ThreadWires) -> None:
        if wires.rank == 2:
            raise KeyError("mine")
        wires.post([], [(2, torch.empty(1))], "keys").wait()

    with pytest.raises(KeyError, match="mine"):
        run_ranks(3, work)


def test_a_thread_that_sends_what_nobody_takes_or_takes_what_nobody_sends() -> None:
    def sends(wires: ThreadWires) -> None:
        wires.post([(1 - wires.rank, torch.ones(1))] * (wires.rank == 0), [], "keys")

    def takes(wires: ThreadWires) -> None:
        wires.post([], [(1 - wires.rank, torch.ones(1))], "keys").wait()

    with pytest.raises(AssertionError, match="1 messages from rank 0 that rank 1 did not take"):
        run_ranks(2, sends)
    with pytest.raises(ExchangeError, match="it did not come"):
        run_ranks(2, takes, limit=0.2)


def test_a_thread_that_is_late_is_waited_for() -> None:
    found = run_ranks(3, deal, delay=lambda rank, what: 0.02 * rank)
    assert found == [expected(rank, 3) for rank in range(3)]


# -- processes -----------------------------------------------------------------------------------


def exchange(group: dist.ProcessGroup) -> tuple[list[list[list[float]]], list[int]]:
    wires = GroupWires(group, timeout=120.0)
    return [deal(wires, dtype) for dtype in DTYPES], wires.received


def as_on_a_device(group: dist.ProcessGroup) -> tuple[list[list[float]], int]:
    """Exchange by group calls; return how often all ranks have met, too."""
    met = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wires_of, "is_on_host", lambda tensor: False)
        patch.setattr(dist, "get_backend", lambda group: "nccl")
        patch.setattr(dist, "barrier", lambda group: met.append(group))
        wires = GroupWires(group, timeout=120.0)
        for _ in range(2):
            wires.begin(Statement.of("test", "", []))
            got = deal(wires)
    return got, len(met)


def wait_for_nobody(group: dist.ProcessGroup, timeout: float) -> tuple[str, float]:
    """Rank 1 sends less than rank 0 waits for; the error, and how long it took."""
    wires = GroupWires(group, timeout=timeout)
    start = time.monotonic()
    into = [(1 - wires.rank, torch.empty(1000))] * (wires.rank == 0)
    try:
        wires.post([], into, "keys of stage 1 (forward)").wait()
    except ExchangeError as error:
        return str(error), time.monotonic() - start
    if wires.rank == 1:
        time.sleep(2 * timeout)
    return "", 0.0


def send_to_the_dead(group: dist.ProcessGroup) -> str:
    wires = GroupWires(group, timeout=20.0)
    deal(wires)
    if wires.rank == 1:
        os._exit(3)
    try:
        wires.post([], [(1, torch.empty(5))], "keys of stage 2 (forward)").wait()
    except ExchangeError as error:
        raise AssertionError("told: " + str(error)) from None
    return ""


def hang(group: dist.ProcessGroup, seconds: float) -> None:
    time.sleep(seconds * group.rank())


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_exchange_and_count(processes: Pool, ranks: int) -> None:
    for rank, (got, received) in enumerate(processes.run(exchange, ranks=ranks)):
        assert got == [expected(rank, ranks)] * len(DTYPES)
        bytes_each = 2 * rank * sum(dtype.itemsize for dtype in DTYPES)
        assert received == [bytes_each if r != rank else 0 for r in range(ranks)]


def test_a_device_exchanges_by_group_calls_after_all_ranks_have_met(processes: Pool) -> None:
    found = processes.run(as_on_a_device, ranks=3)
    assert found == [(expected(rank, 3), 1) for rank in range(3)]


def test_what_does_not_come_is_an_error_in_words_at_the_deadline() -> None:
    pool = Pool(2)
    try:
        (told, took), _ = pool.run(wait_for_nobody, 0.3)
        assert 0.2 < took < 20
        for part in ("rank 0 of 2, keys of stage 1 (forward)", "4,000 bytes from rank 1"):
            assert part in told
        assert "timeout=0.3" in told
        pool.close()  # gloo has closed all of its pairs
        with pytest.raises(AssertionError) as failed:
            pool.run(send_to_the_dead)
        assert "rank 1: it ended with exit code 3" in str(failed.value)
        assert "told: rank 0 of 2, keys of stage 2" in str(failed.value)
        assert "20 bytes from rank 1: the process group broke off" in str(failed.value)
        pool.run(hang, 0.0)  # now the processes have imported what they need
        with pytest.raises(AssertionError, match=r"rank 0: done\nrank 1: it hangs\n[^$]*in hang"):
            pool.run(hang, 60.0, limit=1.0)
    finally:
        pool.close()


def test_a_group_is_needed() -> None:
    with pytest.raises(CompositionError, match="init_process_group"):
        GroupWires()
