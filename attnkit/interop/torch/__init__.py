"""torch's own attention, computed by attnkit: its function and its modules, as they are called.

- `scaled_dot_product_attention`: torch's signature, for a call site that is edited.
- `MultiheadAttention`: `nn.MultiheadAttention` with its arguments and its state.
- `replace`: every `nn.MultiheadAttention` of a model, in place.
- `routed`, `install`: calls in code that is not.
- `fuse`: attention that a model writes out by hand, as products and a softmax.
"""

from attnkit.interop.torch.byhand import Fusion, fuse
from attnkit.interop.torch.multihead import MultiheadAttention
from attnkit.interop.torch.replace import Replaced, replace
from attnkit.interop.torch.routing import Calls, Installed, install, routed
from attnkit.interop.torch.sdpa import scaled_dot_product_attention

__all__ = [
    "Calls",
    "Fusion",
    "Installed",
    "MultiheadAttention",
    "Replaced",
    "fuse",
    "install",
    "replace",
    "routed",
    "scaled_dot_product_attention",
]
