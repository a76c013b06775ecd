"""Generalized advantage estimation (Schulman et al., arXiv 1506.02438), for PPO with a critic.

    delta_t = r_t + gamma V_next(t) - V_t          V_next = 0 after the last token
    A_t     = delta_t + gamma lambda A_next(t)
    R_t     = A_t + V_t                            the target of the critic

next(t) is the next token that the policy generated: tokens in a gap of the mask (tool output) have no
reward and no value, and gamma and lambda do not count them, as in ``returns_to_go``. With lambda = 1 and
V = 0, A and R are the returns of REINFORCE++. Left out: a value after a response that was cut off (its
score is its last reward, as for the other algorithms).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rpp.algorithms.numerics import check_mask, select
from megatron_rpp.algorithms.returns import returns_to_go


def gae(  # noqa: PLR0917 (others call it by position)
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Returns the advantage of each token, and the return that its value should predict.

    Args:
        rewards: [B, T]. values: [B, T], V of the state before each token. mask: [B, T] bool, True
            where the policy generated the token.
        gamma, lam: discounts per generated token, both in [0, 1].

    Returns:
        (advantages [B, T], returns [B, T]) in the dtype of ``rewards`` (summed in fp64), 0 where the
        mask is False. They are constants: no gradient flows into ``values``.

    Raises:
        ValueError: gamma or lam is outside [0, 1].
    """
    for name, value in (("gamma", gamma), ("lambda", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}: the discount must lie in [0, 1]")
    check_mask(mask, rewards, values)
    known = select(values.detach(), mask).double()
    deltas = select(rewards, mask).double() + gamma * _next_values(known, mask) - known
    advantages = returns_to_go(select(deltas, mask), mask, gamma * lam)
    returns = select(advantages + known, mask)
    return advantages.to(rewards.dtype), returns.to(rewards.dtype)


def _next_values(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T], the value at the first masked position after each; 0 if there is none."""
    length = mask.shape[-1]
    own = torch.where(mask, torch.arange(length, device=mask.device), length)
    # The first masked position at or after each; shifted by one, that after each.
    first = own.flip(-1).cummin(-1).values.flip(-1)
    after = torch.nn.functional.pad(first[:, 1:], (0, 1), value=length)
    return torch.nn.functional.pad(values, (0, 1)).gather(-1, after)
