"""Losses of a reward model: of pairs of responses, and of responses with a score.

Shapes: n pairs or responses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def bradley_terry_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor
) -> torch.Tensor:
    """The loss of each pair [n], `-log sigmoid(r_chosen - r_rejected - margin)`.

    The model of Bradley and Terry, as in InstructGPT (arXiv 2203.02155, equation 1); the margin is that
    of Llama 2 (arXiv 2307.09288, equation 2).

    Args:
        chosen: [n] rewards of the better responses.
        rejected: [n] rewards of the others.
        margin: [n] by how much the first is better; 0 = unknown.
    """
    return -F.logsigmoid(chosen - rejected - margin)


def squared_error(rewards: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The loss of each response [n], `(r - score)^2`, of rewards [n] and given scores [n]."""
    return (rewards - scores).square()


def correlation(rewards: torch.Tensor, scores: torch.Tensor) -> float:
    """Pearson's correlation of rewards [n] and given scores [n], in fp64; 0 if either is constant."""
    if any(len(values) == 0 or values.min() == values.max() for values in (rewards, scores)):
        return 0.0
    x, y = (values.double() - values.double().mean() for values in (rewards, scores))
    x, y = x / x.abs().max(), y / y.abs().max()  # their squares cannot vanish
    return float((x * y).sum() / (x.square().sum().sqrt() * y.square().sum().sqrt()))
