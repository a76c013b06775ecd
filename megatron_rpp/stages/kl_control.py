"""The KL coefficients of a step: the settings' coefficients times a factor that adapts to the KL."""

from __future__ import annotations

from dataclasses import replace

from megatron_rpp.algorithms import adapted_kl_factor
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.config import AlgorithmConfig


def scaled(algorithm: AlgorithmConfig, factor: float) -> AlgorithmConfig:
    """Multiplies the KL coefficients, in the reward and in the loss, by `factor`."""
    return replace(
        algorithm,
        kl_coef=algorithm.kl_coef * factor,
        kl_loss_coef=algorithm.kl_loss_coef * factor,
    )


def adapt(
    state: RunState, row: dict[str, float], algorithm: AlgorithmConfig, *, samples: int
) -> None:
    """Sets `state.kl_factor` for the next step, from the KL of this step over `samples` responses.

    The fixed controller leaves it at 1. The metrics `row` is the same on every rank, so the factor
    is too.
    """
    if algorithm.kl_controller == "adaptive":
        kl = row[f"kl/{algorithm.kl_estimator}"]
        state.kl_factor = adapted_kl_factor(
            state.kl_factor,
            kl,
            target=algorithm.kl_target,
            samples=samples,
            horizon=algorithm.kl_horizon,
        )
