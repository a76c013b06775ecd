"""Builds the models of a run and loads their weights: the policy, the reference and the critic."""

from __future__ import annotations

import torch

from megatron_rpp.checkpoint import state as checkpoint
from megatron_rpp.config import Config, OptimizerConfig
from megatron_rpp.hf.source import Source
from megatron_rpp.model import build, initialization
from megatron_rpp.model.frozen_model import FrozenModel
from megatron_rpp.model.hf_weights import load_hf
from megatron_rpp.model.language_model import LanguageModel, chunks
from megatron_rpp.model.optimizer import build_optimizer
from megatron_rpp.model.reference import OffloadedReference, Reference
from megatron_rpp.model.scalar_model import ScalarModel
from megatron_rpp.model.trained_model import TrainedModel
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel.ranks import raise_on_all_ranks
from megatron_rpp.runtime.preflight import check_host_memory


def build_start(
    config: Config,
    vocab_size: int,
    source: Source | None = None,
    *,
    kind: type[LanguageModel] = LanguageModel,
) -> torch.nn.ModuleList:
    """The model with the weights of model.init_path or model.hf_path, else random ones. Collective.

    Args:
        source: what the check of model.hf_path found, if it was checked before.
        kind: LanguageModel, or ScalarModel: its head is random if the weights are a language model's.

    Raises ConfigError, on every rank, if the device of any rank cannot run the model.
    """
    model = config.model
    deterministic = config.train.deterministic
    raise_on_all_ranks(
        lambda: devices.check_model(model.dtype, model.transformer_impl, deterministic)
    )
    random = model.init_path is None and model.hf_path is None
    stage = _built(config, vocab_size, random=random, kind=kind)
    if model.init_path is not None:
        checkpoint.load_weights(stage, model.init_path)
    if model.hf_path is not None:
        load_hf(stage, source or model.hf_path)
    return stage


def _built(
    config: Config, vocab_size: int, *, random: bool, kind: type[LanguageModel]
) -> torch.nn.ModuleList:
    """The model with random weights; or, if its weights are loaded next, with a random head, because
    they may have none."""
    stage = build.build_model(
        config.model, config.parallel, vocab_size=vocab_size, seed=config.seed if random else None,
        train=config.train, kind=kind,
    )  # fmt: skip
    for chunk in chunks(stage):
        initialization.fill_score(chunk, config.seed)
    return stage


def build_policy(
    config: Config,
    optimizer: OptimizerConfig,
    vocab_size: int,
    *,
    source: Source | None = None,
    kind: type[LanguageModel] = LanguageModel,
) -> TrainedModel:
    """The policy before its first update; for `source` and `kind` see build_start.

    Raises ConfigError, on every rank, if a host lacks the memory for what is offloaded.
    """
    check_host_memory(config, vocab_size)
    return _in_training(build_start(config, vocab_size, source, kind=kind), optimizer, config)


def _in_training(
    stage: torch.nn.ModuleList, optimizer: OptimizerConfig, config: Config
) -> TrainedModel:
    model = build.wrap_for_training(stage, optimizer.distributed, config.parallel)
    return TrainedModel(model, *build_optimizer(model, optimizer, config.model.dtype == "bf16"))


def build_critic(config: Config, policy: TrainedModel, vocab_size: int) -> TrainedModel | None:
    """The critic before its first update; None if the algorithm has none. Collective.

    Call it before the policy resumes from a checkpoint: unless the critic section names other
    weights, it starts from the weights that the policy has now.
    """
    if not config.algorithm.has_critic:
        return None
    settings = config.critic
    stage = _built(config, vocab_size, random=False, kind=ScalarModel)
    if settings.init_path is not None:
        checkpoint.load_weights(stage, settings.init_path, prefer_critic=True)
    elif settings.hf_path is not None:
        load_hf(stage, settings.hf_path)
    else:
        _copy_layers(policy.model, stage)
    return _in_training(stage, settings.optimizer, config)


def _copy_layers(policy: torch.nn.ModuleList, critic: torch.nn.ModuleList) -> None:
    """Copies all weights but those of the head."""
    for target, source in zip(chunks(critic), chunks(policy), strict=True):
        weights = source.state_dict()
        own = {name: weights.get(name, value) for name, value in target.state_dict().items()}
        target.load_state_dict(own)


def build_reference(config: Config, policy: TrainedModel, vocab_size: int) -> Reference | None:
    """A frozen copy of the policy's initial weights; None if no KL coefficient needs it.

    Call it before the policy resumes from a checkpoint, while it still holds those weights.
    """
    if not config.algorithm.kl_in_reward and config.algorithm.kl_loss_coef == 0:
        return None
    if config.reference.placement == "offload":
        return OffloadedReference(policy.model)
    stage = build.build_model(config.model, config.parallel, vocab_size=vocab_size, seed=None)
    for chunk, trained in zip(chunks(stage), chunks(policy.model), strict=True):
        chunk.load_state_dict(trained.state_dict())
    return FrozenModel(stage, offload=False)
