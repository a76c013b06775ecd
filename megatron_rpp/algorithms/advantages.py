"""From scores to advantages: group baselines, and the advantage of each algorithm.

    reinforce++            returns with the KL in the reward, normalised over the global batch
    ppo                    generalised advantage estimates of a critic, with the KL in the reward,
                           normalised over the global batch
    reinforce++_baseline   R - group mean on every token, normalised over the global batch
    grpo                   (R - group mean) / (group std + 1e-6), not normalised further
    rloo                   R - mean of the *other* responses of the group, not normalised further

reinforce++ and reinforce++_baseline are arXiv 2501.03262. PPO (arXiv 1707.06347) with the same token
rewards and the same normalisation is what they do without. GRPO (arXiv 2402.03300) and RLOO (arXiv 2402.14740) are for
comparison and follow the definitions that verl and TRL use: the sample standard deviation (Bessel's
correction) plus 1e-6, and one scalar for all tokens. In these, and with a baseline, the KL is a loss
term and not part of the reward. Left out: groups that span ranks (all responses to a prompt live on one).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rpp.algorithms.gae import gae
from megatron_rpp.algorithms.numerics import check_mask, select
from megatron_rpp.algorithms.returns import returns_to_go, token_rewards
from megatron_rpp.algorithms.statistics import Moments, global_whiten, moments

GROUP_KINDS = ("mean", "grpo", "rloo")
ALGORITHMS = ("reinforce++", "ppo", "reinforce++_baseline", "grpo", "rloo")
GRPO_EPS = 1e-6


def group_baseline(scores: Tensor, group_ids: Tensor, kind: str) -> Tensor:
    """Scores each response relative to the other responses to its prompt.

    Groups may have any sizes and order. A group of one has nothing to compare with: "mean" gives 0
    (R - R); "grpo" and "rloo" keep the score (verl: mean 0, std 1; baseline 0), so "grpo" gives
    R / (1 + 1e-6).

    Args:
        scores: [B]. group_ids: [B] integers, equal for the responses to one prompt.
        kind: "mean": R - mean. "grpo": (R - mean) / (std + 1e-6), std with Bessel's correction.
            "rloo": R - mean of the others.

    Returns:
        [B], dtype and device of ``scores``.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in GROUP_KINDS:
        raise ValueError(f"unknown group baseline {kind!r}: choose one of {', '.join(GROUP_KINDS)}")
    assert scores.ndim == 1 and scores.shape == group_ids.shape
    # On the host and in fp64: B is small, and CUDA's index_add adds in no fixed order.
    raw = scores.detach().cpu().double()
    _, member, sizes = torch.unique(group_ids.cpu(), return_inverse=True, return_counts=True)
    size, alone = sizes[member].double(), sizes[member] == 1

    def group_sum(values: Tensor) -> Tensor:
        return raw.new_zeros(len(sizes)).index_add_(0, member, values)[member]

    # Subtract the group's maximum: equal scores then have a difference of exactly 0.
    lowest = raw.new_full(sizes.shape, -torch.inf)
    shifted = raw - lowest.scatter_reduce_(0, member, raw, "amax")[member]
    centered = shifted - group_sum(shifted) / size
    others = (size - 1).clamp(min=1)
    if kind == "mean":
        relative = centered
    elif kind == "grpo":
        std = (group_sum(centered.square()) / others).sqrt()
        relative = torch.where(alone, raw / (1 + GRPO_EPS), centered / (std + GRPO_EPS))
    else:
        # R - (sum - R) / (n - 1) = (R - mean) n / (n - 1)
        relative = torch.where(alone, raw, centered * size / others)
    return relative.to(scores)


def compute_advantages(
    name: str,
    scores: Tensor,
    mask: Tensor,
    *,
    group_ids: Tensor,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    gamma: float = 1.0,
    values: Tensor | None = None,
    gae_lambda: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Moments]:
    """Computes the advantages of this rank's responses by the algorithm ``name`` (see above).

    Collective over ``group``: every rank calls it, even if it has no tokens. Rows hold whole
    responses, and each response lives on one rank of the group.

    Args:
        name: one of ``ALGORITHMS``.
        scores: [B], shaped scores. mask: [B, T] bool. group_ids: [B] (read by the algorithms that
            compare the responses of a prompt).
        kl, kl_coef, gamma: as ``token_rewards`` and ``returns_to_go``; read by reinforce++ and ppo.
        values, gae_lambda: as ``gae``; read by ppo only.

    Returns:
        (advantages [B, T], returns [B, T], moments). The moments are those of the advantages before
        the global normalisation, over all ranks. The returns are these advantages; with ppo, they
        are the targets of the critic. Advantages and returns are 0 where the mask is False.

    Raises:
        ValueError: unknown name; see also ``token_rewards``, ``returns_to_go``, ``gae``, ``moments``.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}: choose one of {', '.join(ALGORITHMS)}")
    if name in ("reinforce++", "ppo"):
        rewards = token_rewards(scores, kl, mask, kl_coef)
    if name == "ppo":
        assert values is not None, "ppo needs the values of a critic"
        advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    elif name == "reinforce++":
        advantages = returns = returns_to_go(rewards, mask, gamma)
    else:
        kind = "mean" if name == "reinforce++_baseline" else name
        advantages = returns = _on_every_token(group_baseline(scores, group_ids, kind), mask)
    if name in ("grpo", "rloo"):
        return advantages, returns, moments(advantages, mask, group)
    whitened, stats = global_whiten(advantages, mask, group)
    return whitened, returns, stats


def _on_every_token(values: Tensor, mask: Tensor) -> Tensor:
    """Expands [B] to [B, T]: the row's value under the mask, 0 elsewhere."""
    check_mask(mask)
    assert values.shape == mask.shape[:1]
    return select(values[:, None], mask)
