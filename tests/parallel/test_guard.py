"""Ranks that do not make the same call are told so by rank, each of them, and soon."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore

from attnkit.errors import AttnkitError, CompositionError, ExchangeError
from attnkit.parallel import guard as guards
from attnkit.parallel.guard import MOST_KNOWN, Guard, Said, Statement
from attnkit.parallel.wires import GroupWires
from tests.parallel.processes import Pool

SOON = 1.0
"""Seconds of waiting until ranks that disagree know it; a busy machine's own come on top."""


def said(mask: str = "Causal()", tokens: int = 64, what: str = "forward") -> Statement:
    words = [("mask", mask), ("tokens", str(tokens))]
    return Statement.of(what, (mask, tokens), words)


SEED = (("seed", 1),)
A, B = said(), said("SlidingWindow(8)")


def together(
    size: int, act: Callable[[Guard], object], timeout: float = 20.0, store: object = None
) -> list[object]:
    """Return what each rank gets or raises."""
    store = HashStore() if store is None else store
    found: list[object] = [None] * size

    def work(rank: int) -> None:
        try:
            found[rank] = act(Guard(store, rank, size, timeout))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(30)
    assert not any(one.is_alive() for one in threads), found
    return found


def messages(found: list[object]) -> list[str]:
    for one in found:
        assert isinstance(one, AttnkitError), found
    return [str(one) for one in found]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_ranks_that_agree_get_one_tag_for_each_call(size: int) -> None:
    def act(guard: Guard) -> list[int]:
        return [
            guard.begin(one, data)
            for one, data in ((A, SEED), (A, SEED), (A, [("seed", 2)]), (B, ()))
        ]

    found = together(size, act)
    assert all(one == found[0] for one in found)
    assert len(set(found[0])) == 4
    assert all(0 <= tag < 2**31 for tag in found[0])


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (B, ("mask Causal()", "mask SlidingWindow(8)")),
        (said(tokens=65), ("tokens 64", "tokens 65")),
        (said(what="backward"), ("forward", "backward")),
        (Statement.of("forward", "other cells", A.words[1:]), ("the same in these words",) * 2),
    ],
)
def test_ranks_that_differ_are_told_by_rank(other: Statement, told: tuple[str, str]) -> None:
    def act(guard: Guard) -> None:
        start.wait()
        begun = time.monotonic()
        try:
            guard.begin(other if guard.rank == 1 else A)
        finally:
            took.append(time.monotonic() - begun)

    start, took = threading.Barrier(3), []
    found = messages(together(3, act))
    assert found[0] == found[1] == found[2]
    assert f"  ranks 0, 2: {told[0]}" in found[0]
    assert f"  rank 1: {told[1]}" in found[0]
    assert found[0].startswith("the ranks of this group disagree in call 1:\n")
    assert max(took) < 5 * SOON  # of processes' time on a busy machine


def test_a_dropout_seed_that_differs_is_told() -> None:
    found = messages(together(2, lambda guard: guard.begin(A, [("dropout seed", 10 + guard.rank)])))
    assert "rank 0: dropout seed 10" in found[1]
    assert "rank 1: dropout seed 11" in found[0]


def test_a_rank_that_is_late_is_waited_for_and_one_that_does_not_come_is_named() -> None:
    def late(guard: Guard) -> int:
        time.sleep(0.4 * (guard.rank == 1))
        return guard.begin(A)

    assert len(set(together(3, late))) == 1

    def absent(guard: Guard) -> None:
        guard.begin(A)
        if guard.rank != 1:
            guard.begin(B)

    found = together(3, absent, timeout=0.3)
    assert found[1] is None
    assert all(isinstance(one, ExchangeError) for one in found[::2])
    first, second = sorted((str(found[0]), str(found[2])), key=lambda told: "gave up" in told)
    if "gave up" in second:  # who comes to the deadline first tells the other
        assert "waited 0.3 s for rank 1, and gave up" in second
        assert "rank 1: not in this call so far" in second
    told = first
    assert "rank 1 of 3 did not come to call 2 (forward, mask SlidingWindow(8)" in told
    assert "in 0.3 s (timeout=)" in told
    assert "rank 1 said last: call 1, forward, mask C" in told


def test_a_rank_that_comes_after_all_have_given_up_is_told_why() -> None:
    def act(guard: Guard) -> None:
        time.sleep(1.0 * (guard.rank == 1))
        guard.begin(A)

    found = messages(together(2, act, timeout=0.2))
    assert "did not come to call 1" in found[0]
    assert "a rank of this group failed in call 1:\n  rank 0: waited 0.2 s for rank 1" in found[1]


def test_a_rank_that_waits_for_messages_of_a_known_call_finds_out() -> None:
    """Rank 1 changes nothing, so that it goes straight into the exchange."""

    def act(guard: Guard) -> None:
        for statement in (A, B if guard.rank == 0 else A):
            guard.begin(statement)
            guard.patient(lambda: time.sleep(3.0 * (guard.number == 2)))

    for told in messages(together(2, act)):
        assert "call 2" in told
        assert "rank 0: mask SlidingWindow(8)" in told
        assert "rank 1: mask Causal()" in told


def test_ranks_in_different_calls_that_both_know_find_out() -> None:
    def act(guard: Guard) -> None:
        guard.begin(A)
        guard.begin(B)
        guard.begin(A if guard.rank else B)
        guard.patient(lambda: time.sleep(3.0))

    for told in messages(together(2, act)):
        assert "in call 3" in told
        assert "rank 0: mask SlidingWindow(8)" in told


def test_a_call_that_differed_unnoticed_is_told_with_the_next_new_one() -> None:
    def act(guard: Guard) -> None:
        guard.begin(A)
        guard.begin(A, [("seed", guard.rank)])  # no message went, so nobody waited
        guard.begin(B)

    assert "or was a call before this one" in messages(together(2, act))[0]


def test_a_rank_that_goes_on_without_the_others_is_told() -> None:
    def act(guard: Guard) -> None:
        guard.begin(A)
        if guard.rank == 0:
            guard.begin(B)
        else:  # as on devices that no host waits for
            guard.begin(A)
            guard.begin(said(tokens=7))

    found = messages(together(2, act))
    assert "rank 1: in call 3, mask Causal(), tokens 7" in found[0]
    assert "rank 0: in call 2, mask SlidingWindow(8), tokens 64" in found[1]


def test_what_one_rank_raises_is_told_to_those_that_wait() -> None:
    def act(guard: Guard) -> None:
        with guard.telling():
            if guard.rank == 1:
                raise CompositionError("query has 5 tokens, its shard 6")
            guard.begin(A)

    found = messages(together(2, act))
    assert found[1] == "query has 5 tokens, its shard 6"
    assert found[0].startswith("a rank of this group failed in call 1:\n  rank 0: forward, mask")
    assert "rank 1: raised CompositionError: query has 5 tokens, its shard 6" in found[0]


def test_all_that_fail_alike_raise_their_own_error_and_go_on_together() -> None:
    def act(guard: Guard) -> int:
        start = time.monotonic()
        for _ in range(3):
            with pytest.raises(KeyError, match="mine"), guard.telling():
                raise KeyError("mine")
        assert time.monotonic() - start < 3 * guards.LINGER  # nobody waits to be read
        return guard.begin(A)

    assert len(set(together(3, act))) == 1


def test_ranks_may_agree_again_after_they_did_not() -> None:
    def act(guard: Guard) -> int:
        guard.begin(A)
        with pytest.raises(CompositionError, match="call 2"):
            guard.begin(B, [("seed", guard.rank)])
        return guard.begin(A)

    assert len(set(together(3, act))) == 1


def test_a_wait_that_fails_says_what_the_other_side_says() -> None:
    def act(guard: Guard) -> None:
        with guard.telling():
            guard.begin(A)
            if guard.rank:
                raise ValueError("out of memory")
            time.sleep(0.2)
            guard.patient(broken)

    def broken() -> None:
        raise RuntimeError("connection closed by peer")

    found = together(2, act)
    assert isinstance(found[1], ValueError)
    assert "rank 1: raised ValueError: out of memory" in str(found[0])
    alone = Guard(HashStore(), 0, 1)
    with pytest.raises(RuntimeError, match="by peer"):
        alone.patient(broken)


def test_a_store_that_is_gone_is_told() -> None:
    host = dist.TCPStore("localhost", 0, 1, is_master=True, wait_for_workers=False)
    guest = dist.TCPStore("localhost", host.port, 1, is_master=False)
    guard = Guard(guest, 1, 2, timeout=5.0)
    del host
    with pytest.raises(ExchangeError, match="the store of the process group does not answer"):
        guard.begin(A)


def test_guards_of_one_group_speak_to_their_like() -> None:
    store = HashStore()

    def act(rank: int, found: list[object]) -> None:
        one, two = (Guard(store, rank, 2) for _ in range(2))
        found.append([two.begin(B), one.begin(A)])

    found: list[object] = []
    threads = [threading.Thread(target=act, args=(rank, found)) for rank in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(20)
    assert len(found) == 2
    assert found[0] == found[1]


def test_the_store_and_the_guard_keep_no_more_than_they_need() -> None:
    store = HashStore()

    def act(guard: Guard) -> int:
        for k in range(40):
            guard.begin(said(tokens=k))
            guard.begin(said(tokens=k))
            if guard.rank == 0:
                guard.look()  # as one that waits for long
        return len(guard._known)

    assert together(2, act, store=store) == [40, 40]
    # A word of each rank, a gate, who came to it, and how many guards each rank has made.
    assert store.num_keys() <= 2 + 2 + 2 + 1
    alone = Guard(HashStore(), 0, 1)
    alone.size = 2
    alone._meet = lambda: None
    for k in range(MOST_KNOWN + 5):
        alone.begin(said(tokens=k))
    assert len(alone._known) == MOST_KNOWN


def test_a_call_that_is_known_asks_the_store_nothing() -> None:
    def act(guard: Guard) -> None:
        guard.begin(A)
        guard._store = None  # any use of it is an error
        for _ in range(100):
            guard.begin(A)

    assert together(2, act) == [None, None]


def test_words_are_bounded_and_travel_as_they_are() -> None:
    long = Statement.of("forward", "x", [("mask", "y" * 10**5)])
    assert len(long.told) < 300
    assert Said.read(Said(3, "m", long.words, True).text().encode()) == (3, "m", long.words, True)
    found = messages(together(9, lambda guard: guard.begin(said("z" * 500 + str(guard.rank)))))
    assert len(found[0]) <= 2000
    assert re.search(r"1 more say something else", found[0])


# -- over processes ------------------------------------------------------------------------------


def mixed(group: dist.ProcessGroup, case: str) -> tuple[str, float]:
    """Agree on two calls; then rank 1 makes another third call than rank 0."""
    alone = dist.new_group([0, 1])  # it will be broken
    if group.rank() > 1:
        return "", 0.0
    wires = GroupWires(alone, timeout=30.0)
    other = 1 - wires.rank
    for call, statement in enumerate((A, B, A)):
        turned = case != "agree" and call == 2 and wires.rank == 1
        if case == "raises" and turned:
            with pytest.raises(ValueError, match="mine"), wires.telling():
                raise ValueError("mine")
            return "", 0.0
        start = time.monotonic()
        count = 100 if turned else 7  # gloo ends a process that receives more than it awaits
        into = torch.zeros(count)
        try:
            wires.begin({"plan": B, "new": said("Full()")}.get(case, A) if turned else statement)
            wires.post([(other, torch.ones(count))], [(other, into)], "keys").wait()
        except AttnkitError as error:
            took = time.monotonic() - start
            # One that outlives the interpreter ends the process with a signal.
            assert "attnkit waits" not in [one.name for one in threading.enumerate()]
            return f"{type(error).__name__}: {error}", took
        assert into.tolist() == [1.0] * count
    return "", 0.0


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("plan", ("rank 0: mask Causal()", "rank 1: mask SlidingWindow(8)")),
        ("new", ("rank 0: mask Causal()", "rank 1: mask Full()")),
        ("raises", ("rank 1: raised ValueError: mine",)),
        ("agree", ()),
    ],
)
def test_processes_in_different_calls_find_out(
    processes: Pool, case: str, told: tuple[str, ...]
) -> None:
    found = processes.run(mixed, case)[:2]
    if case == "agree":
        assert found == [("", 0.0)] * 2
    for rank, (error, took) in enumerate(found):
        if told and not (case == "raises" and rank == 1):
            assert all(part in error for part in told), error
            assert took < 10 * SOON, found
