"""Runs one rank of the program that its first argument names, from any working directory.

    python -P -m megatron_rpp.launcher.rank train --config FILE ...        (started by launch/*.sh)

``python -m megatron_rpp.train`` would look for every module in the user's directory first: a file
`datasets.py` there would be taken for the library. Here that directory comes last, so that a reward
`my_package.rewards:score` is found there.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys

from megatron_rpp.lifecycle.parent_death import end_with


def main() -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Nothing else would end this rank if the launcher is killed.
        end_with(os.getppid(), signal.SIGTERM)
    sys.path.append(os.getcwd())
    program = sys.argv.pop(1)
    runpy.run_module(f"megatron_rpp.{program}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
