"""Tokens of a call among those of a request: taken in its order, added and written back."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.constants import constant
from attnkit.planner.calls import Tokens

__all__ = ["add_to", "put", "taken"]


@constant
def _index(tokens: Tokens, device: torch.device) -> Tensor:
    places = [torch.arange(one.start, one.stop, one.step) for one in tokens.ranges]
    return torch.cat(places).to(device)


def taken(tensor: Tensor, tokens: Tokens) -> Tensor:
    """Return tokens in a call's order: a view where that is possible."""
    if tokens.span is not None:
        return tensor[tokens.span]
    return tensor.index_select(0, _index(tokens, tensor.device))


def add_to(total: Tensor, tokens: Tokens, part: Tensor) -> None:
    """Add rows in a call's order back to the tokens; a token may occur twice."""
    if tokens.span is not None:
        total[tokens.span] += part
        return
    part = part.to(total.dtype)
    if not torch.are_deterministic_algorithms_enabled():
        total.index_add_(0, _index(tokens, total.device), part)
        return
    for there, mine in tokens.layers:  # in the same order each time
        put(total, there, taken(total, there) + taken(part, mine))


def put(total: Tensor, tokens: Tokens, values: Tensor) -> None:
    """Write rows, none of which occurs twice, back to the tokens."""
    if tokens.span is not None:
        total[tokens.span] = values
    else:
        total.index_copy_(0, _index(tokens, total.device), values.to(total.dtype))
