"""torch's own attention, computed by attnkit: its function and its modules, as they are called.

- `scaled_dot_product_attention`: torch's signature, for a call site that is edited.
- `routed`, `install`: calls in code that is not.
"""

from attnkit.interop.torch.routing import Calls, Installed, install, routed
from attnkit.interop.torch.sdpa import scaled_dot_product_attention

__all__ = [
    "Calls",
    "Installed",
    "install",
    "routed",
    "scaled_dot_product_attention",
]
