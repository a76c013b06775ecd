"""The section about the training of a reward model."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_rpp.config.training import OptimizerConfig
from megatron_rpp.config.validation import check_filled, check_range


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """Training of a reward model (megatron_rpp.reward_model)."""

    steps: int = 1000
    """Number of optimizer steps."""
    batch_size: int = 64
    """Rows per step, over all ranks: pairs of responses, or responses with a score."""
    dir: str = "runs/default/reward_model"
    """Directory for the checkpoints and the logs of the reward model."""
    eval_interval: int = 50
    """Steps between evaluations; 0 = evaluate only after the last step."""
    checkpoint_interval: int = 0
    """Steps between checkpoints; 0 = save only at the end, or when the run is told to stop."""
    stop_accuracy: float | None = None
    """Stop when this share of the held-out pairs is ranked right; null = never. Not for rows with a
    score."""
    chosen_key: str = "chosen"
    """Field of a row that holds the better response: a text, or a list of messages. May be a path such
    as a.b, like all keys."""
    rejected_key: str = "rejected"
    """Field that holds the worse response."""
    margin_key: str = "margin"
    """Field that holds by how much the reward of the better response should be higher at least, a
    number. Rows may lack it; then it is 0."""
    response_key: str = "response"
    """Field that holds the response, if rows have a score instead of two responses."""
    score_key: str = "score"
    """Field that holds that score, a number, which the reward shall be."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and learning-rate schedule of the reward model, independent of the section optimizer."""

    def __post_init__(self) -> None:
        keys = "chosen_key rejected_key margin_key response_key score_key"
        check_filled("reward_model", self, f"dir {keys}")
        check_range("reward_model", self, "steps batch_size", at_least=1)
        check_range("reward_model", self, "eval_interval checkpoint_interval", at_least=0)
        check_range("reward_model", self, "stop_accuracy", above=0, at_most=1)
