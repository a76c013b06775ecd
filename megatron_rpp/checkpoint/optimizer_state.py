"""The state of a model's optimizer in Megatron's format, and how it comes back from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_rpp.checkpoint.optimizer_shards import optimizer_shards
from megatron_rpp.checkpoint.weights import model_state, signs_of_life
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.model.trained_model import TrainedModel
from megatron_rpp.parallel import device as _device  # noqa: F401  (before megatron)

from megatron.core import dist_checkpointing
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

_SHARDING = "param_state_sharding_type"
"""Megatron's name for the format of a distributed optimizer; other optimizers have none."""


def allocate_moments(optimizer: MegatronOptimizer) -> None:
    """Allocates Adam's state, which Megatron reads before it loads or saves it.

    Torch's Adam and the fused ones allocate it in their first step; torch's counts steps in it.
    """
    for part in optimizer.chained_optimizers:
        hybrid = isinstance(part.optimizer, HybridDeviceOptimizer)
        for adam in part.optimizer.sub_optimizers if hybrid else [part.optimizer]:
            _allocate_moments_of(adam)
        if hybrid:
            part.optimizer._sync_sub_optimizers_state_to_hdo()


def _allocate_moments_of(adam: torch.optim.Optimizer) -> None:
    for group in adam.param_groups:
        for parameter in group["params"]:
            state = adam.state[parameter]
            if not state:
                if isinstance(adam, (torch.optim.Adam, torch.optim.AdamW)):
                    state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)


def optimizer_state(trained: TrainedModel, weights: dict, *, loading: bool = False) -> dict:
    """The sharded state of the optimizer.

    weights: the `model_state` of its model.
    """
    (part,) = trained.optimizer.chained_optimizers
    if not isinstance(part, DistributedOptimizer):
        return part.sharded_state_dict(weights, is_loading=loading)
    state = part.state_dict()
    for group in state["optimizer"]["param_groups"]:
        for name in [name for name, value in group.items() if isinstance(value, type)]:
            del group[name]  # classes of the hybrid optimizer: a checkpoint holds data only
    shards = optimizer_shards(part, weights)
    return state | {"param_state": shards, _SHARDING: "fully_reshardable"}


def check_optimizer(trained: TrainedModel, saved: dict, path: Path, *, section: str) -> None:
    """Raises ConfigError if the checkpoint at `path` is of another kind of optimizer.

    saved: what it holds of the optimizer besides tensors. section: the settings of the optimizer.
    """
    (part,) = trained.optimizer.chained_optimizers
    distributed = isinstance(part, DistributedOptimizer)
    if distributed != (_SHARDING in saved):
        raise ConfigError(
            f"checkpoint {path} was saved with {section}.distributed {not distributed}, this run "
            f"has {distributed}: set it to {not distributed}, or start from the weights alone, with "
            "init_path of the section model or critic"
        )


def load_optimizer(
    trained: TrainedModel, saved: dict, path: Path, *, name: str, prefix: str
) -> None:
    """Loads Adam's state at `path`. Each rank reads its own part of it. Collective.

    Args:
        saved: as in check_optimizer.
        name: of the optimizer in the checkpoint.
        prefix: of its model (model_state).
    """
    (part,) = trained.optimizer.chained_optimizers
    allocate_moments(trained.optimizer)
    weights = model_state(trained.model, prefix)
    if isinstance(part, DistributedOptimizer):
        # Settings first: the moments are written into the tensors that are left then.
        _load_settings(part, saved)
        shards = {name: {"param_state": optimizer_shards(part, weights)}}
        with signs_of_life():
            dist_checkpointing.load(shards, str(path))
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            part.optimizer._sync_hdo_state_to_sub_optimizers()
    else:
        content = {name: optimizer_state(trained, weights, loading=True)}
        with signs_of_life():
            loaded = dist_checkpointing.load(content, str(path))
        _load_settings(part, loaded[name])


def _load_settings(part: MegatronOptimizer, content: dict) -> None:
    """Loads `content` into the optimizer; its settings stay those of this run.

    Megatron gives all parameters one tensor to count torch's steps in, which would count every step
    many times, so each gets its own here.
    """
    progress = ("params", "step", "lr", "weight_decay")  # the last two follow from the schedule
    own = [
        {name: value for name, value in group.items() if name not in progress}
        for group in part.optimizer.param_groups
    ]
    # Megatron 0.19 identifies a group by its learning rates, which this run may have changed.
    for group in content.get("optimizer", content)["param_groups"]:
        group.update({name: own[0][name] for name in ("max_lr", "min_lr") if name in group})
    part.load_state_dict(content)
    for state in part.optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].clone()
    for group, mine in zip(part.optimizer.param_groups, own):
        group.update(mine)
