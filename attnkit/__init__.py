"""attnkit: attention as a value, lowered onto fused kernels with a proof."""
