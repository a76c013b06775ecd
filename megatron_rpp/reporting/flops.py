"""Floating-point operations of a step, for the model FLOPs utilisation (PaLM, arXiv 2204.02311,
appendix B).

Only matrix products count, with a multiplication and an addition each. Attention is causal: a token
attends to itself and to the tokens before it. What a kernel computes beyond that (padding, both
triangles, recomputation) does not count.

Left out: mixture of experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_rpp.config import ModelConfig
from megatron_rpp.rollout.buffer import RolloutBuffer


def body_flops(model: ModelConfig, lengths: torch.Tensor) -> float:
    """A forward pass of sequences of `lengths` [n] tokens through all layers."""
    head_dim = model.head_dim or model.hidden // model.heads
    kv_heads = model.kv_heads or model.heads
    attention_weights = model.hidden * head_dim * (2 * model.heads + 2 * kv_heads)
    weights = attention_weights + 3 * model.hidden * model.ffn_hidden
    tokens = lengths.double().sum()
    pairs = (lengths.double() * (lengths.double() + 1) / 2).sum()  # (token, attended token)
    return float(model.layers * (2 * weights * tokens + 4 * model.heads * head_dim * pairs))


def head_flops(model: ModelConfig, vocab_size: int, rows: int) -> float:
    """The output projection of `rows` hidden states."""
    return 2.0 * model.hidden * vocab_size * rows


def step_flops(
    model: ModelConfig,
    vocab_size: int,
    buffer: RolloutBuffer,
    *,
    epochs: int,
    passes: int,
    critic_epochs: int | None = None,
    reward_models: Sequence[ModelConfig] = (),
) -> float:
    """The rollout, the log-probs and the update of the samples in `buffer`.

    A prompt that is sampled several times is read once. A backward pass counts as two forward ones.

    Args:
        epochs: passes of the update.
        passes: forward passes before the update: of the policy, of the reference.
        critic_epochs: passes of the critic's update; None = there is no critic. Its head is one row
            of a matrix, which does not count.
        reward_models: those that score the samples; counted as if they had the policy's tokens.
    """
    forward = body_flops(model, buffer.lengths)
    forward += head_flops(model, vocab_size, int(buffer.response_lengths.sum()))
    prompts = dict(zip(buffer.group_ids.tolist(), buffer.prompt_lengths.tolist()))
    once = body_flops(model, torch.tensor(list(prompts.values())))
    rollout = forward - body_flops(model, buffer.prompt_lengths) + once
    critic = 0.0
    if critic_epochs is not None:
        critic = body_flops(model, buffer.lengths) * (1 + 3 * critic_epochs)
    scored = sum(body_flops(scorer, buffer.lengths) for scorer in reward_models)
    return rollout + forward * (passes + 3 * epochs) + critic + scored
