"""What every training program does around its steps: locks, signals, a watchdog, the dry run, the
export at the end."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch.distributed as dist

from megatron_rpp.checkpoint.directory_lock import one_writer
from megatron_rpp.config import Config
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.lifecycle.exit_codes import RunFailure
from megatron_rpp.lifecycle.watchdog import Watchdog
from megatron_rpp.reporting.console import Console
from megatron_rpp.runtime import checkpointing, export
from megatron_rpp.runtime.run import Run
from megatron_rpp.runtime.stop_request import Stop


@contextmanager
def session(config: Config, console: Console) -> Iterator[Stop]:
    """The run's directories are its own, and it can be told to stop. Collective."""
    stop = Stop(config.train.exit_duration_minutes)
    with (
        one_writer([config.checkpoint.dir, config.logging.dir], console.say),
        stop.listening(),
        _watching(config),
        frozen_heap(),
    ):
        yield stop


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Garbage collections leave out what is alive now, mostly imported modules: Megatron runs a
    full one in every save, and the run stands still for it (tools/benchmark.py checkpoint)."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _watching(config: Config) -> AbstractContextManager[None]:
    """The watchdog of this rank, if there is to be one."""
    minutes = config.train.hang_timeout_minutes
    if minutes is None:
        return nullcontext()
    world = dist.get_world_size()
    return Watchdog(config.logging.dir, dist.get_rank(), world, minutes).watching()


def run_to_completion(run: Run, steps: Callable[[Run], None], setting: str, dry_run: bool) -> None:
    """The steps that are left of a run, if any, then its export. Collective.

    setting: that says how many steps there are.
    """
    config, say = run.config, run.console.say
    if dry_run:
        say("dry run: everything is built and nothing was trained")
        return
    export.keep_side_files(config, config.checkpoint.dir)
    if run.finished:
        say(f"finished before, at step {run.state.step}: raise {setting} to go on")
    else:
        try:
            steps(run)
        except ConfigError as error:  # found after work was done, such as a row changed on the disk
            raise RunFailure(str(error)) from error
    if config.checkpoint.export_hf is not None:
        checkpointing.ensure(run)
        export.export_policy(config, config.checkpoint.dir)
