"""Labels and the loss of ranks: together they are what one process has."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import attnkit as ak
from attnkit.layouts import SeqLens
from attnkit.parallel import Sharding
from attnkit.parallel.loss import labels, loss, next_tokens

WORDS = 11
SHARDINGS = {
    "contiguous": Sharding.contiguous(13, 3),
    "zigzag": Sharding.zigzag(13, 4),
    "more ranks than tokens": Sharding.contiguous(13, 16),
    "one rank has none": Sharding.of(13, [[(0, 4)], [], [(4, 13)]]),
    "one rank": Sharding.contiguous(13, 1),
}
TEXTS = {
    "one text": (None, None),
    "packed": (SeqLens([5, 0, 1, 7]), None),
    "some to learn": (None, torch.arange(13) % 3 != 0),
    "packed, some to learn": (SeqLens([6, 7]), torch.arange(13) % 4 != 1),
}


def by_hand(tokens: Tensor, seqlens: SeqLens | None, where: Tensor | None) -> Tensor:
    """The next token of each, one by one."""
    found = torch.full_like(tokens, -100)
    ends = (0, tokens.shape[-1]) if seqlens is None else seqlens.cu_q
    for start, stop in pairwise(ends):
        for p in range(start, stop - 1):
            if where is None or where[p + 1]:
                found[..., p] = tokens[..., p + 1]
    return found


@pytest.mark.parametrize("sharding", SHARDINGS.values(), ids=SHARDINGS)
@pytest.mark.parametrize(("seqlens", "where"), TEXTS.values(), ids=TEXTS)
def test_labels_are_shifted_before_they_are_cut(
    sharding: Sharding, seqlens: SeqLens | None, where: Tensor | None
) -> None:
    for shape in ((13,), (2, 13)):
        tokens = torch.randint(WORDS, shape)
        place = None if where is None else where.expand(shape)
        expected = by_hand(tokens, seqlens, where)
        assert torch.equal(next_tokens(tokens, seqlens=seqlens, where=place), expected)
        for rank in range(sharding.size):
            own = labels(tokens, sharding, rank, seqlens=seqlens, where=place)
            assert torch.equal(own, expected[..., sharding.positions(rank)])


def test_texts_without_a_token_have_no_labels() -> None:
    none = torch.empty(0, dtype=torch.int64)
    for seqlens in (None, SeqLens([0]), SeqLens([0, 0])):
        assert next_tokens(none, seqlens=seqlens).shape == (0,)


@pytest.mark.parametrize("sharding", SHARDINGS.values(), ids=SHARDINGS)
@pytest.mark.parametrize(("seqlens", "where"), TEXTS.values(), ids=TEXTS)
def test_shares_and_their_gradients_add_up_to_the_mean_of_one_process(
    sharding: Sharding, seqlens: SeqLens | None, where: Tensor | None
) -> None:
    tokens = torch.randint(WORDS, (13,))
    logits = torch.randn(13, WORDS, dtype=torch.float64, requires_grad=True)
    expected = cross_entropy(logits, by_hand(tokens, seqlens, where))
    (grad,) = torch.autograd.grad(expected, logits)
    whole = next_tokens(tokens, seqlens=seqlens, where=where)

    def summed(count: Tensor) -> Tensor:
        assert count.shape == ()
        return (whole != -100).sum()

    ranks = range(sharding.size)
    for given in ("tokens", "labels"):
        shares = []
        for rank in ranks:
            own = sharding.take(logits, rank, 0)
            if given == "tokens":
                how = {"tokens": tokens, "seqlens": seqlens, "where": where}
            else:
                made = labels(tokens, sharding, rank, seqlens=seqlens, where=where)
                how = {"labels": made, "summed": summed}
            shares.append(loss(own, sharding, rank, **how))  # type: ignore[arg-type]
        assert all(share.dtype == torch.float64 for share in shares)
        total = torch.stack(shares).sum()
        torch.testing.assert_close(total, expected, rtol=1e-14, atol=1e-14)
        (found,) = torch.autograd.grad(total, logits)
        torch.testing.assert_close(found, grad, rtol=1e-14, atol=1e-15)


def test_the_mean_of_local_means_is_another_number() -> None:
    # What `loss` guards from: counts are unequal, if only by the last token, which has no label.
    tokens, sharding = torch.randint(WORDS, (13,)), SHARDINGS["contiguous"]
    logits = torch.randn(13, WORDS, dtype=torch.float64)
    expected = cross_entropy(logits[:-1], tokens[1:])
    pairs = [(sharding.take(logits, rank, 0), labels(tokens, sharding, rank)) for rank in range(3)]
    means = torch.stack([cross_entropy(*pair) for pair in pairs]).mean()
    shares = [loss(own, sharding, r, tokens=tokens) for r, (own, _) in enumerate(pairs)]
    assert abs(torch.stack(shares).sum() - expected) < 1e-14
    assert abs(means - expected) > 1e-3


def test_labels_shifted_after_they_are_cut_are_other_labels() -> None:
    tokens, sharding = torch.arange(13), SHARDINGS["zigzag"]
    wrong = next_tokens(sharding.take(tokens, 0, 0))
    assert not torch.equal(wrong, labels(tokens, sharding, 0))


def test_a_scale_makes_up_for_ranks_that_are_averaged_over() -> None:
    # Two replicas of a text each, three ranks a text: FSDP averages gradients over all six.
    sharding, texts = SHARDINGS["contiguous"], torch.randint(WORDS, (2, 13))
    weight = torch.randn(WORDS, WORDS, dtype=torch.float64, requires_grad=True)

    def logits(text: Tensor) -> Tensor:
        return weight[text]

    one = [cross_entropy(logits(text)[:-1], text[1:]) for text in texts]
    (expected,) = torch.autograd.grad(torch.stack(one).mean(), weight)
    grads = []
    for text, rank in product(texts, range(3)):
        share = loss(sharding.take(logits(text), rank, 0), sharding, rank, tokens=text, scale=3)
        grads += torch.autograd.grad(share, weight)
    torch.testing.assert_close(torch.stack(grads).mean(0), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_shares_of_low_precision_are_float32(dtype: torch.dtype) -> None:
    sharding, tokens = Sharding.zigzag(4096, 2), torch.randint(WORDS, (4096,))
    logits = torch.randn(4096, WORDS).to(dtype)
    shares = [
        loss(sharding.take(logits, rank, 0), sharding, rank, tokens=tokens) for rank in range(2)
    ]
    assert all(share.dtype == torch.float32 for share in shares)
    exact = cross_entropy(logits.double()[:-1], tokens[1:])
    assert abs(sum(shares).double() - exact) < 1e-5  # type: ignore[union-attr]


def test_without_any_label_it_is_nan_as_in_one_process() -> None:
    assert loss(torch.randn(1, WORDS), Sharding.zigzag(1, 1), 0, tokens=torch.tensor([1])).isnan()


def test_it_compiles_into_one_graph() -> None:
    sharding, tokens = Sharding.zigzag(16, 2), torch.randint(WORDS, (16,))
    logits = torch.randn(8, WORDS)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def share(logits: Tensor, tokens: Tensor) -> Tensor:
        return loss(logits, sharding, 1, tokens=tokens)

    assert torch.equal(share(logits, tokens), loss(logits, sharding, 1, tokens=tokens))


TOKENS, HALVES = torch.arange(8), Sharding.zigzag(8, 2)
LOGITS = torch.zeros(4, WORDS)
ONCE = next_tokens(TOKENS)

WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "shifted twice": (lambda: next_tokens(ONCE), "shifted twice"),
    "shifted and cut twice": (lambda: labels(ONCE, HALVES, 0), "shifted twice"),
    "shifted before the loss": (lambda: loss(LOGITS, HALVES, 0, tokens=ONCE), "shifted twice"),
    "cut twice": (lambda: labels(TOKENS[:4], HALVES, 0), "a part of one rank"),
    "labels for tokens": (
        lambda: loss(LOGITS, HALVES, 0, tokens=labels(TOKENS, HALVES, 1)),
        "a part of one rank",
    ),
    "neither": (lambda: loss(LOGITS, HALVES, 0), "one of tokens="),
    "both": (lambda: loss(LOGITS, HALVES, 0, tokens=TOKENS, labels=TOKENS[:4]), "one of tokens="),
    "labels without a count": (lambda: loss(LOGITS, HALVES, 0, labels=TOKENS[:4]), "summed="),
    "labels of the whole": (
        lambda: loss(LOGITS, HALVES, 0, labels=ONCE, summed=lambda n: n),
        "which has 4 of 8",
    ),
    "labels with lengths": (
        lambda: loss(LOGITS, HALVES, 0, labels=ONCE[:4], seqlens=SeqLens([8]), summed=lambda n: n),
        "seqlens=",
    ),
    "logits of the whole": (
        lambda: loss(torch.zeros(8, WORDS), HALVES, 0, tokens=TOKENS),
        "own tokens",
    ),
    "tokens that are floats": (lambda: labels(TOKENS.float(), HALVES, 0), "integers"),
    "lengths that are no SeqLens": (lambda: labels(TOKENS, HALVES, 0, seqlens=[8]), "SeqLens("),  # type: ignore[arg-type]
    "lengths of other tokens": (lambda: labels(TOKENS, HALVES, 0, seqlens=SeqLens([9])), "9"),
    "where of another shape": (
        lambda: labels(TOKENS, HALVES, 0, where=torch.ones(4, dtype=torch.bool)),
        "where=",
    ),
    "where that is a list": (lambda: labels(TOKENS, HALVES, 0, where=[True] * 8), "where="),  # type: ignore[arg-type]
    "a rank that is not": (lambda: labels(TOKENS, HALVES, 2), "rank=2"),
    "labels of a rank that is not": (
        lambda: loss(LOGITS, HALVES, 2, labels=ONCE[:4], summed=lambda n: n),
        "rank=2",
    ),
    "labels of a rank below 0": (
        lambda: loss(LOGITS, HALVES, -1, labels=ONCE[:4], summed=lambda n: n),
        "rank=-1",
    ),
    "a label to ignore that is a text": (
        lambda: loss(LOGITS, HALVES, 0, labels=ONCE[:4], summed=lambda n: n, ignore="pad"),  # type: ignore[arg-type]
        "ignore='pad'",
    ),
    "no logits": (lambda: loss(None, HALVES, 0, tokens=TOKENS), "logits=None"),  # type: ignore[arg-type]
    "no scale": (lambda: loss(LOGITS, HALVES, 0, tokens=TOKENS, scale=0.0), "scale=0.0"),
}


@pytest.mark.parametrize(("call", "told"), WRONG.values(), ids=WRONG)
def test_wrong_input_teaches(call: Callable[[], object], told: str) -> None:
    with pytest.raises(ak.CompositionError) as caught:
        call()
    assert told in str(caught.value)
