"""timm's models on attnkit (read with 1.0.31).

timm has no registry of attentions: its modules call torch's `scaled_dot_product_attention` where
their flag `fused_attn` is on, and multiply matrices themselves where it is off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.interop.torch.routing import Calls
from attnkit.interop.torch.routing import routed as routed_calls

__all__ = ["routed"]


@contextmanager
def routed(model: nn.Module) -> Iterator[Calls]:
    """Compute the attention of a timm model by attnkit inside, and count the calls.

    Turns `fused_attn` on in all of its modules, and puts it back. For good:
    `attnkit.interop.torch.install`, and ``timm.layers.set_fused_attn(True)`` before the model is
    built. Raises `CompositionError` where no module has the flag, and where nothing was called.

        with routed(model) as calls:
            loss = model(images).sum()
            loss.backward()
    """
    if not isinstance(model, nn.Module):
        raise CompositionTypeError(f"routed got {shown(model)}; give a model of timm")
    flagged = [one for one in model.modules() if isinstance(vars(one).get("fused_attn"), bool)]
    if not flagged:
        raise CompositionError(
            f"{type(model).__name__} has no attention module with a flag fused_attn: it is no "
            "timm model that attends; calls of torch's function are routed by "
            "attnkit.interop.torch.routed"
        )
    before = [one.fused_attn for one in flagged]
    try:
        for one in flagged:
            setattr(one, "fused_attn", True)  # noqa: B010 -- to types it is a part
        with routed_calls() as calls:
            yield calls
    finally:
        for one, was in zip(flagged, before, strict=True):
            setattr(one, "fused_attn", was)  # noqa: B010
    if not calls.routed:
        raise CompositionError(
            f"nothing in {type(model).__name__} called torch's attention inside of routed(); was "
            "it run there, and not compiled before?"
        )
