"""What every training program does around its steps: locks, signals, a watchdog, the export."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch.distributed as dist

from megatron_rpp.checkpoint.directory_lock import one_writer
from megatron_rpp.config import Config
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.lifecycle.exit_codes import RunFailure
from megatron_rpp.lifecycle.watchdog import Watchdog
from megatron_rpp.reporting.console import Console
from megatron_rpp.rollout.engine import Abandoned
from megatron_rpp.runtime import checkpointing, export, rollouts
from megatron_rpp.runtime.run import Run
from megatron_rpp.runtime.stop_request import Stop


@contextmanager
def session(config: Config, console: Console) -> Iterator[Stop]:
    """Locks the directories of the run and listens for requests to stop. Collective."""
    stop = Stop(config.train.exit_duration_minutes)
    with (
        one_writer([config.checkpoint.dir, config.logging.dir], console.log),
        stop.listening(),
        _watching(config),
    ):
        yield stop


def freeze_heap() -> None:
    """Excludes the objects that exist now, mostly imported modules, from garbage collection, until the
    process ends.

    The programs do so before they build anything: Megatron runs a full collection in every save, which
    stalls the run (tools/benchmark.py checkpoint).
    """
    gc.freeze()


def _watching(config: Config) -> AbstractContextManager[None]:
    """The watchdog of this rank, if train.hang_timeout_minutes is set."""
    minutes = config.train.hang_timeout_minutes
    if minutes is None:
        return nullcontext()
    world = dist.get_world_size()
    return Watchdog(
        config.logging.dir, rank=dist.get_rank(), world=world, minutes=minutes
    ).watching()


@contextmanager
def training(run: Run, setting: str) -> Iterator[None]:
    """Surrounds the steps of a run: opens its metrics before them, exports the policy after them.

    If a rollout or an evaluation inside is abandoned, the run saves and stops. It is then at the last
    safe point, because neither changes it before it is finished.

    A mistake of the user's that is found inside ends the run as a failure (exit code 1): work was
    done before. Collective.

    Args:
        setting: the setting that says how many steps there are.
    """
    config, state = run.config, run.state
    export.copy_side_files(config, config.checkpoint.dir)
    try:
        if run.finished:
            run.console.log(f"finished before, at step {state.step}: raise {setting} to go on")
        else:
            run.metrics.open(state.step, resumed=run.started)
        yield
    except Abandoned:
        checkpointing.stop_if_requested(run)
        raise  # nobody asked to stop
    except ConfigError as error:  # for example, a row has changed on the disk
        raise RunFailure(str(error)) from error
    finally:
        rollouts.end(run)
    run.metrics.close()
    if config.checkpoint.export_hf is not None:
        checkpointing.ensure_saved(run)
        export.export_policy(config, config.checkpoint.dir)
