"""Hands torch's launcher over to ours: its agent, its signals, and where the nodes meet."""

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
    """Starts the ranks and returns when all have succeeded; else raises SystemExit."""
    args = rendezvous.options(argv)
    # torch fills in its own ${...} in them.
    args.training_script_args = [word.replace("$", "$$") for word in args.training_script_args]
    # What torch says of failed ranks, the agent says in a line.
    logging.getLogger(processes.__name__).setLevel(logging.CRITICAL)
    # torch takes these by their names. It compares names of hosts, not addresses, asks for its own
    # at every event, and its handler of signals raises also while ranks are being started.
    launcher.LocalElasticAgent = partial(Agent, signals)  # type: ignore[misc, assignment]
    c10d_rendezvous_backend._matches_machine_hostname = rendezvous.is_this_machine
    agents._get_fq_hostname = socket.gethostname
    processes._terminate_process_handler = signals.receive  # type: ignore[assignment]
    args.signals_to_handle = "SIGTERM"  # the rest, `signals` takes by itself
    try:
        run_torchrun(args)
    except RendezvousError as error:
        print(f"launcher: no rendezvous at {args.rdzv_endpoint}: {error}", file=sys.stderr)
        raise SystemExit(FAILED) from None
