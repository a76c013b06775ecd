"""Hugging Face models in and out: the table of tensors, config.json, streamed safetensors.

Nothing here imports Megatron or transformers. To add a model family, extend `families.py`.
"""
