"""Where a run stands between two steps: what a checkpoint holds besides weights and optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RunState:
    step: int = 0
    """Finished steps."""
    prompts_seen: int = 0
    """Data position: prompts taken from the shuffled data set so far."""
    accuracy: float | None = None
    """Held-out accuracy of the last evaluation."""
    kl_factor: float = 1.0
    """The factor by which the adaptive KL controller multiplies the KL coefficients."""
    skipped_in_a_row: int = 0
    """Updates of the policy skipped since the last one that was not, because of NaN or infinity."""
    critic_skipped_in_a_row: int = 0
    """The same for the critic."""
    identity: dict[str, list[str]] = field(default_factory=dict)
    """Data, tokenizer and rewards of the run (identity.py): [digest, description] by name."""

    def reached(self, target: float | None) -> bool:
        """Whether the last evaluation reached the accuracy at which to stop (None: never)."""
        return target is not None and self.accuracy is not None and self.accuracy >= target


def due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps (0: never) is due after `step`."""
    return interval > 0 and step % interval == 0
