"""Ranks that do not make the same call are told so, each in a sentence, and soon.

Every exchange begins with `Guard.begin`, on every rank. It counts, and makes a *mark* of all that
was said so far: what is equal on all ranks, or they disagree. A statement that is new here is
written into the group's store, and the ranks wait there for each other; one that is known costs
no word. Its mark is the tag of the messages, so that those of different calls never meet, and a
rank that waits too long for one looks into the store for what the others say.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from threading import Thread
from typing import NamedTuple

from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore, Store

from attnkit.arguments import check_int, check_number
from attnkit.errors import LONGEST, CompositionError, ExchangeError, clipped

__all__ = ["Guard", "Said", "Statement"]

MOST_KNOWN = 1024
"""Statements that a guard knows to be agreed on; the oldest is agreed on again."""

SLOW = 0.25
"""Seconds after which who waits for a message asks what the others are doing."""

LINGER = 1.0
"""Seconds that a rank stays for the others to read why it fails: it may host the store."""

_SHORT, _LONG = 0.0002, 0.02  # pauses between two looks at the store, in seconds
_FAILED = "failed"  # the mark of a rank that says why it raises
_UNSAID = (
    "the same in these words; what differs is too long for them, such as the cells of a mask or "
    "a sharding, or was a call before this one"
)
_RULE = (
    "All ranks make the same calls in the same order, with the same composition, lengths, sharding "
    "and dropout seed"
)
_SEEDS = (
    "Each rank draws the seed of a call from torch's generator of the CPU: seed all alike "
    "(torch.manual_seed), and draw alike (nn.Dropout of tensors on the CPU draws a number for each "
    "element, so that ranks with other numbers of tokens get out of step)"
)
_FEW = 4  # words that say what a call is, where it is not told apart from others


class Statement(NamedTuple):
    """What a rank is about to compute: as a number to compare, and in words to print.

    >>> Statement.of("forward", ("Causal()", 16), [("mask", "Causal()")]).told
    'forward, mask Causal()'
    """

    digest: bytes
    words: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, what: str, told: object, words: Sequence[tuple[str, str]]) -> Statement:
        """Return a statement that equals those of other processes with the same repr of `told`."""
        text = f"{what}\n{words!r}\n{told!r}"
        short = ((name, clipped(word, LONGEST)) for name, word in words)
        return cls(blake2b(text.encode(), digest_size=16).digest(), (("", what), *short))

    @property
    def told(self) -> str:
        """All of the words."""
        return _sentence(self.words)


class Said(NamedTuple):
    """What a rank has written into the store: the number of its call, the mark, and its words."""

    number: int
    mark: str
    words: tuple[tuple[str, str], ...]
    failed: bool = False

    def text(self) -> str:
        """Return it for the store."""
        return json.dumps(self)

    @classmethod
    def read(cls, text: bytes) -> Said:
        """Return what a text of the store says."""
        number, mark, words, failed = json.loads(text)
        return cls(number, mark, tuple((name, word) for name, word in words), failed)


class Guard:
    """What keeps the ranks of a group together; each has one, made in the same order.

    `store` is the group's: any of torch's, seen by all ranks. `timeout` seconds are waited for a
    rank that does not come.

    >>> import torch.distributed as dist
    >>> alone = Guard(dist.HashStore(), rank=0, size=1)
    >>> alone.begin(Statement.of("forward", "Causal()", [])) == alone.begin(
    ...     Statement.of("forward", "Causal()", [])
    ... )
    False
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float = 60.0) -> None:
        self.rank = check_int("rank", rank, 0, size - 1)
        self.size = check_int("size", size, 1)
        self.timeout = check_number("timeout", timeout, lambda t: t > 0, "above 0: seconds")
        self.number, self._mark, self._words = 0, "", Statement(b"", ()).words
        self._known: dict[bytes, None] = {}
        self._gate = ""
        self._since = 0  # the call in which it failed last
        with _asking():
            # A rank's first guard of a group speaks to the first of the others, and so on.
            which = store.add(f"attnkit/guards/{rank}", 1) if size > 1 else 1
        self._store = PrefixStore(f"attnkit/{which}", store)

    @classmethod
    def of(cls, group: ProcessGroup, timeout: float = 60.0) -> Guard:
        """Return one for a process group."""
        return cls(group.get_group_store(), group.rank(), group.size(), timeout)

    # -- the three things that an exchange asks for ----------------------------------------

    def begin(self, statement: Statement, data: Sequence[tuple[str, int]] = ()) -> int:
        """Begin an exchange, as every rank does; return the tag of its messages.

        `data` are numbers that ranks must agree on, too, and that are new in each step.
        Raises `CompositionError` where ranks say something else, by rank, and `ExchangeError`
        where one does not come in time.
        """
        self.number += 1
        self._words = (*statement.words, *((name, str(value)) for name, value in data))
        told = f"{self._mark} {self.number} {statement.digest.hex()} {data}"
        self._mark = blake2b(told.encode(), digest_size=8).hexdigest()
        if self.size > 1 and statement.digest not in self._known:
            with _asking():
                self._meet()
            if len(self._known) >= MOST_KNOWN:
                del self._known[next(iter(self._known))]
            self._known[statement.digest] = None
        return int(self._mark[:8], 16) >> 1  # tags are not negative, in 32 bits

    def patient(self, wait: Callable[[], None], let_go: Callable[[], None] | None = None) -> None:
        """Wait for messages by a call that blocks, and look meanwhile at what others say.

        Raises what `wait` does, or `CompositionError` where other ranks are in another call; then
        `let_go` ends the wait.
        """
        failed: list[BaseException] = []
        waiting = Thread(target=_kept, args=(wait, failed), daemon=True, name="attnkit waits")
        waiting.start()
        pause = SLOW
        waiting.join(pause)
        while waiting.is_alive():
            try:
                self.look()
            except BaseException:
                if let_go is not None:
                    let_go()
                    waiting.join(LINGER)
                raise
            waiting.join(pause)
            pause = min(2 * pause, 2.0)
        if failed:
            self.look()  # the other side may have broken off because of something that it has said
            raise failed[0]

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the other ranks what is raised inside, which is a call up to its last message."""
        before = self.number
        try:
            yield
        except Exception as error:
            self.number = max(self.number, before + 1)
            if self.size > 1 and self._since < self.number:
                self._fail(f"raised {type(error).__name__}: {clipped(str(error), LONGEST)}")
            raise

    # -- how ranks meet in the store -----------------------------------------------------

    def _meet(self) -> None:
        """Return when all ranks have come to this very call."""
        self._come()
        start, pause, looked = time.monotonic(), _SHORT, 0.0
        while not self._store.check([self._gate]):
            time.sleep(pause)
            pause = min(2 * pause, _LONG)
            waited = time.monotonic() - start
            if waited > max(2 * looked, SLOW / 4) or waited - looked > SLOW:
                self._compare(meeting=True)
                looked = waited
            # Who gives up takes back that all have come; none can be the last one then.
            if waited > self.timeout and self._store.add(f"came/{self._gate}", -self.size):
                raise self._absent()

    def _come(self) -> None:
        """Say what this rank computes; the last one that comes opens the gate."""
        self._speak()
        before, self._gate = self._gate, f"go/{self.number}/{self._mark}"
        if self._store.add(f"came/{self._gate}", 1) == self.size:
            self._store.set(self._gate, "")
            if before:  # all have passed it
                self._store.delete_key(before)
                self._store.delete_key(f"came/{before}")

    def look(self) -> None:
        """Say what this rank is in, and raise if others are somewhere else, or have failed."""
        with _asking():
            self._speak()
            self._compare()

    def _speak(self, failed: bool = False) -> None:
        said = Said(self.number, self._mark, self._words, failed)
        self._store.set(f"said/{self.rank}", said.text())

    def _heard(self) -> dict[int, Said]:
        """Return what each rank has said last, of those that have said something."""
        keys = {rank: f"said/{rank}" for rank in range(self.size)}
        return {
            rank: Said.read(self._store.get(key))
            for rank, key in keys.items()
            if self._store.check([key])
        }

    def _compare(self, meeting: bool = False) -> None:
        """Raise where a rank is in this call with something else, or has failed."""
        heard = self._heard()
        odd = any(self._is_odd(one) for one in heard.values())
        if meeting and not odd and any(one.number > self.number for one in heard.values()):
            odd = not self._store.check([self._gate])  # it has not come here, and went on
        if odd:
            raise self._told()

    def _is_odd(self, said: Said) -> bool:
        elsewhere = said.number == self.number and said.mark != self._mark
        return elsewhere or (said.failed and said.number > self._since)

    # -- what is raised ------------------------------------------------------------------

    def _told(self) -> CompositionError | ExchangeError:
        """Return the table of what the ranks say, after giving all of them time to say it."""
        end = time.monotonic() + LINGER / 2
        heard = self._heard()
        while not self._all(heard) and time.monotonic() < end:
            time.sleep(_LONG)
            heard = self._heard()
        here = {r: one for r, one in heard.items() if one.failed or one.number >= self.number}
        table = _table(here, self.number)
        silent = [r for r in range(self.size) if r not in here]
        if silent:
            table += f"\n  {_ranks(silent)}: not in this call so far"
        mark = self._mark
        self._speak(failed=True)
        self._leave()
        if all(one.mark in (mark, _FAILED) for one in here.values()):
            return ExchangeError(f"a rank of this group failed in call {self.number}:\n{table}")
        seeds = all("dropout seed" in line for line in table.splitlines())
        rule = _SEEDS if seeds else _RULE
        return CompositionError(
            f"the ranks of this group disagree in call {self.number}:\n{table}\n{rule}"
        )

    def _absent(self) -> ExchangeError:
        heard = self._heard()
        missing = [r for r in range(self.size) if r not in heard or heard[r].number < self.number]
        last = [
            f"rank {r} said last: call {heard[r].number}, {_sentence(heard[r].words[:_FEW])}"
            for r in missing
            if r in heard
        ]
        what = f"call {self.number} ({_sentence(self._words[:_FEW])})"
        self._fail(f"waited {self.timeout:g} s for {_ranks(missing)}, and gave up")
        return ExchangeError(
            f"{_ranks(missing)} of {self.size} did not come to {what} in {self.timeout:g} s "
            "(timeout=): absent, late, or busy elsewhere" + "".join(f". {one}" for one in last[:4])
        )

    def _fail(self, why: str) -> None:
        """Write into the store why this rank fails, as far as there still is one."""
        self._mark, self._words = _FAILED, (("", why),)
        try:
            self._speak(failed=True)
            self._leave()
        except RuntimeError:
            return  # its own error is the one to raise

    def _leave(self) -> None:
        """Stay until the others have read or failed, too; then forget what was agreed on."""
        self._store.set(f"read/{self.rank}", str(self.number))
        end = time.monotonic() + LINGER
        while time.monotonic() < end and not all(map(self._is_done, range(self.size))):
            time.sleep(_LONG)
        self._mark, self._gate, self._since = "", "", self.number
        self._known.clear()

    def _is_done(self, rank: int) -> bool:
        key = f"read/{rank}"
        return self._store.check([key]) and int(self._store.get(key)) > self._since

    def _all(self, heard: dict[int, Said]) -> bool:
        return len(heard) == self.size and all(
            one.failed or one.number >= self.number for one in heard.values()
        )


@contextmanager
def _asking() -> Iterator[None]:
    """Say it in our words where the store does not answer."""
    try:
        yield
    except (CompositionError, ExchangeError):
        raise
    except RuntimeError as error:
        raise ExchangeError(
            "the store of the process group does not answer any more "
            f"({clipped(str(error).partition(chr(10))[0], LONGEST)}): the process that hosts it, "
            "mostly rank 0, has ended; see what it says"
        ) from error


def _kept(wait: Callable[[], None], failed: list[BaseException]) -> None:
    try:
        wait()
    except BaseException as error:
        failed.append(error)


def _sentence(words: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {word}" if name else word for name, word in words)


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {shown}{more}"


def _table(heard: dict[int, Said], number: int) -> str:
    """Return a line for all ranks that say the same, of what they do not all say."""
    by_mark: dict[Said, list[int]] = {}
    for rank, said in sorted(heard.items()):
        by_mark.setdefault(said._replace(failed=False), []).append(rank)
    plans = [said for said in by_mark if said.mark != _FAILED]
    alike = set(plans[0].words).intersection(*(one.words for one in plans)) if plans else set()
    lines = []
    for said, ranks in list(by_mark.items())[:8]:
        # Where nothing is alike, or all is, its first words say what a call is.
        words = [word for word in said.words if word not in alike]
        if len(plans) == 1 or len(words) == len(said.words):
            words = list(said.words[:_FEW])
        told = _sentence(words) or _UNSAID
        where = "" if said.number == number else f"in call {said.number}, "
        lines.append(f"  {_ranks(ranks)}: {where}{told}")
    more = len(by_mark) - len(lines)
    return "\n".join([*lines, *([f"  {more} more say something else"] if more else [])])
