"""The first ten minutes on a GPU: does everything that only a GPU can show work there, and how fast?

    python tools/gpu_acceptance.py --output FILE [--small] [--only CHECK ...]
    torchrun --nproc-per-node 1 tools/gpu_acceptance.py --output FILE

For one H100 or H200 (80 GB). Each check prints its figures, each with the threshold that it is held
to: passed, failed, measured (held to nothing), or skipped with the reason. FILE gets all of them as
JSON, with the versions and the device. A check that fails or raises does not stop the others. The exit code is 0 if all that ran
passed, otherwise 1.

On a CPU the checks run in reduced form, as with --small, and skip what needs CUDA.

Left out: more than one GPU, convergence, the health of the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from acceptance.catalog import CHECKS, NAMES
from acceptance.figures import FAILED, PASSED, SKIPPED
from acceptance.supervisor import Supervisor

from megatron_rpp.lifecycle import entrypoint
from megatron_rpp.lifecycle.config_error import ConfigError


def options(argv: list[str]) -> argparse.Namespace:
    listed = "\n".join(f"  {entry.name:16}{entry.title}" for entry in CHECKS)
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"checks:\n{listed}\n\nexit code: 0 if all that ran passed, otherwise 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", metavar="FILE", help="JSON file for the results")
    parser.add_argument("--small", action="store_true", help="reduced sizes; a CPU always has them")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="CHECK")
    parser.add_argument(
        "--minutes", type=float, default=10, help="for all checks; those after that are skipped"
    )
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    found = parser.parse_args(argv)
    if found.output is None and found.worker is None:
        parser.error("the following arguments are required: --output")
    return found


def main() -> int:
    chosen = options(sys.argv[1:])
    if chosen.worker is not None:
        from acceptance import worker  # only now: --help needs no torch

        with os.fdopen(chosen.worker, "w") as channel:
            worker.work(chosen.only, chosen.small, channel)
        return 0
    if entrypoint.launched_world_size() != 1:
        raise ConfigError(
            f"{entrypoint.launched_world_size()} processes were started, but the checks are for "
            f"one GPU: --nproc-per-node 1"
        )
    return supervise(chosen)


def supervise(chosen: argparse.Namespace) -> int:
    """Runs the checks and writes the file anew after each of them."""
    output, start = Path(chosen.output), time.monotonic()
    output.write_text("")  # a path that cannot be written fails now
    command = [sys.executable, __file__, *["--small"] * chosen.small]
    supervisor = Supervisor(command, chosen.minutes, lambda line: print(line, flush=True))
    checks: list[dict] = []
    for result in supervisor.run(chosen.only):
        checks.append(result.as_json())
        content = {
            "passed": FAILED not in [check["status"] for check in checks],
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(time.monotonic() - start, 3),
            **supervisor.about,
            "checks": checks,
        }
        output.write_text(json.dumps(content, indent=1) + "\n")
    states = [check["status"] for check in checks]
    counts = ", ".join(f"{states.count(state)} {state}" for state in (PASSED, FAILED, SKIPPED))
    print(f"{counts} in {time.monotonic() - start:.0f} s; {output}")
    return int(FAILED in states)


if __name__ == "__main__":
    sys.exit(entrypoint.run(main))
