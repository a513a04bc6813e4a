"""Masks of transformers as sets: equal to its own dense masks, without a cell being asked."""

from __future__ import annotations

from random import Random
from types import FunctionType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnkit import masks
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.masks import from_transformers

transformers = pytest.importorskip("transformers")

from transformers import masking_utils as mu  # noqa: E402
from transformers.models.gemma3 import modeling_gemma3 as gemma3  # noqa: E402
from transformers.models.gemma4 import modeling_gemma4 as gemma4  # noqa: E402
from transformers.models.nemotron_asr_streaming import (  # noqa: E402
    modeling_nemotron_asr_streaming as nemotron,
)
from transformers.models.t5gemma2 import modeling_t5gemma2 as t5gemma2  # noqa: E402


def prefill_overlay(kv_offset: int, prefill_length: float) -> Any:
    """The closure of unlimited_ocr, made with values of ours."""
    from transformers.models.unlimited_ocr import modeling_unlimited_ocr as ocr

    code = next(
        one
        for one in ocr.create_reference_sliding_window_causal_mask.__code__.co_consts
        if getattr(one, "co_name", "") == "prefill_overlay"
    )
    values = {"kv_offset": kv_offset, "prefill_length": prefill_length}
    cells = tuple(_cell(values[name]) for name in code.co_freevars)
    made = FunctionType(code, vars(ocr), closure=cells)
    made.__module__ = ocr.__name__
    made.__qualname__ = "create_reference_sliding_window_causal_mask.<locals>.prefill_overlay"
    return made


def _cell(value: object) -> Any:
    return (lambda: value).__closure__[0]


def all_pairs() -> Any:
    """What gemma3 and step3p7 join a mask with to see everything."""
    made = lambda *args: torch.tensor(True, dtype=torch.bool)  # noqa: E731
    made.__module__ = gemma3.__name__
    made.__globals__  # noqa: B018 -- torch is a global of both
    return made


class Case:
    """A random mask function of transformers at random lengths, offsets and paddings."""

    def __init__(self, seed: int) -> None:
        random = self.random = Random(seed)
        self.batch, self.q_len = random.randint(1, 3), random.randint(1, 8)
        self.q_offset, self.kv_offset, self.kv_len = self.place()
        self.tokens = max(self.q_offset + self.q_len, self.kv_offset + self.kv_len)
        self.function = self.tree(2)
        packs = (self.q_offset, self.kv_offset, self.kv_len) == (0, 0, self.q_len)
        if packs and random.random() < 0.5:
            self.pack()
        self.given_offset = self.q_offset
        if self.q_offset and random.random() < 0.2:
            moved = random.randint(0, self.q_offset)
            self.given_offset -= moved
            self.function = mu.add_offsets_to_mask_function(self.function, moved, 0)
        self.attention_mask = self.padding() if random.random() < 0.6 else None

    def place(self) -> tuple[int, int, int]:
        """Offsets of queries and keys, and how many keys: of no cache, or of one of four kinds."""
        random, q_len = self.random, self.q_len
        before, held = random.randint(0, 6), random.randint(0, 6)
        return random.choice(
            [
                (0, 0, q_len),
                (before, 0, before + q_len),
                (before, 0, before + q_len + held),
                (before + held, before, held + q_len),
                (before, held, random.randint(1, 10)),
            ]
        )

    def tree(self, depth: int) -> Any:
        if depth == 0 or self.random.random() < 0.4:
            return self.leaf()
        join = self.random.choice([mu.and_masks, mu.or_masks])
        return join(*[self.tree(depth - 1) for _ in range(self.random.randint(1, 3))])

    def leaf(self) -> Any:
        size, random = self.random.randint(1, 6), self.random
        leaves = [
            lambda: mu.causal_mask_function,
            lambda: mu.bidirectional_mask_function,
            lambda: mu.sliding_window_overlay(size),
            lambda: mu.sliding_window_causal_mask_function(size),
            lambda: mu.sliding_window_bidirectional_overlay(size - 1),
            lambda: mu.chunked_overlay(size, torch.tensor(self.numbers(0, 6, self.batch))),
            lambda: mu.blockwise_overlay(self.ids()),
            lambda: mu.packed_sequence_mask_function(self.ids()),
            lambda: mu.padding_mask_function(self.ids() >= 0),
            lambda: gemma3._bidirectional_window_overlay(size),
            lambda: gemma4.sliding_window_mask_function((size - 1, random.randint(0, 4))),
            lambda: t5gemma2.sliding_window_mask_function(size, random.random() < 0.5),
        ]
        return random.choice(leaves)()

    def numbers(self, least: int, most: int, count: int) -> list[int]:
        return [self.random.randint(least, most) for _ in range(count)]

    def ids(self) -> torch.Tensor:
        """A number per token: of runs that come once, that return, or of anything."""
        rows = []
        for _ in range(self.batch):
            size, random = self.random.randint(1, 5), self.random.random()
            row = self.numbers(-1, 2, self.tokens)
            if random < 0.7:
                row = [i // size - 1 for i in range(self.tokens)]
            rows.append([i % 3 - 1 for i in row] if random < 0.3 else row)
        return torch.tensor(rows)

    def pack(self) -> None:
        """Ask with positions that begin anew with each text, as packed batches do."""
        rows: list[list[int]] = []
        for _ in range(self.batch):
            row: list[int] = []
            while len(row) < self.q_len:
                row += range(self.random.randint(1, self.q_len))
            rows.append(row[: self.q_len])
        positions = torch.tensor(rows)
        ids = mu.find_packed_sequence_indices(positions)
        if ids is not None:
            self.function = mu.packed_sequence_compatibility_function(self.function, positions, ids)

    def padding(self) -> torch.Tensor:
        size = self.random.randint(max(1, self.tokens - 3), self.tokens + 2)
        rows = []
        for _ in range(self.batch):
            n = self.random.randint(0, size)
            rows.append(
                self.random.choice([[1] * n + [0] * (size - n), [0] * (size - n) + [1] * n])
            )
        if self.random.random() < 0.3:
            rows = [self.numbers(0, 1, size) for _ in rows]
        return torch.tensor(rows).bool()

    def lifted(self) -> masks.Lifted:
        return from_transformers(
            self.function,
            self.q_len,
            self.kv_len,
            batch=self.batch,
            q_offset=self.given_offset,
            kv_offset=self.kv_offset,
            attention_mask=self.attention_mask,
        )

    def meant(self) -> torch.Tensor:
        """What transformers' own sdpa would be given."""
        return mu.sdpa_mask(
            self.batch,
            self.q_len,
            self.kv_len,
            self.given_offset,
            self.kv_offset,
            self.function,
            self.attention_mask,
            allow_is_causal_skip=False,
        )


@pytest.mark.parametrize("part", range(4))
def test_random_compositions_are_the_mask_of_sdpa(part: int) -> None:
    for seed in range(part * 400, part * 400 + 400):
        case = Case(seed)
        found = case.lifted()
        drawn = found.mask.materialize(case.q_len, case.kv_len, case.batch)
        assert torch.equal(drawn, case.meant().expand_as(drawn)), (seed, found)
        assert not found.cells_read, (seed, found)


TEXTS = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
POSITIONS = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4]])
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
IMAGES = torch.tensor([[-1, 0, 0, -1, 1, 1]])
CAUSAL = mu.causal_mask_function

NAMED: list[tuple[Any, dict[str, Any], str]] = [
    (CAUSAL, {}, "Causal()"),
    (mu.bidirectional_mask_function, {}, "Full()"),
    (mu.sliding_window_causal_mask_function(4), {}, "SlidingWindow(4)"),
    (mu.sliding_window_bidirectional_mask_function(2), {}, "Band(2, 2)"),
    (gemma3._bidirectional_window_overlay(3), {}, "Band(2, 2)"),
    (mu.or_masks(CAUSAL, gemma3._bidirectional_window_overlay(3)), {}, "Band(None, 2)"),
    (mu.or_masks(CAUSAL, all_pairs()), {}, "Full()"),
    (t5gemma2.sliding_window_mask_function(4, is_causal=False), {}, "Band(1, 2)"),
    (gemma4.sliding_window_mask_function((3, 2)), {}, "Band(2, 1)"),
    (nemotron.chunked_limited_mask_function(4, 1), {}, "BlockCausal(2, before=2)"),
    (mu.and_masks(CAUSAL, prefill_overlay(0, 4)), {}, "Causal() & Prefix(4)"),
    (mu.and_masks(CAUSAL, prefill_overlay(0, float("inf"))), {}, "Causal()"),
    (
        mu.chunked_causal_mask_function(4, torch.tensor([2, 0])),
        {"attention_mask": LEFT},
        "Causal() & Chunked(4, phase=(2, 0)) & ~Prefix((2, 0))",
    ),
    (mu.chunked_causal_mask_function(4, torch.tensor([4, 0])), {}, "Causal() & Chunked(4)"),
    (
        mu.packed_sequence_compatibility_function(CAUSAL, POSITIONS, TEXTS),
        {},
        "Causal() & Documents(((2, 3, 1), (1, 5)))",
    ),
    (
        mu.or_masks(CAUSAL, mu.blockwise_overlay(IMAGES)),
        {},
        "Causal() | Spans(((1, 3), (4, 6)))",
    ),
    (
        mu.or_masks(CAUSAL, mu.blockwise_overlay(IMAGES % 2)),
        {},
        "Causal() | SameId(((1, 1), (0, 2), (1, 3)))",
    ),
    (CAUSAL, {"attention_mask": LEFT}, "Causal() & ~Prefix((2, 0))"),
    (CAUSAL, {"attention_mask": LEFT.flip(1)}, "Causal() & Padding((4, 6))"),
    (CAUSAL, {"attention_mask": torch.ones(2, 6)}, "Causal()"),
    (
        CAUSAL,
        {"attention_mask": torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0]])},
        "Causal() & Keys((((0, 1), (2, 4), (5, None)), ((0, 5),)))",
    ),
]


@pytest.mark.parametrize(("function", "more", "text"), NAMED, ids=[text for *_, text in NAMED])
def test_what_is_composed_has_a_name(function: Any, more: dict[str, Any], text: str) -> None:
    found = from_transformers(function, 6, 6, batch=2, **more)
    assert str(found.mask) == text
    assert not found.cells_read
    assert masks.parse(text) == found.mask


STEPS = {
    "causal": (CAUSAL, "Causal()"),
    "window": (mu.sliding_window_causal_mask_function(3), "SlidingWindow(3)"),
    "chunks": (
        mu.chunked_causal_mask_function(4, torch.tensor([1, 0])),
        "Causal() & Chunked(4, phase=(1, 0))",
    ),
    "images": (mu.or_masks(CAUSAL, mu.blockwise_overlay(IMAGES[:, :1].expand(2, 12))), "Causal()"),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("padded", [False, True])
def test_steps_of_a_growing_cache_have_one_mask(name: str, padded: bool) -> None:
    function, text = STEPS[name]
    text += " & ~Prefix((1, 0))" if padded else ""
    for kv_len in range(2, 12):
        given = torch.ones(2, kv_len, dtype=torch.bool)
        given[0, 0] = not padded
        found = from_transformers(
            function, 1, kv_len, batch=2, q_offset=kv_len - 1, attention_mask=given
        )
        assert masks.parse(text) == found.mask


@pytest.mark.parametrize("step", range(1, 6))
def test_a_window_that_forgets_and_a_cache_that_is_longer(step: int) -> None:
    """A sliding cache moves the keys; a static one has keys that are not written yet."""
    window = mu.sliding_window_causal_mask_function(4)
    sliding = from_transformers(window, 1, 4, q_offset=3 + step, kv_offset=step)
    assert sliding.mask == masks.SlidingWindow(4)
    given = torch.tensor([[0, 1, 1], [1, 1, 1]])
    static = from_transformers(CAUSAL, 1, 9, batch=2, q_offset=step, attention_mask=given)
    assert static.mask.region(1, 9, 0) == masks.Keys([(1, min(step + 1, 3))]).region(1, 9)
    prefill = from_transformers(CAUSAL, 3, 9, batch=2, attention_mask=given)
    assert str(prefill.mask) == "Causal(align='top_left') & ~Prefix((1, 0))"
    offset = from_transformers(CAUSAL, 1, 9, q_offset=torch.tensor(step))
    assert offset.mask.region(1, 9) == masks.Prefix(step + 1).region(1, 9)


def test_what_is_not_known_is_read_and_named_once() -> None:
    def odd(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i + j) % 3 != 0

    def by_text(b: Any, h: Any, i: Any, j: Any) -> Any:
        return j >= b

    found = from_transformers(mu.and_masks(CAUSAL, odd), 6, 8, batch=2, q_offset=2)
    want = mu.sdpa_mask(2, 6, 8, 2, 0, mu.and_masks(CAUSAL, odd), allow_is_causal_skip=False)
    assert torch.equal(found.mask.materialize(6, 8, 2), want)
    assert found.cells_read == 48
    assert [part for part in found.parts if "odd" in part] == [found.parts[1]]
    assert "read cell by cell" in str(found)
    each = from_transformers(by_text, 4, 4, batch=3)
    assert each.cells_read == 48
    assert [each.mask.region(4, 4, b).area for b in range(3)] == [16, 12, 8]


def test_positions_that_do_not_count_on_are_read() -> None:
    """Inside of a text, these go back: no stretch of distances says what causal means."""
    positions = torch.tensor([[0, 2, 1, 3, 0, 1]])
    for ids in (torch.tensor([[0, 0, 0, 0, 1, 1]]), None):
        remapped = mu.remap_positions_for_packed_sequence(CAUSAL, positions)
        if ids is not None:
            remapped = mu.and_masks(mu.packed_sequence_mask_function(ids), remapped)
        found = from_transformers(remapped, 6, 6, batch=1)
        want = mu.sdpa_mask(1, 6, 6, 0, 0, remapped, allow_is_causal_skip=False)
        assert torch.equal(found.mask.materialize(6, 6), want)
        assert found.cells_read == 36


def test_code_that_means_something_else_under_a_known_name_is_read() -> None:
    """A version of transformers whose window keeps one key more would be noticed."""

    def sliding_window_overlay(sliding_window: int) -> Any:
        def inner_mask(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
            return kv_idx >= q_idx - sliding_window

        return inner_mask

    fake = sliding_window_overlay(3)
    fake.__module__, fake.__qualname__ = (
        getattr(mu.sliding_window_overlay(3), name) for name in ("__module__", "__qualname__")
    )
    found = from_transformers(mu.and_masks(CAUSAL, fake), 8, 8)
    assert found.cells_read == 64
    assert found.mask.region(8, 8) == masks.SlidingWindow(4).region(8, 8)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.numel())
        return out


def test_nothing_of_the_square_of_the_length_is_made() -> None:
    size = 32768
    positions = torch.arange(size).remainder(5000)[None]
    ids = mu.find_packed_sequence_indices(positions)
    window = mu.sliding_window_causal_mask_function(1024)
    images = mu.blockwise_overlay(torch.arange(size)[None] // 100 % 50 - 1)
    left = (torch.arange(size) > 100).expand(2, size)
    with Largest() as seen:
        packed = mu.packed_sequence_compatibility_function(window, positions, ids)
        for function in (packed, mu.or_masks(CAUSAL, images), window):
            found = from_transformers(function, size, size, attention_mask=left)
            assert found.mask.region(size, size).area > size
            assert not found.cells_read
    assert 0 < seen.numel <= 4 * size


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a tensor": ({"mask_function": torch.ones(2, 2)}, "a tensor of shape"),
    "a mask of four axes": ({"attention_mask": torch.ones(1, 1, 4, 4)}, "of four axes"),
    "a mask of another batch": ({"attention_mask": torch.ones(3, 4), "batch": 2}, "3 rows for 2"),
    "no length": ({"q_len": -1}, "q_len=-1"),
    "an offset of float": ({"q_offset": 0.5}, "q_offset=0.5"),
    "no batch": ({"batch": 0}, "batch=0"),
    "ids of fewer tokens": (
        {"mask_function": mu.blockwise_overlay(torch.zeros(1, 3))},
        "a tensor of 3 tokens at 0 to 3",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_told(name: str) -> None:
    given, told = WRONG[name]
    full = {"mask_function": CAUSAL, "q_len": 4, "kv_len": 4, **given}
    with pytest.raises((CompositionError, CompositionTypeError), match=told):
        from_transformers(full.pop("mask_function"), full.pop("q_len"), full.pop("kv_len"), **full)
