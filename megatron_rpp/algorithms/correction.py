"""Importance weights for a rollout engine whose log-probs differ from those of the trainer.

    w_t = exp(log pi_old(y_t) - log mu(y_t))

The engine sampled from mu; pi_old is the same policy as computed by the trainer. Both are
constants. w multiplies the policy loss of its token; the ratio in the clipped loss is still that of
pi_theta to pi_old.

    cap     min(w, C): truncated importance sampling (Ionides 2008; for language models F. Yao et
            al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025)
    mask    w within [1/C, C], 0 outside: tokens on which engine and trainer disagree are ignored
            (IcePop, Ling team 2025)

A token with weight 0 still counts in the mean of the loss. Left out: weights of whole sequences
(their variance grows with the length).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rpp.algorithms.numerics import MAX_LOG_RATIO, at_least_fp32

CORRECTIONS = ("cap", "mask")


def importance_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """Returns w of every token, unbounded, in at least fp32 and without gradient.

    Both inputs have the same shape, which may be any.
    """
    assert old_logprobs.shape == rollout_logprobs.shape
    log_ratio = at_least_fp32(old_logprobs.detach()) - at_least_fp32(rollout_logprobs.detach())
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def correction_weights(ratio: Tensor, kind: str, maximum: float) -> Tensor:
    """Returns the weight of every token's policy loss.

    Args:
        ratio: from ``importance_ratio``. kind: "cap" or "mask". maximum: C, at least 1.

    Raises:
        ValueError: unknown kind; maximum below 1.
    """
    if maximum < 1:
        raise ValueError(f"the largest rollout weight is {maximum}: it must be at least 1")
    if kind == "cap":
        return ratio.clamp(max=maximum)
    if kind == "mask":
        return torch.where((ratio >= 1 / maximum) & (ratio <= maximum), ratio, 0.0)
    raise ValueError(f"unknown correction {kind!r}: choose one of {', '.join(CORRECTIONS)}")


def effective_share(total: float, squares: float, count: float) -> float:
    """Effective sample size over sample size, (sum w)^2 / (N sum w^2), in (0, 1] (Kish 1965).

    It is 0 if there are no tokens.

    Args:
        total, squares, count: sums of w, of w^2 and of 1 over the tokens of all ranks.
    """
    return total**2 / (count * squares) if count else 0.0
