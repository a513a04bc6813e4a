"""The flex backend: compositions on FlexAttention, their block masks in closed form."""

from attnkit.backends.flex.backend import Flex, FlexPlan
from attnkit.backends.flex.blocks import BLOCK, block_mask, mask_mod

__all__ = ["BLOCK", "Flex", "FlexPlan", "block_mask", "mask_mod"]
