"""The KL coefficients of a step: those of the recipe, times a factor that the run carries along."""

from __future__ import annotations

from dataclasses import replace

from megatron_rpp.algorithms import adapted_kl_factor
from megatron_rpp.config import AlgorithmConfig


def scaled(algorithm: AlgorithmConfig, factor: float) -> AlgorithmConfig:
    """`algorithm` with its KL coefficients, in the reward and in the loss, times `factor`."""
    return replace(
        algorithm,
        kl_coef=algorithm.kl_coef * factor,
        kl_loss_coef=algorithm.kl_loss_coef * factor,
    )


def next_factor(
    algorithm: AlgorithmConfig, factor: float, row: dict[str, float], samples: int
) -> float:
    """The factor of the next step, from the KL in this step's `row` over its `samples` responses.

    It stays 1 with the fixed controller. The row is the same on every rank, and so is the factor.
    """
    if algorithm.kl_controller == "fixed":
        return factor
    kl = row[f"kl/{algorithm.kl_estimator}"]
    return adapted_kl_factor(factor, kl, algorithm.kl_target, samples, algorithm.kl_horizon)
