"""What `deterministic` asks for: the same bits from the same call, and who sees to it.

On the CPU attnkit does: its operators add in a fixed order. Elsewhere kernels and operators have
switches of their own, and all of them follow torch's: SDPA's kernels and cuBLAS, CANN's fused
attention and its operators, the gradients of whatever reads by an index.
"""

from __future__ import annotations

import torch

from attnkit.errors import CompositionError

__all__ = ["is_repeatable", "strict"]


def strict() -> bool:
    """Return whether torch's own switch is on, and not merely to warn.

    >>> strict()
    False
    """
    if not torch.are_deterministic_algorithms_enabled():
        return False
    return not torch.is_deterministic_algorithms_warn_only_enabled()


def is_repeatable(asked: bool, device: str, score_trains: bool) -> bool:
    """Return whether a request is for the same bits in every run.

    Raises `CompositionError` where it is, and only torch's own switch can see to that.
    """
    if not asked or strict():
        return asked or strict()
    why = None
    if device not in ("cpu", "meta"):
        why = f"the tensors are on {device!r}, where kernels add in a fixed order only if asked to"
    elif score_trains:
        why = "score_fn reads a tensor that trains, and torch adds up its gradient in any order"
    if why is not None:
        raise CompositionError(
            f"deterministic=True: {why}; call torch.use_deterministic_algorithms(True) as well, "
            "which they follow"
        )
    return True
