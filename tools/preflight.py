"""Checks a cluster before a run: versions, devices, layout, memory, disk, directories, network.

    bash launch/torchrun.sh ... train --dry-run --config FILE      (checks, then builds the models)
    torchrun --nproc-per-node N tools/preflight.py --config FILE [--section.key value ...]

Give it the options and settings of the run. It prints a table and a verdict. The exit code is 0, or
2 if a check failed (plain torchrun turns it into 1, launch/torchrun.sh does not). It also opens the
data of the run.
"""

from __future__ import annotations

from functools import partial

from megatron_rpp.lifecycle import entrypoint
from megatron_rpp.runtime import startup

if __name__ == "__main__":
    STARTUP = entrypoint.run(startup.for_training)  # --help and mistakes end here, before torch

from megatron_rpp.parallel import groups
from megatron_rpp.reporting.console import Console
from megatron_rpp.runtime import preflight


def main(start: startup.Startup) -> None:
    config = start.config
    groups.start(
        **config.parallel.sizes(), seed=config.seed, deterministic=config.train.deterministic
    )
    preflight.run(config, start.inputs.vocab_size, Console(groups.is_main()))
    groups.stop()


if __name__ == "__main__":
    entrypoint.run(partial(main, STARTUP))
