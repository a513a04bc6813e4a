"""Labels and the loss of a text that is spread over ranks, so that all of them make one mean.

The label of a token is the next one, which may be with another rank: labels are shifted before
they are cut. The mean is over the labels of all ranks: ranks have unequal counts of them (the last
token of a text has none, nor has what is left out), so the mean of their means is another number.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import cross_entropy

from attnkit.arguments import check_int, check_number, holds_integers
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.layouts import SeqLens, as_seqlens
from attnkit.parallel.sharding import Sharding

__all__ = ["IGNORE", "labels", "loss", "next_tokens"]

IGNORE = -100
"""What stands for no label, as in ``torch.nn.functional.cross_entropy``."""


def next_tokens(
    tokens: Tensor,
    *,
    ignore: int = IGNORE,
    seqlens: SeqLens | None = None,
    where: Tensor | None = None,
) -> Tensor:
    """Return the labels of a whole text: of each token the next one, ``[... s]``.

    The last token of a text has none, but `ignore`. `seqlens` has the lengths of texts that lie
    one behind the other: of a packed batch, or the documents of a row. `where` tells which tokens
    are to be learnt, ``[... s]`` of bool: others are no label of the token before them.

    >>> next_tokens(torch.tensor([5, 6, 7, 8, 9]), seqlens=SeqLens([3, 2])).tolist()
    [6, 7, -100, 9, -100]

    Raises `CompositionError` for tokens among which `ignore` is: they are labels already, and
    would be shifted twice. On an accelerator that is not looked at, for the host would wait.
    """
    _check_tokens(tokens, check_int("ignore", ignore, None))
    seqlens = as_seqlens(seqlens)
    if seqlens is not None:
        seqlens.check_totals(tokens.shape[-1], seqlens.total_kv)
    fits = isinstance(where, Tensor) and where.dtype == torch.bool and where.shape == tokens.shape
    if where is not None and not fits:
        raise CompositionTypeError(
            f"where={shown(where)} for tokens {list(tokens.shape)}; it is bool and of their shape"
        )
    wanted = tokens if where is None else tokens.masked_fill(~where, ignore)
    found = wanted.roll(-1, -1)
    if seqlens is None:
        found[..., -1:] = ignore
        return found
    lasts = sorted({end - 1 for end in seqlens.cu_q if end})
    places = torch.tensor(lasts, dtype=torch.int64, device=tokens.device)  # there may be none
    return found.index_fill(-1, places, ignore)


def labels(
    tokens: Tensor,
    sharding: Sharding,
    rank: int,
    *,
    ignore: int = IGNORE,
    seqlens: SeqLens | None = None,
    where: Tensor | None = None,
) -> Tensor:
    """Return a rank's labels, given the tokens of the whole text: see `next_tokens`.

    ``[... s]`` to ``[... s_local]``. They are for logits as they are: a loss that shifts logits
    against labels, as those inside of some libraries' models do, would shift them twice.

    >>> halves = Sharding.zigzag(8, 2)
    >>> labels(torch.arange(8), halves, 0).tolist(), halves.positions(0).tolist()
    ([1, 2, 7, -100], [0, 1, 6, 7])
    """
    whole = next_tokens(tokens, ignore=ignore, seqlens=seqlens, where=where)
    return sharding.take(whole, rank, dim=-1)


def loss(
    logits: Tensor,
    sharding: Sharding,
    rank: int,
    *,
    tokens: Tensor | None = None,
    labels: Tensor | None = None,
    summed: Callable[[Tensor], Tensor] | None = None,
    scale: float = 1.0,
    ignore: int = IGNORE,
    seqlens: SeqLens | None = None,
    where: Tensor | None = None,
) -> Tensor:
    """Return a rank's share of the mean cross-entropy: the sum over ranks is that of one process.

        share = sum over own labels of -log softmax(logits)[label] / labels of all ranks

    `logits` are the rank's own, ``[... s_local v]``. Say what they are to predict by one of:

    - `tokens`: the tokens of the whole text, ``[... s]``. Labels are made of them, as `next_tokens`
      does with `seqlens` and `where`, and counted: nothing is exchanged.
    - `labels`: the rank's labels, ``[... s_local]``, as `labels` gives them (they are not shifted
      here). Then `summed` adds the count of all ranks up, such as an all-reduce of one number.

    Gradients of the shares add up to those of one process, so they are to be *summed* over these
    ranks. Where they are averaged instead (DDP, FSDP), `scale` makes up for it: the number of
    ranks of the text, if each replica's mean counts the same; all ranks that are averaged over,
    if `summed` counts the labels of all replicas. Shares are float32, or float64 of such logits;
    without any label they are nan, as in one process.

    >>> halves, tokens = Sharding.zigzag(8, 2), torch.arange(8)
    >>> logits = torch.randn(8, 10, dtype=torch.float64)
    >>> shares = [
    ...     loss(halves.take(logits, rank, 0), halves, rank, tokens=tokens) for rank in range(2)
    ... ]
    >>> torch.allclose(sum(shares), torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]))
    True

    Raises `CompositionError` unless there is one of `tokens` and `labels`, of the right shape.
    """
    own, count = _own_labels(sharding, rank, tokens, labels, summed, ignore, seqlens, where)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != own.shape:
        raise CompositionError(
            f"logits={shown(logits)} for labels {list(own.shape)} of rank {rank}; logits are "
            "[... s_local v], those of the rank's own tokens"
        )
    check_number("scale", scale, lambda x: 0 < x < inf, "above 0 and finite")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    total = cross_entropy(wide.flatten(0, -2), own.flatten(), ignore_index=ignore, reduction="sum")
    return total * scale / count


def _own_labels(
    sharding: Sharding,
    rank: int,
    tokens: Tensor | None,
    labels: Tensor | None,
    summed: Callable[[Tensor], Tensor] | None,
    ignore: int,
    seqlens: SeqLens | None,
    where: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return a rank's labels, and how many all ranks have."""
    if (tokens is None) == (labels is None):
        raise CompositionError(
            "loss takes one of tokens= (those of the whole text, not shifted) and labels= (the "
            "rank's own, as `labels` gives them)"
        )
    if tokens is not None:
        whole = next_tokens(tokens, ignore=ignore, seqlens=seqlens, where=where)
        return sharding.take(whole, rank, dim=-1), (whole != ignore).sum()
    if seqlens is not None or where is not None:
        raise CompositionError(
            "loss got labels= with seqlens= or where=, which say how labels are made of tokens; "
            "give these to `labels`, or tokens= here"
        )
    if summed is None:
        raise CompositionError(
            "loss got labels= of one rank and does not know how many the others have; give "
            "summed=, which adds a number up over the ranks, or tokens= of the whole text"
        )
    if not isinstance(labels, Tensor) or not holds_integers(labels):
        raise CompositionTypeError(f"labels={shown(labels)}; they are integers")
    count = sharding.sizes[check_int("rank", rank, 0, sharding.size - 1)]
    if not labels.dim() or labels.shape[-1] != count:
        raise CompositionError(
            f"labels {list(labels.shape)} of rank {rank}, which has {count} of "
            f"{sharding.length} tokens; take its own: labels(tokens, sharding, rank)"
        )
    return labels, summed((labels != check_int("ignore", ignore, None)).sum())


def _check_tokens(tokens: object, ignore: int) -> None:
    if not isinstance(tokens, Tensor) or not holds_integers(tokens) or not tokens.dim():
        raise CompositionTypeError(f"tokens={shown(tokens)}; they are integers, [... s]")
    at_hand = tokens.device.type == "cpu" and not isinstance(tokens, FakeTensor)
    if at_hand and not torch.compiler.is_compiling() and bool((tokens == ignore).any()):
        raise CompositionError(
            f"tokens have {ignore} among them, which stands for no label: these are labels already "
            "and would be shifted twice; give the tokens themselves, and where= for those to learn"
        )
