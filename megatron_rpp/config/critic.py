"""The section about the critic of PPO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_rpp.config.training import OptimizerConfig
from megatron_rpp.config.validation import check_range
from megatron_rpp.lifecycle.config_error import ConfigError

if TYPE_CHECKING:
    from megatron_rpp.config import AlgorithmConfig


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The critic of algorithm.name ppo: a second model of the policy's shape and layout, which gives
    a value for every token. With other algorithms, every setting stays at its default."""

    init_path: str | None = None
    """Megatron checkpoint directory that the critic starts from: the critic of a run of ppo, a reward
    model, whose head it takes over, or a language model. null = the initial weights of the policy with
    a new head."""
    hf_path: str | None = None
    """Hugging Face model directory to start from instead of init_path: a sequence classifier with
    one label, or a language model."""
    value_clip: float | None = 0.2
    """A value may move by this much in the updates of a step before its loss is clipped; null = no
    clipping."""
    value_coef: float = 1.0
    """Factor that multiplies the loss of the critic."""
    warmup_steps: int = 0
    """Number of steps at the start in which only the critic is trained and the policy stands
    still."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and learning-rate schedule of the critic, independent of the section optimizer."""

    def __post_init__(self) -> None:
        check_range("critic", self, "value_clip value_coef", above=0)
        check_range("critic", self, "warmup_steps", at_least=0)
        if self.hf_path is not None and self.init_path is not None:
            raise ConfigError(
                f"critic.hf_path {self.hf_path} and critic.init_path {self.init_path} are both set: "
                "the weights come from only one of them, remove the other"
            )


def check_critic(critic: CriticConfig, algorithm: AlgorithmConfig, *, steps: int) -> None:
    """Checks that the policy is trained in some of the `steps`, and that nothing is set that only ppo
    reads if the algorithm is another."""
    if algorithm.name == "ppo":
        if critic.warmup_steps >= steps:
            raise ConfigError(
                f"critic.warmup_steps must be below train.steps = {steps}, got "
                f"{critic.warmup_steps}: the policy would never be trained"
            )
        return
    defaults = CriticConfig()
    unread = {
        f"critic.{name}": value
        for name, value in vars(critic).items()
        if value != getattr(defaults, name)
    }
    if algorithm.gae_lambda != type(algorithm).gae_lambda:
        unread["algorithm.gae_lambda"] = algorithm.gae_lambda
    for name, value in unread.items():
        raise ConfigError(
            f"{name} is {value}, but algorithm.name {algorithm.name} has no critic that reads it: "
            "remove it, or set algorithm.name to ppo"
        )
