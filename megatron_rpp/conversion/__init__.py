"""Whole models from Hugging Face to Megatron's checkpoints and back, a tensor at a time."""
