"""Reward shaping of REINFORCE++ (arXiv 2501.03262): normalise, then scale, then clip.

Left out: running normalisation across steps, length penalties (write them as a reward function).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rpp.algorithms.numerics import on_collective_device
from megatron_rpp.algorithms.statistics import Moments, global_whiten, moments


@dataclass(frozen=True)
class ShapingStats:
    """Statistics of the shaping over the scores of all ranks; all are 0 if there are no scores."""

    raw: Moments
    shaped: Moments
    low: float
    """Smallest shaped score."""
    high: float
    """Largest shaped score."""
    clipped_share: float
    """Share of the scores that the clipping changed."""


def shape_scores(
    scores: Tensor,
    *,
    normalize: bool,
    scale: float,
    clip: float | None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, ShapingStats]:
    """Normalises over the global batch, then scales, then clips.

    Collective over ``group`` with any settings.

    Args:
        scores: [B], this rank's scores. normalize: to mean 0, variance 1 over the group's ranks.
        scale: a factor; 1 changes nothing. clip: a bound on the absolute value; None for no bound.

    Returns:
        The shaped scores [B], and the statistics of raw and shaped scores over the group's ranks.

    Raises:
        ValueError: clip is not positive, or a score is not finite.
    """
    if clip is not None and clip <= 0:
        raise ValueError(f"reward clip is {clip}: give a positive bound, or none to switch it off")
    every_score = torch.ones_like(scores, dtype=torch.bool)
    if normalize:
        normalized, raw = global_whiten(scores, every_score, group)
    else:
        normalized, raw = scores, moments(scores, every_score, group)
    scaled = normalized * scale
    shaped = scaled if clip is None else scaled.clamp(-clip, clip)
    stats = moments(shaped, every_score, group)
    clipped = moments((shaped != scaled).to(scores), every_score, group).mean
    return shaped, ShapingStats(raw, stats, *_range(shaped, group), clipped)


def _range(values: Tensor, group: dist.ProcessGroup | None) -> tuple[float, float]:
    """Smallest and largest value over all ranks of ``group``; (0, 0) if there are no values."""
    bounds = values.new_full((2,), -torch.inf, dtype=torch.float64)
    if len(values):
        bounds[0], bounds[1] = -values.min(), values.max()
    if group is not None:
        bounds = on_collective_device(bounds, group)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    low, high = bounds.tolist()
    return (-low, high) if high > -torch.inf else (0.0, 0.0)
