"""FlexAttention itself, compiled once per kind of composition.

Uncompiled, `flex_attention` builds the whole score matrix. Compiled, it is one fused kernel,
and the first call of each kind takes seconds. torch keeps at most a few compiled forms of one
function and then quietly runs it uncompiled, so every kind is a function of its own here, and
`fullgraph` turns a form too many into an error.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from attnkit.backends.flex.scores import ScoreMod
from attnkit.errors import CompositionTypeError

__all__ = ["Call", "Kernel", "compiled"]

# Older torch spells the request as a flag.
_AUX: Any = getattr(flex, "AuxRequest", None)


class Call(NamedTuple):
    """One call on ``[b n s d]`` tensors; calls of one `kind` share their code."""

    query: Tensor
    key: Tensor
    value: Tensor
    score_mod: ScoreMod | None
    block_mask: BlockMask
    scale: float
    kind: tuple[Hashable, ...]


Kernel = Callable[[Call], tuple[Tensor, Tensor | None]]
"""Output ``[b n s d]`` and log-sum-exp ``[b n s]``, natural log; None where there is none."""


def compiled(call: Call) -> tuple[Tensor, Tensor | None]:
    """Run a call compiled. The CPU's kernel returns no log-sum-exp.

    On the CPU it is compiled for known lengths, since open ones give wrong code or none.

    Raises `CompositionTypeError` for fake tensors, whose memory compiled code would read.
    """
    if isinstance(call.query, FakeTensor):
        raise CompositionTypeError(
            "FlexAttention runs compiled code, and a fake tensor has no memory to run it on; for "
            "shapes alone ask for backend='reference'"
        )
    if call.query.device.type == "cpu":
        return _on_cpu(call)
    shapes = tuple((t.shape[1], t.shape[3]) for t in call[:3])
    kind = (call.query.device, call.query.dtype, shapes, *call.kind)
    output, lse = _compile(_with_lse, kind, None)(*call[:6])
    return output, lse


def _on_cpu(call: Call) -> tuple[Tensor, None]:
    forms = tuple((t.shape, t.stride()) for t in call[:3])
    kind = (call.query.dtype, forms, *call.kind)
    return _compile(_plain, kind, False)(*call[:6]), None


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None,
    block_mask: BlockMask,
    scale: float,
    **request: Any,
) -> Any:
    return flex_attention(
        query,
        key,
        value,
        score_mod,
        block_mask,
        scale,
        query.shape[1] != key.shape[1],
        **request,
    )


def _with_lse(*call: Any) -> tuple[Tensor, Tensor]:
    if _AUX is None:
        output, lse = _plain(*call, return_lse=True)
        return output, lse
    output, aux = _plain(*call, return_aux=_AUX(lse=True))
    return output, aux.lse


@lru_cache(maxsize=128)
def _compile(
    function: Callable[..., Any], kind: tuple[Hashable, ...], dynamic: bool | None
) -> Callable[..., Any]:
    """Return a compiled function that no other kind shares: torch's limits are per code object."""

    def attend(*call: Any) -> Any:
        return function(*call)

    attend.__code__ = attend.__code__.replace()
    return torch.compile(attend, fullgraph=True, dynamic=dynamic)
