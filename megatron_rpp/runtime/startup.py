"""What the programs read and check before they import torch, so that mistakes are answered at once.

A model in a Hugging Face directory or a checkpoint, and an export, need torch to be checked; they
come last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_rpp.config import Config, check_world_size, cli, count_replicas
from megatron_rpp.lifecycle.entrypoint import launched_world_size
from megatron_rpp.runtime.inputs import Inputs, check_writable, load_inputs, with_fitting_rows
from megatron_rpp.runtime.rated_inputs import load_rated_inputs

if TYPE_CHECKING:
    from megatron_rpp.hf.source import Source


@dataclass(frozen=True)
class Startup:
    """What a program starts from."""

    config: Config
    inputs: Inputs
    dry_run: bool
    """Build everything and run no step."""


def for_training(argv: list[str] | None = None) -> Startup:
    """The settings and inputs of train.py. Raises ConfigError for a mistake of the user's.

    argv: the command line; None = that of this process.
    """
    config, dry_run = cli.parse(argv, program="train")
    check_world_size(config, launched_world_size())
    check_writable("checkpoint.dir", config.checkpoint.dir)
    check_writable("logging.dir", config.logging.dir)
    inputs = load_inputs(config)
    source = _check_models(config, config.checkpoint.dir)
    if config.critic.init_path or config.critic.hf_path:
        from megatron_rpp.runtime.initial_weights import check_critic  # loads torch

        check_critic(config, inputs.vocab_size)
    return Startup(config, replace(inputs, source=source), dry_run)


def for_sft(argv: list[str] | None = None) -> Startup:
    """The settings and inputs of sft.py. Raises ConfigError for a mistake of the user's.

    argv: the command line; None = that of this process.
    """
    config, dry_run = cli.parse(argv, program="sft")
    count_replicas(config.parallel, launched_world_size())
    check_writable("sft.dir", config.sft.dir)
    inputs = with_fitting_rows(config, load_inputs(config, train_is_scored=False))
    source = _check_models(config, config.sft.dir)
    return Startup(config, replace(inputs, source=source), dry_run)


def for_reward_model(argv: list[str] | None = None) -> Startup:
    """The settings and inputs of reward_model.py. Raises ConfigError for a mistake of the user's.

    argv: the command line; None = that of this process.
    """
    config, dry_run = cli.parse(argv, program="reward_model")
    count_replicas(config.parallel, launched_world_size())
    check_writable("reward_model.dir", config.reward_model.dir)
    inputs = load_rated_inputs(config)
    source = _check_models(config, config.reward_model.dir, scalar=True)
    return Startup(config, replace(inputs, source=source), dry_run)


def _check_models(config: Config, checkpoints: str, *, scalar: bool = False) -> Source | None:
    """Raises ConfigError if the initial weights cannot be read or the export cannot be written.

    Returns what was found in model.hf_path, if it is given.

    scalar: the model is a reward model.
    """
    model, source = config.model, None
    if model.hf_path or model.init_path or config.checkpoint.load:
        from megatron_rpp.runtime.initial_weights import check_initial_weights  # loads torch

        source = check_initial_weights(config, scalar=scalar)
    if config.checkpoint.export_hf is not None:
        from megatron_rpp.runtime.export import check_export  # loads torch

        check_export(config, checkpoints)
    return source
