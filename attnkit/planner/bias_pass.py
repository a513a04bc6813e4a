"""The gradient of a bias that reaches the kernel as its bias input, which never writes one.

Forward and backward calls are those of the same bias without a gradient: it is *frozen* there.
Beside them the bias's own gradient is summed up tile by tile, by torch's operators:

    p = exp(scale * q.k + bias - lse);  dbias = p * (dO.v - delta),  delta = sum(dO * O) - dlse

The tiles are those of the mask, and each is added to what its cells follow from: a table, a number
per distance or key, the cells themselves. It is what the tiled backend does for all gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from attnkit.errors import Refusal
from attnkit.planner.price import Price, price_of_pass
from attnkit.planner.request import Request

__all__ = ["BiasPass", "disprove_pass", "frozen"]


@dataclass(frozen=True)
class BiasPass:
    """A pass over the tiles of a request's mask, for the gradients of some addends of its bias.

    `terms` are their indexes, rising; `price` is what the pass costs, beside the calls.
    """

    terms: tuple[int, ...]
    price: Price

    @classmethod
    def of(cls, request: Request, terms: tuple[int, ...]) -> BiasPass:
        """Return the pass of a request for some addends, priced."""
        return cls(terms, price_of_pass(request))

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data: the addends' indexes, and the price."""
        return {"terms": list(self.terms), "price": self.price.to_dict()}

    def __str__(self) -> str:
        return "a pass for the bias's gradient"


def frozen(request: Request, terms: tuple[int, ...]) -> Request:
    """Return the request with some addends of its bias as if they asked for no gradient."""
    bias = tuple(
        replace(term, requires_grad=False) if k in terms else term
        for k, term in enumerate(request.bias)
    )
    return request.like(replace(request, bias=bias))


def disprove_pass(
    request: Request, bias: tuple[int, ...], found: BiasPass | None
) -> Refusal | None:
    """Return why a pass does not make the gradients that the calls leave out; None if it does.

    `bias` are the addends that reach the calls as their bias input. Those of them that train have
    their gradient here, and no others: the rest has it from the calls.
    """
    wanted = tuple(k for k in bias if request.bias[k].requires_grad)
    terms = () if found is None else found.terms
    if terms != wanted:
        missed = [request.bias[k].text for k in wanted if k not in terms]
        reason = (
            f"{' and '.join(missed)} trains, and the kernel never writes that gradient"
            if missed
            else f"the pass is for the addends {terms}, where those that need one are {wanted}"
        )
        return Refusal("pse-gradient", reason[:400])
    if found is not None and found != BiasPass.of(request, wanted):
        return Refusal("other-pass", "the pass for the bias's gradient is not this request's")
    return None
