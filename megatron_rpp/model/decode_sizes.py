"""Sizes in generation. Imports no torch, because the memory estimate needs them before torch is loaded."""

CACHE_BLOCK_ON_CPU = 64
"""Positions in a block of the key-value cache. A CPU attends to whole blocks, and small ones waste
less."""
CACHE_BLOCK_ON_GPU = 256
"""FlashAttention's kernel for paged caches wants a multiple of 256."""
SMALLEST_PACKED = 2**18
"""Elements of the smallest weight of which a rollout on a CPU makes a packed copy (`products.packed`).
F.linear is as good for smaller ones."""
PASS_TOKENS = 4096
"""Most prompt tokens in one forward pass."""
