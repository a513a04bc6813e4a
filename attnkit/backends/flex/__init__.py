"""The flex backend: compositions on FlexAttention, their block masks in closed form."""

from attnkit.backends.flex.backend import Flex
from attnkit.backends.flex.blocks import BLOCK, block_mask
from attnkit.backends.flex.tables import mask_mod

__all__ = ["BLOCK", "Flex", "block_mask", "mask_mod"]
