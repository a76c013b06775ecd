"""The configuration of a run: all sections, and the checks that concern more than one of them.

``check_world_size`` checks what depends on the number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_rpp.config.critic import CriticConfig, check_critic
from megatron_rpp.config.data import DataConfig, TaskConfig
from megatron_rpp.config.learning import (
    AlgorithmConfig,
    EvaluationConfig,
    ReferenceConfig,
    RewardConfig,
    RolloutConfig,
)
from megatron_rpp.config.model import ModelConfig
from megatron_rpp.config.reward_model import RewardModelConfig
from megatron_rpp.config.training import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    SftConfig,
    TrainConfig,
)
from megatron_rpp.config.validation import (
    check_layout,
    check_offload,
    check_overlap,
    check_recompute,
    check_rollout,
)
from megatron_rpp.config.vllm import check_ahead, check_vllm
from megatron_rpp.lifecycle.config_error import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    seed: int = 1234
    """Seed of the initial weights, the order of the prompts and the sampling."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Architecture of the policy and of the reference."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How one model is split over ranks; data-parallel size = world size / (tensor x pipeline x
    context)."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts and tokenizer."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampling of the responses of one step."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Score of a response: the weighted sum of reward functions, then normalised, scaled and
    clipped."""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    """Advantages, KL terms and loss of REINFORCE++ (arXiv 2501.03262), PPO, GRPO and RLOO."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The critic of algorithm.name ppo: a second model of the policy's shape and layout, which gives
    a value for every token. With other algorithms, every setting stays at its default."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """The frozen model against which the KL terms are measured."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its learning-rate schedule; a step is one optimizer step."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training loop."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Accuracy on held-out prompts."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and exact resume."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Metrics."""
    sft: SftConfig = field(default_factory=SftConfig)
    """Supervised warm start (megatron_rpp.sft)."""
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    """Training of a reward model (megatron_rpp.reward_model)."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """The reasoning-gym task that prompts are generated from."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, got {self.seed}")
        check_layout(self.model, self.parallel)
        check_critic(self.critic, self.algorithm, steps=self.train.steps)
        check_offload(self)
        check_overlap(self)
        check_recompute(self)
        check_rollout(self)
        check_vllm(self)
        check_ahead(self)


def count_replicas(sizes: ParallelConfig, world_size: int) -> int:
    """The data-parallel size of ``world_size`` processes: world / (tensor x pipeline x context).

    Raises ConfigError if the processes do not make a whole number of replicas.
    """
    ranks = sizes.tensor * sizes.pipeline * sizes.context
    if world_size < 1 or world_size % ranks:
        context = f" x context {sizes.context}" if sizes.context > 1 else ""
        raise ConfigError(
            f"world size {world_size} is not divisible by tensor {sizes.tensor} x pipeline "
            f"{sizes.pipeline}{context} = {ranks}: start a multiple of {ranks} processes "
            "(torchrun --nproc-per-node) or change parallel.tensor/parallel.pipeline"
        )
    return world_size // ranks


def check_world_size(config: Config, world_size: int) -> int:
    """Does the same as ``count_replicas``, for a program that samples rollouts.

    Also raises ConfigError if the prompts of a step cannot be split evenly over the replicas.
    """
    replicas = count_replicas(config.parallel, world_size)
    if config.rollout.prompts_per_step % replicas:
        raise ConfigError(
            f"rollout.prompts_per_step {config.rollout.prompts_per_step} is not divisible by the "
            f"data-parallel size {replicas} (world size {world_size} / {world_size // replicas} "
            f"ranks per replica): make it a multiple of {replicas} or start another number of "
            "processes"
        )
    return replicas
