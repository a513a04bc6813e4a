"""The planner: from a request to the cheapest proven kernel calls, refusals kept.

The way of one request:

1. `request.read_request` checks composition and tensors, and returns the `Request`: no tensors.
2. `request.Request.matrices` asks the mask for the `Region` of every score matrix.
3. `lower.lower` begins a `search.Search`; a bias that trains goes through `routes` first.
4. `candidates` makes a `calls.Launch` for every mode: one call, where its sequences lie, its cells.
5. `decompose` makes several, where one is not enough: `staircases` of rows that gather their keys,
   and `cuts` of a region where `bounds` say that they may be cheaper, with `grouping` by window.
6. `proof.reasons_against` compares the cells that a launch computes with those it is to compute,
   and asks the kernel's rules; what falls becomes a `Refusal`.
7. `price` counts the work of the launches that are left; the cheapest `calls.Solution` wins.
8. `plan.Plan` holds its launches as `steps`, and proves them again, as a whole: `Plan.disprove`.
9. `backends.fused` runs the steps: `single` for one on all rows, `merged` for parts of rows.
10. `explain`, `nearby` and `picture` tell about the plan, when they are asked.
"""

from attnkit.planner.calls import Launch, Solution
from attnkit.planner.lower import lower
from attnkit.planner.plan import Plan
from attnkit.planner.price import Price
from attnkit.planner.request import Composition, Request, read_request

__all__ = [
    "Composition",
    "Launch",
    "Plan",
    "Price",
    "Request",
    "Solution",
    "lower",
    "read_request",
]
