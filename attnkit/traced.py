"""Plans inside graphs: read while `torch.compile` traces, outside of the trace, constant in it.

The tracer must not follow the planner. So what a plan is read from leaves the trace as
constants, each of them a guard of the graph: other shapes, dtypes, devices, gradients or modes
are another request and compile again. So are another mask, bias or `SeqLens`, by identity.
"""

from __future__ import annotations

from functools import reduce
from operator import add, and_, index
from typing import TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from attnkit.backends import AttentionOutput, Operands, make_plan
from attnkit.backends.graph import hold, run_number, stand_in
from attnkit.backends.rebind import rebound
from attnkit.layouts import SeqLens
from attnkit.masks import Full, Mask
from attnkit.planner import Composition, read_request
from attnkit.pse import Pse

__all__ = ["attend_in_graph", "interned", "is_tracing"]

is_tracing = torch.compiler.is_dynamo_compiling

Facts: TypeAlias = tuple[tuple[int, ...], torch.dtype, torch.device, bool]
"""What a request reads off a tensor: shape, dtype, device, whether it asks for a gradient."""

Numbers: TypeAlias = tuple[float | None, float | None, float | None]
"""The numbers of a composition: scale, dropout, soft-cap."""


_WHOLE = Full()

# Weak, since a mask may hold a matrix.
_SEEN: WeakValueDictionary[int, Mask] = WeakValueDictionary()


def interned(mask: Mask) -> Mask:
    """Return one object for equal masks, so that equal layers share one graph."""
    known = _SEEN.setdefault(hash(mask), mask)
    return known if known == mask else mask


def attend_in_graph(
    masks: tuple[Mask | None, Mask | None],
    biases: tuple[Pse | None, Pse | None],
    layout: str,
    numbers: Numbers,
    operands: Operands,
    carried: list[Tensor],
    seqlens: SeqLens | None,
    *,
    num_heads: int | None,
    num_kv_heads: int | None,
    head_dim: int | None,
    training: bool,
    backend: str,
    return_stats: bool,
) -> AttentionOutput:
    """Attend as masks, joined, and biases, added, say; the plan is a constant of the graph.

    `carried` are the tensors that the biases have now.
    """
    number = _planned(
        *masks,  # objects of ours are constants as arguments, and are not inside of tuples
        *biases,
        layout,
        (_hex(numbers[0]), _hex(numbers[1]), _hex(numbers[2])),
        (_facts(operands.query), _facts(operands.key), _facts(operands.value)),
        tuple(_facts(t) for t in carried),
        None if operands.sink is None else _facts(operands.sink),
        seqlens,
        (num_heads, num_kv_heads, head_dim),
        (training, torch.is_grad_enabled()),
        backend,
    )
    leaves = [operands.query, operands.key, operands.value, operands.sink, *carried]
    return run_number(number, leaves, bool(training and numbers[1]), return_stats)


def _facts(tensor: Tensor) -> Facts:
    # A size that the tracer would leave open is asked for by number: a plan is for one size.
    shape = tuple(index(size) for size in tensor.shape)
    return shape, tensor.dtype, tensor.device, tensor.requires_grad


def _hex(number: float | None) -> str | None:
    # A number would be left open, too: as digits, which say it exactly, it is not.
    return None if number is None else float(number).hex()


def _planned(
    mask: Mask | None,
    call_mask: Mask | None,
    pse: Pse | None,
    call_pse: Pse | None,
    layout: str,
    numbers: tuple[str | None, str | None, str | None],
    tensors: tuple[Facts, Facts, Facts],
    carried: tuple[Facts, ...],
    sink: Facts | None,
    seqlens: SeqLens | None,
    heads: tuple[int | None, int | None, int | None],
    modes: tuple[bool, bool],
    backend: str,
) -> int:
    """Plan for tensors that have the same properties and no data; return the plan's number.

    Not the plan: the tracer keeps objects that such a function returns for as long as it lives.
    """
    scale, dropout, softcap = (None if h is None else float.fromhex(h) for h in numbers)
    training, grad = modes
    masks = [part for part in (mask, call_mask) if part is not None]
    biases = [part for part in (pse, call_pse) if part is not None]
    with torch.set_grad_enabled(grad):
        bias = rebound(reduce(add, biases), [stand_in(*f) for f in carried]) if biases else None
        request = read_request(
            Composition(
                reduce(and_, masks) if masks else Full(),
                bias,
                layout,
                scale,
                dropout or 0.0,
                softcap,
            ),
            *(stand_in(*f) for f in tensors),
            num_heads=heads[0],
            num_kv_heads=heads[1],
            head_dim=heads[2],
            seqlens=seqlens,
            sink=None if sink is None else stand_in(*sink),
            training=training,
        )
        found = make_plan(request, backend)
    # A graph knows its plan by a number. It is guarded on these objects, and dies with any of
    # them: whichever is there keeps the plan, the ones that change most often first.
    keepers: tuple[object, ...] = (seqlens, call_mask, mask, _WHOLE)
    keeper = next(one for one in keepers if one is not None)
    keeper.__dict__.setdefault("_graphs", {})[found] = None
    return hold(found, bias).number


# All that `torch.compiler.assume_constant_result` does, but it loads the compiler, for seconds.
_planned._dynamo_marked_constant = True  # type: ignore[attr-defined]
