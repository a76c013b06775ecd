"""The settings of a program that has a section of its own: sft.py, reward_model.py."""

from __future__ import annotations

from dataclasses import replace

from megatron_rpp.config import Config, LoggingConfig, RewardModelConfig, SftConfig


def with_section(config: Config, section: SftConfig | RewardModelConfig) -> Config:
    """The settings with those of the section in the places where a run of train.py has its own."""
    return replace(
        config,
        optimizer=section.optimizer,
        train=replace(config.train, steps=section.steps, stop_accuracy=section.stop_accuracy),
        evaluation=replace(config.evaluation, interval=section.eval_interval),
        checkpoint=replace(
            config.checkpoint,
            dir=section.dir,
            load=None,
            interval=section.checkpoint_interval,
            keep_best=False,
            save_rollouts=False,
        ),  # fmt: skip
        logging=LoggingConfig(dir=section.dir),
    )
