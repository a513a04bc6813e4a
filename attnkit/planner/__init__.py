"""The planner: from a request to the cheapest proven kernel call, refusals kept."""

from attnkit.planner.lower import Lowering, lower
from attnkit.planner.plan import Launch, Plan, Solution
from attnkit.planner.price import Price
from attnkit.planner.request import Composition, Request, read_request

__all__ = [
    "Composition",
    "Launch",
    "Lowering",
    "Plan",
    "Price",
    "Request",
    "Solution",
    "lower",
    "read_request",
]
