"""Whole models from Hugging Face to Megatron's checkpoints and back, a tensor at a time."""

DTYPE_NAMES = ("fp32", "bf16", "fp16")
"""Types that weights can be cast to on the way to Hugging Face."""
