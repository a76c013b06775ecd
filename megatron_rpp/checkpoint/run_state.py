"""Where a run stands: what a checkpoint keeps beside weights and optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RunState:
    step: int = 0
    """Steps done."""
    prompts_seen: int = 0
    """Data position: prompts taken from the shuffled data set so far."""
    accuracy: float | None = None
    """Held-out accuracy of the last evaluation."""
    kl_factor: float = 1.0
    """What the adaptive KL controller has made of the KL coefficients: a factor on them."""
    skipped_in_a_row: int = 0
    """Updates skipped since the last one that was not, for a loss or gradient not finite."""

    identity: dict[str, list[str]] = field(default_factory=dict)
    """What the run was made with (identity.py): [digest, words] by name."""

    def reached(self, target: float | None) -> bool:
        """Whether the last evaluation reached the accuracy at which to stop (None: never)."""
        return target is not None and self.accuracy is not None and self.accuracy >= target


def due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps (0: never) happens after `step`."""
    return interval > 0 and step % interval == 0
