"""Prompt data sets, tokenizers and procedural tasks. Nothing here imports torch or Megatron."""
