"""The critic of PPO: its values before the update (beside stage 3), and its own update.

The value of a token is read where the policy predicts it: it is that of the prompt and the tokens before
it. Values stay on the ranks that own the samples, like log-probs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_rpp.algorithms import clipped_values, value_loss
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.config import CriticConfig, RolloutConfig, TrainConfig
from megatron_rpp.model.scalar_model import scalars
from megatron_rpp.model.trained_model import TrainedModel
from megatron_rpp.records import MicroBatch, StepKey
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.stages.logprobs import response_column
from megatron_rpp.stages.minibatches import (
    Objective,
    TokenSums,
    UpdateProgress,
    column,
    train_epochs,
)


@dataclass(frozen=True)
class CriticStats:
    """Means over the step's mini-batches; those whose update was skipped do not count."""

    loss: float
    clip_fraction: float
    """Share of tokens whose value had moved too far to get a gradient."""
    grad_norm: float
    learning_rate: float
    skip_reasons: list[str]
    """One text per skipped update."""


def compute_values(buffer: RolloutBuffer, critic: torch.nn.ModuleList, *, max_tokens: int) -> None:
    """Fills `values`, by the critic before its update. Collective.

    max_tokens: the token budget of a micro-batch.
    """

    def head(batch: MicroBatch, hidden: torch.Tensor) -> torch.Tensor:
        return scalars(critic, hidden, batch.rows)

    buffer.values = response_column(critic, buffer, head, max_tokens=max_tokens)


def _objective(
    model: torch.nn.ModuleList, buffer: RolloutBuffer, settings: CriticConfig, *, aggregation: str
) -> Objective:
    """The loss of the critic. It reports the loss sum, count, tokens and clipped tokens."""
    sums = TokenSums(buffer, aggregation)

    def loss(
        batch: MicroBatch, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert buffer.values is not None and buffer.returns is not None
        values = scalars(model, hidden, batch.rows)[None]
        old, returns, mask = (
            column(kept, batch, hidden) for kept in (buffer.values, buffer.returns, buffer.mask)
        )
        per_token = settings.value_coef * value_loss(values, old, returns, settings.value_clip)
        total, count = sums.loss(batch, per_token)
        clipped = clipped_values(values.detach(), old, returns, mask=mask, clip=settings.value_clip)
        report = (total.detach(), count, mask.sum(), clipped)
        return total, count.int(), torch.stack([value.double() for value in report])

    return Objective(loss, "critic", sums=4, counter="critic_skipped_in_a_row")


def update_critic(
    critic: TrainedModel,
    buffer: RolloutBuffer,
    settings: CriticConfig,
    *,
    aggregation: str,
    train: TrainConfig,
    rollout: RolloutConfig,
    key: StepKey,
    state: RunState,
    progress: UpdateProgress,
    safe_point: Callable[[], None],
) -> CriticStats:
    """Updates `critic` towards the returns of a step, with the same result on any layout. Collective.

    Args:
        buffer: this replica's shard, with values and returns.
        aggregation: how the loss of a mini-batch is averaged, as that of the policy.
        state: counts the skipped updates.
        progress, safe_point: see train_epochs.
    Raises:
        RunFailure: too many updates in a row were skipped (nonfinite.py).
    """
    objective = _objective(critic.model, buffer, settings, aggregation=aggregation)
    train_epochs(
        critic, buffer, objective, train=train,
        rollout=rollout, key=key, progress=progress, state=state,
        safe_point=safe_point,
    )  # fmt: skip
    return CriticStats(
        loss=progress.loss,
        clip_fraction=progress.per_token(3),
        grad_norm=progress.grad_norm,
        learning_rate=critic.optimizer.param_groups[0]["lr"],
        skip_reasons=progress.faults,
    )
