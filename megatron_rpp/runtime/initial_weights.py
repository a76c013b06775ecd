"""Checks the weights that a run starts from, before any model is built."""

from __future__ import annotations

from pathlib import Path

from megatron_rpp.checkpoint import store
from megatron_rpp.config import Config
from megatron_rpp.conversion.dist_checkpoint import Checkpoint
from megatron_rpp.conversion.settings import model_settings
from megatron_rpp.hf.families import SCORE, refuse_scalar
from megatron_rpp.hf.source import Source, check_source
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.runtime.inputs import once_a_node


def check_initial_weights(config: Config, *, scalar: bool = False) -> Source | None:
    """Returns what was found in model.hf_path, if it is given.

    Args:
        scalar: they are for a reward model, which may start from another one.
    Raises:
        ConfigError: the initial weights cannot be read, or a policy would start from a reward
            model.
    """
    model, saved, source = config.model, config.checkpoint, None
    if model.hf_path is not None:
        source, log = check_source(model.hf_path), once_a_node()
        for note in source.notes:
            log(note)
    started = (Path(saved.dir) / store.POINTER).exists()
    for path in (model.init_path, None if started else saved.load):
        if path is not None:
            checkpoint = Checkpoint(store.current(path))
            checkpoint.common()
            if SCORE in checkpoint.tensors and not scalar:
                refuse_scalar(checkpoint.directory)
    return source


def check_critic(config: Config, vocab_size: int) -> None:
    """Raises ConfigError unless the weights that the critic starts from have the policy's shape.

    vocab_size: that of the policy.
    """
    critic = config.critic
    setting, path = (
        ("hf_path", critic.hf_path) if critic.hf_path else ("init_path", critic.init_path)
    )
    if path is None:
        return
    try:
        theirs = model_settings(path).settings
    except ConfigError as error:
        raise ConfigError(f"critic.{setting}: {error}") from error
    if critic.hf_path is not None:
        check_source(critic.hf_path)
    # A critic has no output projection that could be tied. A longer context changes no weight.
    longest, own = theirs["max_length"], config.model.max_length
    differences = [f"its context is {longest} tokens, {own} here"] if longest < own else []
    differences += [
        f"{name} is {theirs[name]} there, {value} here"
        for name, value in config.model.architecture(vocab_size).items()
        if name not in ("max_length", "tied_embeddings") and theirs[name] != value
    ]
    if differences:
        raise ConfigError(
            f"critic.{setting} {Path(path).absolute()} does not fit the policy: "
            f"{'; '.join(differences)}. The critic has the policy's shape: choose other weights, or "
            "leave the setting out to start from the policy's"
        )
