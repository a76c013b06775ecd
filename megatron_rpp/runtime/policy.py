"""The models of a run, built and filled: policy, optimizer, schedule, and the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rpp.checkpoint import state as checkpoint
from megatron_rpp.config import Config, OptimizerConfig
from megatron_rpp.model import build
from megatron_rpp.model.hf_weights import load_hf
from megatron_rpp.model.optimizer import build_optimizer
from megatron_rpp.model.reference import OffloadedReference, Reference, ResidentReference


@dataclass
class Policy:
    """The model that is trained (its chunks, DDP-wrapped), with its optimizer and schedule."""

    model: torch.nn.ModuleList
    optimizer: object
    scheduler: object


def build_start(config: Config, vocab_size: int) -> torch.nn.ModuleList:
    """The model with the weights of model.init_path or model.hf_path, else random ones."""
    stage = build.build_model(config.model, config.parallel, vocab_size, config.seed)
    if config.model.init_path is not None:
        checkpoint.load_weights(stage, config.model.init_path)
    if config.model.hf_path is not None:
        load_hf(stage, config.model.hf_path)
    return stage


def build_policy(config: Config, optimizer: OptimizerConfig, vocab_size: int) -> Policy:
    """The policy of step 0, with an optimizer that has done nothing."""
    stage = build_start(config, vocab_size)
    model = build.wrap_for_training(stage, optimizer.distributed)
    return Policy(model, *build_optimizer(model, optimizer, config.model.dtype == "bf16"))


def build_reference(config: Config, policy: Policy, vocab_size: int) -> Reference | None:
    """The policy's initial weights, frozen; None where no KL coefficient needs them.

    Called before the policy resumes from a checkpoint, while it still holds those weights.
    """
    if not config.algorithm.kl_in_reward and config.algorithm.kl_loss_coef == 0:
        return None
    if config.reference.placement == "offload":
        return OffloadedReference(policy.model)
    stage = build.build_model(config.model, config.parallel, vocab_size, config.seed)
    for chunk, own in zip(stage, policy.model, strict=True):
        chunk.load_state_dict(own.module.state_dict())
    return ResidentReference(stage)
