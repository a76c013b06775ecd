"""Checks, before models are built, that an outside rollout engine can be used."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from megatron_rpp.config import Config
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron_rpp.parallel.ranks import raise_on_all_ranks
from megatron_rpp.rollout.vllm import environment
from megatron_rpp.rollout.vllm.fleet import check_placement
from megatron_rpp.runtime.shared_directory import blind_hosts


def check_engine(config: Config, vocab_size: int, *, thorough: bool = False) -> str | None:
    """Raises ConfigError, on every rank, if the servers of rollout.engine vllm could not start or have
    another model. Collective.

    thorough: also ask vLLM for the families that it knows, which takes seconds.

    Returns a sentence about what was found; None with rollout.engine megatron.
    """
    if config.rollout.engine != "vllm":
        return None
    found = raise_on_all_ranks(lambda: _check(config, vocab_size, thorough=thorough))
    if config.rollout.vllm.python is not None:
        check_placement(config)
    if config.rollout.vllm.transport == "shared":
        _check_directory(config)
    return found


def _check_directory(config: Config) -> None:
    """Raises ConfigError, on every rank, if ranks and servers do not see one rollout.vllm.dir.

    Servers of the run are on the hosts of ranks; those of rollout.vllm.urls are asked.
    """
    directory = config.rollout.vllm.dir
    blind = blind_hosts(
        Path(directory).absolute(),
        while_there=partial(environment.check_sees, config),
    )
    if blind:
        raise ConfigError(
            f"rollout.vllm.dir {directory} is not one directory on all nodes: {', '.join(blind)}; "
            "choose one that all of them see"
        )


def _check(config: Config, vocab_size: int, *, thorough: bool) -> str:
    vllm = config.rollout.vllm
    environment.check_transport(vllm.transport, devices.ON_CPU)
    if vllm.python is None:
        if groups.is_main():
            environment.check_urls(config, vocab_size)
        return f"{len(vllm.urls)} server(s) with this model"
    family = environment.architecture(config, vocab_size)
    if os.environ.get("LOCAL_RANK", "0") != "0":  # one rank of each node asks
        return ""
    version = environment.check_installed(vllm.python)
    if thorough:
        environment.check_family(vllm.python, family)
    return f"vLLM {version} in {vllm.python}, {family}"
