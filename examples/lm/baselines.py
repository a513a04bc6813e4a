"""What counting alone achieves: the figures that a model has to beat.

Both are trained on the training topics and asked about the held-out ones, byte by byte, exactly
like the model. The result is the mean cost in bits per byte, -log2 p(byte | what came before).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lm.data import VOCABULARY, Document

BYTES = 256


def unigram(train: Sequence[Document], held_out: Sequence[Document]) -> float:
    """Return the bits per byte of byte frequencies.

    p(b) = (count(b) + 1) / (n + 256): no byte is impossible because it has not been seen.
    """
    probability = _unigram(_pair_counts(train))
    return _bits_per_byte(_pair_counts(held_out).sum(0), probability)


def bigram(train: Sequence[Document], held_out: Sequence[Document], prior: float = 16.0) -> float:
    """Return the bits per byte of byte frequencies after each byte (or the start of a document).

    p(b | a) = (count(a, b) + prior * p(b)) / (count(a) + prior): where `a` has been seen often its
    own counts decide, and where it is rare the unigram does.
    """
    counts = _pair_counts(train)
    blended = counts + prior * _unigram(counts)
    probability = blended / (counts.sum(1, keepdim=True) + prior)
    return _bits_per_byte(_pair_counts(held_out), probability)


def _pair_counts(documents: Sequence[Document]) -> Tensor:
    """Count how often each byte follows each token, [257, 256] float64."""
    counts = torch.zeros(VOCABULARY * BYTES, dtype=torch.float64)
    for document in documents:
        tokens = document.tokens()
        pairs = tokens[:-1] * BYTES + tokens[1:]
        counts += torch.bincount(pairs, minlength=len(counts))
    return counts.view(VOCABULARY, BYTES)


def _unigram(pair_counts: Tensor) -> Tensor:
    counts = pair_counts.sum(0) + 1
    return counts / counts.sum()


def _bits_per_byte(counts: Tensor, probability: Tensor) -> float:
    nats = -(counts * probability.log()).sum() / counts.sum()
    return float(nats) / math.log(2)
