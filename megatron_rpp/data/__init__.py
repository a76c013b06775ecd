"""Prompt data sets, tokenizers and procedural tasks. Nothing here knows torch or Megatron."""
