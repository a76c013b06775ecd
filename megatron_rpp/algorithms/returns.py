"""Token rewards and returns of REINFORCE++ (arXiv 2501.03262).

    r_t = 1[t is the last masked token] * R - beta * KL_t      (0 where the mask is 0)
    G_t = sum over i >= t of gamma^(i-t) r_i

A response may have holes in its mask (tool output between generated tokens). Their tokens carry no
reward and no KL, and G passes through them unchanged: gamma counts generated tokens only. Left
out: value functions and GAE (the algorithm has no critic), per-step reward models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rpp.algorithms.numerics import check_mask, select


def token_rewards(scores: Tensor, kl: Tensor | None, mask: Tensor, kl_coef: float) -> Tensor:
    """Reward of every token: the score on the last generated one, minus the KL penalty.

    Args:
        scores: [B], score R of each response.
        kl: [B, T], KL estimate of each token; not read (may be None) when ``kl_coef`` is 0.
        mask: [B, T] bool, True where the policy generated the token.
        kl_coef: beta, reward per nat.

    Returns:
        [B, T], exactly 0 where the mask is False. A row without tokens is all zeros.

    Raises:
        ValueError: ``kl`` is None although ``kl_coef`` is not 0.
    """
    check_mask(mask)
    assert scores.shape == mask.shape[:1], f"one score a row: {scores.shape}, mask {mask.shape}"
    tokens_left = mask.flip(-1).cumsum(-1).flip(-1)
    rewards = select(scores[:, None], mask & (tokens_left == 1))
    if kl_coef == 0:
        return rewards
    if kl is None:
        raise ValueError(f"kl_coef is {kl_coef} but there is no KL: score the reference log-probs")
    check_mask(mask, kl)
    return rewards - kl_coef * select(kl, mask)


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Discounted sum of this and all later rewards of the row.

    Solves G_t = r_t + d_t G_{t+1}, d_t = gamma under the mask and 1 in a hole, as a parallel scan:
    after the step with stride s, G_t sums the rewards of [t, t + 2s) and d_t is the product of its
    discounts. That is log2(T) vector operations, and no power gamma^-t that overflows.

    Args:
        rewards: [B, T]. mask: [B, T] bool. gamma: discount per generated token, in [0, 1].

    Returns:
        [B, T] in the dtype of ``rewards`` (summed in fp64), 0 where the mask is False.

    Raises:
        ValueError: gamma outside [0, 1].
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}: the discount must lie in [0, 1]")
    check_mask(mask, rewards)
    returns = select(rewards, mask).double()
    discount = torch.where(mask, gamma, torch.ones_like(returns))
    stride, length = 1, mask.shape[-1]
    while stride < length:
        later = discount[:, :-stride] * returns[:, stride:]
        returns = torch.cat([returns[:, :-stride] + later, returns[:, -stride:]], dim=-1)
        span = discount[:, :-stride] * discount[:, stride:]
        discount = torch.cat([span, discount[:, -stride:]], dim=-1)
        stride *= 2
    return select(returns, mask).to(rewards.dtype)
