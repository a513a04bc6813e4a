"""Every byte is learnt from once per epoch, and no held-out text is learnt from at all."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise

import pytest
import torch

from lm.data import (
    START,
    Corpus,
    Document,
    collate,
    cut,
    families,
    held_out_batches,
    load_corpus,
    pack,
    training_batches,
)

DOCUMENTS = tuple(
    Document(name, bytes(range(first, first + n)))
    for name, first, n in [("a", 0, 50), ("b", 50, 1), ("c", 51, 24), ("d", 75, 97)]
)
TOTAL = sum(len(d.text) for d in DOCUMENTS)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


def test_the_corpus_is_the_documentation_that_python_carries(corpus: Corpus) -> None:
    sizes = [sum(len(d.text) for d in side) for side in (corpus.train, corpus.held_out)]
    assert sum(sizes) > 400_000
    assert 0.05 < sizes[1] / sum(sizes) < 0.2


def test_no_paragraph_is_on_both_sides(corpus: Corpus) -> None:
    def paragraphs(documents: tuple[Document, ...]) -> set[str]:
        found = set()
        for document in documents:
            for block in document.text.decode().split("\n\n"):
                found.add(" ".join(block.split()))
        return {p for p in found if len(p) >= 40}

    assert not paragraphs(corpus.train) & paragraphs(corpus.held_out)


def test_families_join_documents_that_share_a_paragraph_through_others() -> None:
    shared, other = "x" * 40, "y" * 40
    documents = [
        Document("a", shared.encode()),
        Document("b", f"{shared}\n\n{other}".encode()),
        Document("c", f"alone\n\n  {other[:20]}{other[20:]}\n".encode()),
        Document("d", b"alone"),  # too short a paragraph to count
        Document("e", ("z" * 200).encode()),
    ]
    names = [sorted(d.name for d in family) for family in families(documents)]
    assert sorted(names) == [["a", "b", "c"], ["d"], ["e"]]
    assert names[-1] == ["d"]


@pytest.mark.parametrize("first", range(9))
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 30])
def test_cut_predicts_every_byte_once_and_in_order(size: int, first: int) -> None:
    tokens = Document("d", bytes(range(size))).tokens()
    pieces = cut(tokens, 8, first)
    assert [t for piece in pieces for t in piece[1:].tolist()] == list(range(size))
    assert all(2 <= len(piece) <= 9 for piece in pieces)
    assert not pieces or pieces[0][0] == START
    assert all(a[-1] == b[0] for a, b in pairwise(pieces))


def test_pack_closes_a_batch_where_the_next_piece_does_not_fit() -> None:
    pieces = [torch.zeros(n + 1) for n in (3, 5, 4, 4, 1, 9, 2)]
    packed = [[len(p) - 1 for p in batch] for batch in pack(pieces, 8)]
    assert packed == [[3, 5], [4, 4], [1], [9], [2]]


def test_collate_shifts_by_one_and_keeps_sequences_apart() -> None:
    batch = collate([torch.tensor([START, 1, 2]), torch.tensor([2, 3])])
    assert batch.inputs.tolist() == [START, 1, 2]
    assert batch.targets.tolist() == [1, 2, 3]
    assert batch.lengths == (2, 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_epoch_has_every_byte_once_as_a_target(seed: int) -> None:
    batches = training_batches(DOCUMENTS, max_len=8, tokens_per_batch=20, seed=seed)
    for _epoch in range(3):
        seen: Counter[int] = Counter()
        while seen.total() < TOTAL:
            batch = next(batches)
            assert len(batch.targets) == sum(batch.lengths) <= 20
            assert max(batch.lengths) <= 8
            seen.update(batch.targets.tolist())
        assert seen == Counter(range(TOTAL))


def test_held_out_batches_have_every_byte_once_in_order() -> None:
    batches = held_out_batches(DOCUMENTS, max_len=8, tokens_per_batch=20)
    assert [t for batch in batches for t in batch.targets.tolist()] == list(range(TOTAL))


def test_the_order_depends_on_seed_and_step_alone() -> None:
    def targets(seed: int, start: int, count: int) -> list[list[int]]:
        batches = training_batches(
            DOCUMENTS, max_len=8, tokens_per_batch=20, seed=seed, start=start
        )
        return [batch.targets.tolist() for batch in islice(batches, count)]

    straight = targets(0, 0, 40)
    assert targets(0, 0, 25) + targets(0, 25, 15) == straight
    assert targets(1, 0, 40) != straight
