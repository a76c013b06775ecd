"""Every setting of a run: one frozen, keyword-only dataclass per section, checked on creation.

Every field has a docstring with its meaning and unit, which ``--help`` prints. A value out of range
raises a ConfigError that names ``section.field``, the value and the range. Nothing here opens a
file or needs a device, torch or Megatron.
"""

from megatron_rpp.config.critic import CriticConfig
from megatron_rpp.config.data import DataConfig, TaskConfig
from megatron_rpp.config.learning import (
    AlgorithmConfig,
    EvaluationConfig,
    ReferenceConfig,
    RewardConfig,
    RolloutConfig,
)
from megatron_rpp.config.model import ModelConfig, RopeScalingConfig
from megatron_rpp.config.reward_model import RewardModelConfig
from megatron_rpp.config.run import Config, check_world_size, count_replicas
from megatron_rpp.config.training import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    SftConfig,
    TrainConfig,
)
from megatron_rpp.config.vllm import VllmConfig

__all__ = [
    "AlgorithmConfig", "CheckpointConfig", "Config", "CriticConfig", "DataConfig",
    "EvaluationConfig", "LoggingConfig", "ModelConfig", "OptimizerConfig", "ParallelConfig",
    "ReferenceConfig", "RewardConfig", "RewardModelConfig", "RolloutConfig", "RopeScalingConfig",
    "SftConfig", "TaskConfig", "TrainConfig", "VllmConfig", "check_world_size", "count_replicas",
]  # fmt: skip
