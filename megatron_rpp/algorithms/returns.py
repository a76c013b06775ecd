"""Token rewards and returns of REINFORCE++ (arXiv 2501.03262).

    r_t = 1[t is the last masked token] * R - beta * KL_t      (0 where the mask is 0)
    G_t = sum over i >= t of gamma^(i-t) r_i

A response may have gaps in its mask (tool output between generated tokens). Tokens in a gap have no
reward and no KL, and G passes through them unchanged: gamma counts generated tokens only. Left out:
value functions and GAE (the algorithm has no critic), per-step reward models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rpp.algorithms.numerics import check_mask, select


def token_rewards(  # noqa: PLR0917 (others call it by position)
    scores: Tensor, kl: Tensor | None, mask: Tensor, kl_coef: float
) -> Tensor:
    """Returns each token's reward: minus the KL penalty, plus the score on the last generated one.

    Args:
        scores: [B], the score R of each response.
        kl: [B, T], the KL estimate of each token; may be None if ``kl_coef`` is 0.
        mask: [B, T] bool, True where the policy generated the token.
        kl_coef: beta, reward per nat.

    Returns:
        [B, T], exactly 0 where the mask is False. A row without tokens is all zeros.

    Raises:
        ValueError: ``kl`` is None although ``kl_coef`` is not 0.
    """
    check_mask(mask)
    assert scores.shape == mask.shape[:1], f"scores {scores.shape}, mask {mask.shape}"
    tokens_left = mask.flip(-1).cumsum(-1).flip(-1)
    rewards = select(scores[:, None], mask & (tokens_left == 1))
    if kl_coef == 0:
        return rewards
    if kl is None:
        raise ValueError(
            f"kl_coef is {kl_coef} but there is no KL: compute the reference log-probs"
        )
    check_mask(mask, kl)
    return rewards - kl_coef * select(kl, mask)


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Returns the discounted sum of each token's reward and all later rewards of its row.

    Solves G_t = r_t + d_t G_{t+1}, with d_t = gamma under the mask and 1 in a gap, as a parallel
    scan: after the step with stride s, G_t sums the rewards of [t, t + 2s) and d_t is the product
    of their discounts. This takes log2(T) vector operations and needs no power gamma^-t, which
    would overflow.

    Args:
        rewards: [B, T]. mask: [B, T] bool. gamma: discount per generated token, in [0, 1].

    Returns:
        [B, T] in the dtype of ``rewards`` (summed in fp64), 0 where the mask is False.

    Raises:
        ValueError: gamma is outside [0, 1].
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
