"""torchrun with meaningful exit codes: it passes on the codes of the ranks and lets them save.

    python -m megatron_rpp.torchrun [TORCHRUN OPTIONS] -m megatron_rpp.train --config FILE ...

torch's own launcher turns every failure into exit code 1, restarts a run with an invalid
configuration, kills the ranks 30 seconds after SIGTERM, and needs this machine's name to resolve.
This one

- exits with the ranks' code, the same on every node (see `exit_code`);
- forwards SIGTERM and SIGUSR1 to the ranks and keeps watching them: they save and exit with 75, and
  the sender decides how long that may take; if no rank runs, it exits with 75 at once
  (launcher/ending.py);
- with ``--max-restarts`` restarts crashed ranks, with a new store, but not after exit codes 2 and 75;
- stops the ranks of this node if those of another have failed for good (launcher/agent.py);
- needs no name of this machine, and for one node no address and no port (launcher/rendezvous.py).

Left out: ``--run-path``. Elastic worlds (``--nnodes 1:4``) are left to torch and not tested.
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
        # Importing torch takes seconds, and a signal may come meanwhile.
        from megatron_rpp.launcher import launch

        launch.launch(argv, signals)
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        code = ended.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # another signal would kill Python during its clean-up


if __name__ == "__main__":
    main()
