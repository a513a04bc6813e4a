"""The baselines, by hand on strings of a few bytes."""

from __future__ import annotations

from math import log2

import pytest

from lm.baselines import bigram, unigram
from lm.data import Document


def documents(*texts: bytes) -> list[Document]:
    return [Document(str(index), text) for index, text in enumerate(texts)]


def test_unigram_by_hand() -> None:
    # 3 a, 1 b, and one more of each of the 256 bytes: p(a) = 4/260, p(b) = 2/260, p(c) = 1/260.
    train, held_out = documents(b"aab", b"a"), documents(b"abc")
    expected = -(log2(4 / 260) + log2(2 / 260) + log2(1 / 260)) / 3
    assert unigram(train, held_out) == pytest.approx(expected, rel=1e-12)


def test_bigram_by_hand() -> None:
    # In "aab" and "a": the start is followed by a twice, a by a once and by b once, b by nothing.
    train, held_out = documents(b"aab", b"a"), documents(b"ab", b"ba")
    p = {"a": 4 / 260, "b": 2 / 260}
    prior = 3.0
    start_a = (2 + prior * p["a"]) / (2 + prior)
    start_b = (0 + prior * p["b"]) / (2 + prior)
    a_b = (1 + prior * p["b"]) / (2 + prior)
    b_a = p["a"]  # nothing is known about b, so the unigram answers
    expected = -sum(map(log2, (start_a, a_b, start_b, b_a))) / 4
    assert bigram(train, held_out, prior) == pytest.approx(expected, rel=1e-12)


def test_without_training_text_a_byte_costs_eight_bits() -> None:
    assert unigram([], documents(b"any text")) == pytest.approx(8)
    assert bigram([], documents(b"any text")) == pytest.approx(8)


def test_bigram_beats_unigram_where_order_tells() -> None:
    train, held_out = documents(b"abcd" * 50), documents(b"abcdabcd")
    assert bigram(train, held_out) < 1 < unigram(train, held_out)
