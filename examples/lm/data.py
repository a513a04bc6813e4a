"""Text that every Python carries, split honestly and packed without padding.

`pydoc_data.topics` is what `help("for")` prints: some 80 pages of real documentation. Each topic is
a document, each byte of it a token. A document of n bytes becomes n predictions, the first made
from a start token alone, so a model's bits per byte compare with any other predictor's.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import Tensor

START = 256
"""The token before a document's first byte; it is read, never predicted."""
VOCABULARY = 257

MIN_SHARED_PARAGRAPH = 40
"""Characters from which a paragraph is long enough to say where it came from."""


@dataclass(frozen=True)
class Document:
    """A named text, as bytes."""

    name: str
    text: bytes

    def tokens(self) -> Tensor:
        """Return the start token and the bytes, [n + 1] int64."""
        return torch.tensor([START, *self.text])


@dataclass(frozen=True)
class Corpus:
    """Documents to learn from, and documents kept away from the learner."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


@dataclass(frozen=True)
class Batch:
    """Sequences laid end to end: token t predicts target t, and no sequence sees another."""

    inputs: Tensor
    targets: Tensor
    lengths: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`; the lengths stay on the host, where plans are made."""
        return Batch(self.inputs.to(device), self.targets.to(device), self.lengths)


def load_corpus() -> Corpus:
    """Split Python's documentation into training topics and held-out topics.

    Topics quote each other: the page on compound statements holds the page on `for`, word for
    word. Topics that share a paragraph therefore form a family, and a family stays on one side.
    Every sixth family by size is held out, small ones and large ones alike.
    """
    documents = [Document(name, text.encode()) for name, text in sorted(topics.items())]
    held_out = {d.name for family in families(documents)[4::6] for d in family}
    return Corpus(
        train=tuple(d for d in documents if d.name not in held_out),
        held_out=tuple(d for d in documents if d.name in held_out),
    )


def families(documents: Sequence[Document]) -> list[list[Document]]:
    """Group documents that share a paragraph, directly or through others; largest group first."""
    family = {d.name: [d] for d in documents}
    seen: dict[str, str] = {}  # paragraph -> the first document that has it
    for document in documents:
        for paragraph in _paragraphs(document):
            mine = family[document.name]
            theirs = family[seen.setdefault(paragraph, document.name)]
            if mine is not theirs:
                theirs.extend(mine)
                for moved in mine:
                    family[moved.name] = theirs
    groups = {id(group): group for group in family.values()}
    return sorted(groups.values(), key=lambda group: -sum(len(d.text) for d in group))


def _paragraphs(document: Document) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", document.text.decode()):
        words = " ".join(paragraph.split())  # a quotation may be indented or wrapped anew
        if len(words) >= MIN_SHARED_PARAGRAPH:
            yield words


def cut(tokens: Tensor, max_len: int, first: int = 0) -> list[Tensor]:
    """Cut a document into pieces that predict at most `max_len` bytes each, all of them together.

    Neighbours overlap by one token: the last target of a piece is the first input of the next.
    `first` is where the first cut falls (0: after `max_len`), so epochs can cut in other places.
    """
    n = len(tokens) - 1
    cuts = sorted({0, n, *range(first or max_len, n, max_len)})
    return [tokens[a : b + 1] for a, b in itertools.pairwise(cuts)]


def pack(pieces: Iterable[Tensor], tokens_per_batch: int) -> Iterator[list[Tensor]]:
    """Fill batches with pieces in the order given; a piece that does not fit opens the next one."""
    batch: list[Tensor] = []
    used = 0
    for piece in pieces:
        if batch and used + len(piece) - 1 > tokens_per_batch:
            yield batch
            batch, used = [], 0
        batch.append(piece)
        used += len(piece) - 1
    if batch:
        yield batch


def collate(pieces: Sequence[Tensor]) -> Batch:
    """Lay pieces end to end, shifted by one between inputs and targets."""
    return Batch(
        inputs=torch.cat([p[:-1] for p in pieces]),
        targets=torch.cat([p[1:] for p in pieces]),
        lengths=tuple(len(p) - 1 for p in pieces),
    )


def training_batches(
    documents: Sequence[Document], *, max_len: int, tokens_per_batch: int, seed: int, start: int = 0
) -> Iterator[Batch]:
    """Yield batches without end, beginning with batch number `start`.

    The order is a function of the seed and the epoch alone. A run that resumes needs to know only
    how many batches it has seen. Within an epoch every byte is a target exactly once.
    """
    tokens = [d.tokens() for d in documents]

    def every_epoch() -> Iterator[list[Tensor]]:
        for epoch in itertools.count():
            order = random.Random(f"{seed}/{epoch}")
            pieces = [p for t in tokens for p in cut(t, max_len, order.randrange(max_len))]
            order.shuffle(pieces)
            yield from pack(pieces, tokens_per_batch)

    return map(collate, itertools.islice(every_epoch(), start, None))


def held_out_batches(
    documents: Sequence[Document], *, max_len: int, tokens_per_batch: int
) -> list[Batch]:
    """Return batches in which every byte of `documents` is a target exactly once, in order."""
    pieces = (p for d in documents for p in cut(d.tokens(), max_len))
    return [collate(batch) for batch in pack(pieces, tokens_per_batch)]
