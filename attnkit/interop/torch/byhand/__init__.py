"""Attention that models write by hand, as products and a softmax, lifted to calls of attnkit."""

from attnkit.interop.torch.byhand.fusing import Fusion, fuse

__all__ = ["Fusion", "fuse"]
