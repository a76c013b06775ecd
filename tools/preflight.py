"""Checks a cluster before a run: versions, devices, layout, memory, disk, directories, network.

    bash launch/torchrun.sh ... train --dry-run --config FILE      (checks, then builds the models)
    torchrun --nproc-per-node N tools/preflight.py --config FILE [--section.key value ...]

with the options and settings of the run. A table and a verdict; exit code 0, or 2 where a check
failed (which torchrun itself turns into 1, launch/torchrun.sh does not). It opens the data of the
run too.
"""

from __future__ import annotations

from megatron_rpp.config import check_world_size, cli

if __name__ == "__main__":
    cli.parse()  # answers --help and mistakes before torch is imported

from megatron_rpp.lifecycle import entrypoint
from megatron_rpp.parallel import groups
from megatron_rpp.reporting.console import Console
from megatron_rpp.runtime import preflight
from megatron_rpp.runtime.inputs import check_writable, load_inputs


def main() -> None:
    config = cli.parse().config
    check_world_size(config, groups.launched_world_size())
    check_writable("checkpoint.dir", config.checkpoint.dir)
    check_writable("logging.dir", config.logging.dir)
    vocab_size = load_inputs(config).vocab_size
    groups.start(**config.parallel.sizes(), seed=config.seed)
    preflight.run(config, vocab_size, Console(groups.is_main()))
    groups.stop()


if __name__ == "__main__":
    entrypoint.run(main)
