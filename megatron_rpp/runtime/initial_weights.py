"""Checks the weights that a run starts from, before any model is built."""

from __future__ import annotations

from pathlib import Path

from megatron_rpp.checkpoint import store
from megatron_rpp.config import Config
from megatron_rpp.conversion.dist_checkpoint import Checkpoint
from megatron_rpp.hf.families import SCORE, refuse_scalar
from megatron_rpp.hf.source import Source, check_source
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
