"""The clipped losses of policy and critic per token, their aggregation over a mini-batch, and statistics.

    rho_t = exp(log pi_theta - log pi_old)
    loss_t = -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)

This is PPO (arXiv 1707.06347) with the two bounds of DAPO (arXiv 2503.14476) and the dual clip of
arXiv 1912.09729. PPO clips the critic's loss in the same way (see ``value_loss``). Nothing here divides by a count of the whole mini-batch or communicates with other
ranks: the caller sums up numerators and counts with ``aggregation_weights``, reduces both over
micro-batches and the DP x CP ranks and divides once (Megatron's ``calculate_per_token_loss``
contract). Left out: sequence-level ratios (GSPO).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_rpp.algorithms.numerics import (
    MAX_LOG_RATIO,
    at_least_fp32,
    check_mask,
    finite_gradient,
    select,
)

AGGREGATIONS = ("token_mean", "sequence_mean")


def policy_loss(  # noqa: PLR0917 (others call it by position)
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """Computes the clipped surrogate loss of every token.

    Args:
        logprobs: [B, T], under the current policy, with gradient.
        old_logprobs: [B, T], under the policy before the update; constant.
        advantages: [B, T]; constant.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: if A < 0, the loss is at most -dual_clip * A, so that one token with a huge
            ratio cannot dominate the batch. It must exceed 1; None switches it off.

    Returns:
        [B, T], at least fp32. If an input is NaN (undefined values of masked-out tokens), the loss
        is NaN and its gradient 0; select such tokens away.

    Raises:
        ValueError: a clip bound is outside its range.
    """
    _check_clip(clip_low, clip_high, dual_clip)
    assert logprobs.shape == old_logprobs.shape == advantages.shape

    def surrogate(log_ratio: Tensor, advantage: Tensor) -> Tensor:
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
        if dual_clip is None:
            return loss
        return torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)

    return finite_gradient(
        surrogate, _log_ratio(logprobs, old_logprobs), at_least_fp32(advantages.detach())
    )


def value_loss(  # noqa: PLR0917 (others call it by position)
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None = None
) -> Tensor:
    """Computes the clipped squared error of every token's value.

        V_clip = V_old + clip(V - V_old, -c, c)
        loss   = max((V - R)^2, (V_clip - R)^2) / 2

    As in PPO's reference implementation (github.com/openai/baselines, ppo2): a value that has moved
    further than c towards its return gets no gradient.

    Args:
        values: [B, T], by the current critic, with gradient.
        old_values: [B, T], by the critic before the update; constant.
        returns: [B, T], the targets (``gae``); constant.
        clip: c, in the unit of the returns; None = no clipping.

    Returns:
        [B, T], at least fp32. If an input is NaN (undefined values of masked-out tokens), the loss
        is NaN and its gradient 0; select such tokens away.

    Raises:
        ValueError: clip is not positive.
    """
    if clip is not None and clip <= 0:
        raise ValueError(f"clip is {clip}: the bound of a value's change must be positive, or None")
    assert values.shape == old_values.shape == returns.shape

    def error(value: Tensor, old: Tensor, target: Tensor) -> Tensor:
        loss = (value - target).square()
        if clip is not None:
            bounded = old + (value - old).clamp(-clip, clip)
            loss = torch.maximum(loss, (bounded - target).square())
        return loss / 2

    old, target = (at_least_fp32(column.detach()) for column in (old_values, returns))
    return finite_gradient(error, at_least_fp32(values), old, target)


@torch.no_grad()
def clipped_values(
    values: Tensor, old_values: Tensor, returns: Tensor, *, mask: Tensor, clip: float | None
) -> Tensor:
    """Number of tokens under ``mask`` whose value gets no gradient from ``value_loss``, a scalar."""
    check_mask(mask, values, old_values, returns)
    if clip is None:
        return mask.new_zeros((), dtype=torch.int64)
    # The distance too, because a bounded value differs from the value by rounding.
    moved = (at_least_fp32(values) - at_least_fp32(old_values)).abs() > clip
    unclipped = value_loss(values, old_values, returns)
    return (mask & moved & (value_loss(values, old_values, returns, clip) > unclipped)).sum()


def aggregation_weights(mask: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Computes what each token adds to the numerator and the denominator of the mini-batch mean.

    The weights depend on the whole response. The sums may then be taken over any parts of it, such
    as those on different context-parallel ranks.

    Args:
        mask: [B, T] bool; a row is a whole response.
        kind: "token_mean": every token counts equally. "sequence_mean": every row with at least
            one token counts equally, so a token weighs 1 / (tokens of its row).

    Returns:
        (weights [B, T] fp64, counts [B, T] bool). The counts mark the tokens to count; for
        "sequence_mean" that is the last of each row. Both are 0 where the mask is False.

    Raises:
        ValueError: unknown kind.
    """
    check_mask(mask)
    if kind == "token_mean":
        return mask.double(), mask
    if kind == "sequence_mean":
        seen, lengths = mask.cumsum(-1), mask.sum(-1, keepdim=True)
        return mask.double() / lengths.clamp(min=1), mask & (seen == lengths)
    raise ValueError(f"unknown loss aggregation {kind!r}: choose one of {', '.join(AGGREGATIONS)}")


class PolicyStats(NamedTuple):
    """Statistics of an update as scalar tensors; all are 0 if there are no tokens.

    Over micro-batches and ranks, add up the first three and take the maximum of the last.
    """

    tokens: Tensor
    clipped: Tensor
    """Number of tokens whose loss is the clipped term; they have no gradient."""
    approx_kl: Tensor
    """Sum of k3 for KL(old || current), nats: rho - 1 - log rho."""
    ratio_max: Tensor


@torch.no_grad()
def policy_stats(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
) -> PolicyStats:
    """Measures the effect of clipping; arguments as in ``policy_loss``, and mask [B, T] bool."""
    check_mask(mask, logprobs, old_logprobs, advantages)
    log_ratio = select(_log_ratio(logprobs, old_logprobs), mask)
    ratio = select(log_ratio.exp(), mask)
    advantages = select(at_least_fp32(advantages), mask)
    bound = torch.where(advantages > 0, ratio > 1 + clip_high, ratio < 1 - clip_low)
    return PolicyStats(
        tokens=mask.sum(),
        clipped=(bound & (advantages != 0)).sum(),
        approx_kl=(torch.expm1(log_ratio) - log_ratio).sum(),
        ratio_max=ratio.max() if ratio.numel() else ratio.new_zeros(()),
    )


def _log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Returns log rho [B, T], at least fp32, clamped to +-MAX_LOG_RATIO; its gradient is 0 beyond."""
    difference = at_least_fp32(logprobs) - at_least_fp32(old_logprobs.detach())
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _check_clip(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low is {clip_low}: it must lie in [0, 1] (0.2 is usual)")
    if clip_high < 0:
        raise ValueError(f"clip_high is {clip_high}: it must not be negative (0.2 is usual)")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip is {dual_clip}: it must exceed 1 (3 is usual), or be none")
