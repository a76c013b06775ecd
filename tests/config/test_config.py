"""The sections of the configuration: ranges, checks across sections, and error messages."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, is_dataclass
from typing import get_type_hints

import docstring_parser
import pytest

from megatron_rpp.config import (
    AlgorithmConfig,
    CheckpointConfig,
    Config,
    CriticConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ReferenceConfig,
    RewardConfig,
    RewardModelConfig,
    RolloutConfig,
    SftConfig,
    TaskConfig,
    TrainConfig,
    check_world_size,
    count_replicas,
)
from megatron_rpp.lifecycle.config_error import ConfigError


def _sections(section=Config):
    yield section
    for hint in get_type_hints(section).values():
        if is_dataclass(hint):
            yield from _sections(hint)


def test_config_is_frozen_and_keyword_only():
    with pytest.raises(FrozenInstanceError):
        Config().seed = 2
    with pytest.raises(TypeError):
        ModelConfig(4)


def test_every_field_has_a_docstring():
    for section in _sections():
        texts = docstring_parser.parse_from_object(section).params
        assert {text.arg_name for text in texts if text.description} == set(get_type_hints(section))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            OptimizerConfig,
            {"offload": True, "distributed": False},
            "optimizer.offload needs optimizer.distributed, got false",
        ),
        (ParallelConfig, {"tensor": 0}, "parallel.tensor must be at least 1, got 0"),
        (ParallelConfig, {"pipeline": -1}, "parallel.pipeline must be at least 1, got -1"),
        (ParallelConfig, {"sequence_parallel": True}, "needs parallel.tensor of at least 2, got 1"),
        (ModelConfig, {"layers": 0}, "model.layers must be at least 1, got 0"),
        (ModelConfig, {"vocab_size": 0}, "model.vocab_size must be at least 1, got 0"),
        (ModelConfig, {"rope_theta": 0.0}, "model.rope_theta must be above 0, got 0.0"),
        (ModelConfig, {"dtype": "fp16"}, "model.dtype must be one of fp32, bf16, got 'fp16'"),
        (ModelConfig, {"heads": 3}, "model.hidden must be divisible by model.heads = 3, got 128"),
        (ModelConfig, {"kv_heads": 3}, "model.heads must be divisible by model.kv_heads = 3"),
        (ModelConfig, {"kv_heads": 8}, "model.heads must be divisible by model.kv_heads = 8"),
        (ModelConfig, {"head_dim": 33}, "must be even, got 33"),
        (ModelConfig, {"hidden": 12}, "must be even, got 3"),
        (DataConfig, {"prompt_key": ""}, "data.prompt_key must not be empty, got ''"),
        (RolloutConfig, {"temperature": 0.0}, "rollout.temperature must be above 0, got 0.0"),
        (RolloutConfig, {"top_p": 1.5}, "rollout.top_p must be above 0 and at most 1, got 1.5"),
        (RolloutConfig, {"top_k": -1}, "rollout.top_k must be at least 0, got -1"),
        (RolloutConfig, {"max_new_tokens": 4, "min_new_tokens": 5}, "max_new_tokens = 4, got 5"),
        (RolloutConfig, {"stop": ["x", ""]}, "rollout.stop must hold no empty text"),
        (RewardConfig, {"functions": []}, "reward.functions must name at least one"),
        (RewardConfig, {"weights": [1.0, 2.0]}, "as long as reward.functions (1), got [1.0, 2.0]"),
        (RewardConfig, {"clip": 0.0}, "reward.clip must be above 0, got 0.0"),
        (AlgorithmConfig, {"name": "sac"}, "algorithm.name must be one of reinforce++, ppo,"),
        (
            AlgorithmConfig,
            {"gae_lambda": 1.1},
            "algorithm.gae_lambda must be at least 0 and at most 1",
        ),
        (CriticConfig, {"value_clip": 0.0}, "critic.value_clip must be above 0, got 0.0"),
        (CriticConfig, {"warmup_steps": -1}, "critic.warmup_steps must be at least 0, got -1"),
        (
            CriticConfig,
            {"init_path": "a", "hf_path": "b"},
            "both set: the weights come from only one",
        ),
        (AlgorithmConfig, {"kl_coef": -0.1}, "algorithm.kl_coef must be at least 0, got -0.1"),
        (AlgorithmConfig, {"gamma": 1.1}, "algorithm.gamma must be at least 0 and at most 1"),
        (AlgorithmConfig, {"dual_clip": 1.0}, "algorithm.dual_clip must be above 1, got 1.0"),
        (ReferenceConfig, {"placement": "disk"}, "must be one of resident, offload, got 'disk'"),
        (OptimizerConfig, {"lr": float("nan")}, "optimizer.lr must be finite and above 0, got nan"),
        (OptimizerConfig, {"lr": float("inf")}, "optimizer.lr must be finite and above 0, got inf"),
        (OptimizerConfig, {"beta2": 1.0}, "optimizer.beta2 must be at least 0 and below 1, got"),
        (OptimizerConfig, {"min_lr": 1.0}, "must be at most optimizer.lr = 0.0001, got 1.0"),
        (OptimizerConfig, {"warmup_steps": 9, "decay_steps": 9}, "optimizer.warmup_steps = 9"),
        (TrainConfig, {"steps": 0}, "train.steps must be at least 1, got 0"),
        (TrainConfig, {"stop_accuracy": 90.0}, "train.stop_accuracy must be above 0 and at most 1"),
        (EvaluationConfig, {"interval": -1}, "evaluation.interval must be at least 0, got -1"),
        (CheckpointConfig, {"keep": 0}, "checkpoint.keep must be at least 1, got 0"),
        (AlgorithmConfig, {"kl_target": 0.0}, "algorithm.kl_target must be above 0, got 0.0"),
        (AlgorithmConfig, {"rollout_correction_max": 0.5}, "rollout_correction_max must be at"),
        (
            AlgorithmConfig,
            {"rollout_correction": "cap", "old_logprobs": "rollout"},
            "set algorithm.old_logprobs to recompute",
        ),
        (LoggingConfig, {"dir": ""}, "logging.dir must not be empty, got ''"),
        (SftConfig, {"batch_size": 0}, "sft.batch_size must be at least 1, got 0"),
        (RewardModelConfig, {"steps": 0}, "reward_model.steps must be at least 1, got 0"),
        (RewardModelConfig, {"score_key": ""}, "reward_model.score_key must not be empty, got ''"),
        (TaskConfig, {"train_seed": 2}, "task.eval_seed must differ from task.train_seed, got 2"),
        (Config, {"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_value_out_of_range_is_an_error(section, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        section(**values)


def test_values_on_the_edge_are_accepted():
    ModelConfig(heads=3, hidden=128, head_dim=2, kv_heads=1)
    RolloutConfig(top_p=1.0, max_new_tokens=4, min_new_tokens=4)
    RewardConfig(functions=["exact_match", "a.b:f"], weights=[0.5, -0.5])
    OptimizerConfig(lr=1e-4, min_lr=1e-4, beta1=0.0, warmup_steps=9, decay_steps=10)
    Config(rollout=RolloutConfig(max_new_tokens=255), model=ModelConfig(max_length=256))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"parallel": ParallelConfig(tensor=3)},
            "model.heads must be divisible by parallel.tensor = 3, got 4",
        ),
        (
            {"optimizer": OptimizerConfig(offload=True)},
            "optimizer.offload needs model.dtype bf16, got fp32: with fp32 the weights themselves",
        ),
        (
            {"train": TrainConfig(recompute="full", recompute_layers=3)},
            "the layers of a model chunk (4 / 1) must be divisible by train.recompute_layers = 3, "
            "got 4: change train.recompute_layers or the layout",
        ),
        (
            {
                "train": TrainConfig(
                    recompute="full", recompute_method="block", recompute_layers=3
                ),
                "parallel": ParallelConfig(pipeline=2),
            },
            "train.recompute_layers must be at most 2, got 3",
        ),
        (
            {"model": ModelConfig(kv_heads=1), "parallel": ParallelConfig(tensor=2)},
            "model.kv_heads must be divisible by parallel.tensor = 2, got 1",
        ),
        (
            {"model": ModelConfig(ffn_hidden=345), "parallel": ParallelConfig(tensor=2)},
            "model.ffn_hidden must be divisible by parallel.tensor = 2, got 345",
        ),
        (
            {"parallel": ParallelConfig(pipeline=3)},
            "model.layers must be divisible by parallel.pipeline = 3, got 4",
        ),
        (
            {"rollout": RolloutConfig(max_cache_tokens=255)},
            "rollout.max_cache_tokens must hold one sequence of model.max_length = 256 tokens, got 255",
        ),
        (
            {"rollout": RolloutConfig(max_new_tokens=256)},
            "rollout.max_new_tokens must be below model.max_length = 256, which holds the prompt",
        ),
        (
            {"train": TrainConfig(minibatches=7)},
            "rollout.prompts_per_step x rollout.samples_per_prompt must be divisible by "
            "train.minibatches = 7, got 256",
        ),
        (
            {
                "algorithm": AlgorithmConfig(kl_controller="adaptive", kl_horizon=255),
            },
            "algorithm.kl_horizon must be at least the 256 responses of a step, got 255",
        ),
    ],
)
def test_sections_that_disagree_are_errors(sections, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(**sections)


@pytest.mark.parametrize("name", ["reinforce++_baseline", "grpo", "rloo"])
def test_comparing_one_sample_with_itself_is_an_error(name):
    message = f"samples_per_prompt must be at least 2 for algorithm.name = {name}, got 1"
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(algorithm=AlgorithmConfig(name=name), rollout=RolloutConfig(samples_per_prompt=1))
    Config(rollout=RolloutConfig(samples_per_prompt=1))  # reinforce++ compares all responses


@pytest.mark.parametrize(
    "without",
    [{"kl_coef": 0}, {"name": "grpo"}, {"name": "reinforce++_baseline", "kl_coef": 1.0}],
)
def test_control_of_no_kl_is_an_error(without):
    with pytest.raises(ValueError, match="adaptive needs a KL to control, got none: set"):
        AlgorithmConfig(kl_controller="adaptive", **without)
    AlgorithmConfig(kl_controller="adaptive", **(without | {"kl_loss_coef": 0.1}))


def test_the_start_up_log_describes_the_use_of_the_kl():
    said = [
        AlgorithmConfig(kl_coef=0.05, kl_loss_coef=0.1, kl_controller="adaptive").kl_summary,
        AlgorithmConfig(name="rloo", kl_coef=0.05, kl_loss_coef=0.1).kl_summary,
        AlgorithmConfig(name="rloo", kl_coef=0.05).kl_summary,
    ]
    assert said == [
        "KL: 0.05 × k1 in the reward and 0.1 × k2 in the loss, adaptive, towards 0.1 nats per token",
        "KL: 0.1 × k2 in the loss, fixed",
        "no KL",
    ]


def test_world_size_gives_the_data_parallel_size():
    layout = Config(parallel=ParallelConfig(tensor=2, pipeline=2))
    assert [check_world_size(layout, world) for world in (4, 8, 16)] == [1, 2, 4]


@pytest.mark.parametrize("world_size", [0, 1, 3])
def test_world_size_that_does_not_hold_whole_models_is_an_error(world_size):
    with pytest.raises(ValueError) as error:
        check_world_size(Config(parallel=ParallelConfig(tensor=2)), world_size)
    assert str(error.value) == (
        f"world size {world_size} is not divisible by tensor 2 x pipeline 1 = 2: start a multiple "
        "of 2 processes (torchrun --nproc-per-node) or change parallel.tensor/parallel.pipeline"
    )


def test_prompts_that_do_not_divide_over_the_replicas_are_errors():
    with pytest.raises(ValueError, match=r"prompts_per_step 32 .* data-parallel size 3 .*multiple"):
        check_world_size(Config(), 3)
    # A program that samples no rollouts does not need this.
    assert count_replicas(ParallelConfig(), 3) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"critic": CriticConfig(warmup_steps=3)}, "critic.warmup_steps is 3, but algorithm.name"),
        ({"critic": CriticConfig(optimizer=OptimizerConfig(lr=1e-6))}, "critic.optimizer is"),
        ({"algorithm": AlgorithmConfig(gae_lambda=0.5)}, "algorithm.gae_lambda is 0.5, but"),
        ({"algorithm": AlgorithmConfig(name="grpo", gae_lambda=0.5)}, "name grpo has no critic"),
    ],
)
def test_settings_of_a_critic_that_nothing_reads_are_refused(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config(**settings)


def test_settings_of_a_critic_are_for_ppo():
    ppo = AlgorithmConfig(name="ppo", gae_lambda=0.5)
    assert Config(algorithm=ppo, critic=CriticConfig(warmup_steps=3)).algorithm.has_critic
    with pytest.raises(ConfigError, match="critic.warmup_steps must be below train.steps = 100"):
        Config(algorithm=ppo, critic=CriticConfig(warmup_steps=100))
    with pytest.raises(ConfigError, match="critic.optimizer.offload needs model.dtype bf16"):
        Config(algorithm=ppo, critic=CriticConfig(optimizer=OptimizerConfig(offload=True)))
