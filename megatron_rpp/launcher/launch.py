"""Runs torch's launcher with our agent, our signal handling and our rendezvous options."""

from __future__ import annotations

import logging
import socket
import sys
from functools import partial

import torch.distributed.elastic.agent.server.api as agents
import torch.distributed.elastic.multiprocessing.api as processes
import torch.distributed.launcher.api as launcher
from torch.distributed.elastic.rendezvous import RendezvousError, c10d_rendezvous_backend
from torch.distributed.run import run as run_torchrun

from megatron_rpp.launcher import rendezvous
from megatron_rpp.launcher.agent import Agent
from megatron_rpp.launcher.ending import Signals
from megatron_rpp.lifecycle.exit_codes import FAILED


def launch(argv: list[str] | None, signals: Signals) -> None:
    """Starts the ranks and returns when all have succeeded; otherwise raises SystemExit."""
    args = rendezvous.options(argv)
    # torch substitutes its own ${...} in the arguments.
    args.training_script_args = [word.replace("$", "$$") for word in args.training_script_args]
    # The agent reports failed ranks in one line; torch's report is not needed.
    logging.getLogger(processes.__name__).setLevel(logging.CRITICAL)
    # torch looks these up by name. Its own versions compare host names instead of addresses, resolve
    # this host's name at every event, and raise in the signal handler even while ranks are started.
    launcher.LocalElasticAgent = partial(Agent, signals)  # type: ignore[misc, assignment]
    c10d_rendezvous_backend._matches_machine_hostname = rendezvous.is_this_machine
    agents._get_fq_hostname = socket.gethostname
    processes._terminate_process_handler = signals.receive  # type: ignore[assignment]
    args.signals_to_handle = "SIGTERM"  # `signals` handles the others
    try:
        run_torchrun(args)
    except RendezvousError as error:
        print(f"launcher: no rendezvous at {args.rdzv_endpoint}: {error}", file=sys.stderr)
        raise SystemExit(FAILED) from None
