"""Hugging Face models in and out: which tensor is which, config.json, streamed safetensors.

Nothing here imports Megatron or transformers. `families.py` is the table to extend.
"""
