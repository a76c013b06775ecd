"""torchrun for runs that end on purpose: its options, the exit codes of the ranks, time to save.

    python -m megatron_rpp.torchrun [TORCHRUN OPTIONS] -m megatron_rpp.train --config FILE ...

torch's own launcher turns every failure into exit code 1, starts a refused run again, answers
SIGTERM by killing the ranks 30 seconds later, and needs this machine's name to resolve. This one

- exits with the ranks' code, on every node with the same one (see `exit_code`);
- passes SIGTERM and SIGUSR1 on to the ranks and goes on watching them: they save and exit with 75,
  and whoever sent the signal decides how long that may take; while no rank runs it exits with 75
  at once (launcher/ending.py);
- under ``--max-restarts`` starts crashed ranks again, with a store of their own, but none that
  refused or were preempted;
- stops the ranks of this node when those of another have failed for good (launcher/agent.py);
- needs no name of this machine, and for one node no address and no port (launcher/rendezvous.py).

Left out: ``--run-path``; elastic worlds (``--nnodes 1:4``) are torch's matter, untested here.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from megatron_rpp.launcher.ending import Signals, exit_code

__all__ = ["exit_code", "main"]


def main(argv: list[str] | None = None) -> NoReturn:
    signals = Signals()
    signals.listen()
    code = 0
    try:
        # Importing torch takes seconds, in which a signal may come.
        from megatron_rpp.launcher import launch

        launch.launch(argv, signals)
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        code = ended.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # while Python tidies up, another signal would kill it


if __name__ == "__main__":
    main()
