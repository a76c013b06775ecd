"""The rendezvous of a launch: its endpoint, and the address by which ranks reach this node.

Both avoid this machine's own name, which may not resolve or may resolve to another machine. A single
node uses the loopback address. With several nodes, the node of the endpoint uses the name from the
command line, and every other node uses its own address on the route to the endpoint.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import threading
import uuid
from argparse import Namespace
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import psutil
from torch.distributed import DistError, TCPStore
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import DEFAULT_PORT
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import (
    config_from_args,
    determine_local_world_size,
    get_args_parser,
    parse_args,
    parse_min_max_nnodes,
)

from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.lifecycle.exit_codes import REFUSED

LOOPBACK = ("127.0.0.1", "::1")
MEETING = (
    "nnodes", "node_rank", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "rdzv_conf", "standalone",
    "master_addr", "master_port", "local_addr",
)  # fmt: skip
"""The options of the rendezvous."""
PROBE_SECONDS = 5.0
"""How long a listener on the rendezvous port may take to answer as a store."""


def refuse(message: str) -> NoReturn:
    print(f"error: launcher: {message}", file=sys.stderr, flush=True)
    raise SystemExit(REFUSED)


def options(argv: list[str] | None) -> Namespace:
    """Parses torchrun's options and fills in the rendezvous. Invalid options end the program."""
    args = _read(argv)
    try:
        where = f"--nnodes {args.nnodes}"
        several = parse_min_max_nnodes(args.nnodes)[1] > 1
        where = f"--rdzv-endpoint {args.rdzv_endpoint}"
        _meet_others(args) if several else _meet_alone(args)
        where = f"--nproc-per-node {args.nproc_per_node}"
        if determine_local_world_size(args.nproc_per_node) < 1:
            raise ConfigError("a node has one rank or more")
        where = f"--log-dir {args.log_dir}"
        if args.log_dir:
            os.makedirs(args.log_dir, exist_ok=True)
        where = "torchrun's options"
        config_from_args(args)
    except (ValueError, RuntimeError, AssertionError, OSError) as error:
        refuse(f"{where}: {error}")
    return args


def _read(argv: list[str] | None) -> Namespace:
    """Parses the command line. torch takes absent options from variables PET_...

    On one node the variables of the rendezvous are ignored: they are for another job.
    """
    names = {f"PET_{option.upper()}" for option in MEETING}
    present = {name: os.environ.pop(name) for name in sorted(names & os.environ.keys())}
    parser = get_args_parser()
    parser.set_defaults(nnodes=None)
    said = parser.parse_args(argv)
    if said.nnodes is None:
        said.nnodes = "1" if said.standalone else present.get("PET_NNODES", "1")
    if present and said.nnodes not in ("1", "1:1"):
        os.environ.update(present)
        return parse_args(argv)
    if present:
        print(f"launcher: one node: not read: {', '.join(present)}", file=sys.stderr, flush=True)
    return said


def _meet_alone(args: Namespace) -> None:
    if args.local_addr and not is_this_machine(args.local_addr):
        refuse(f"--local-addr {args.local_addr} is no address of this machine: leave it out")
    loopback = next((own for own in LOOPBACK if _address_towards(own, 1)), None)
    if loopback is None:
        refuse(f"there is no way to {' or to '.join(LOOPBACK)}: ip link set lo up")
    args.local_addr = args.local_addr or loopback
    given = args.rdzv_endpoint or (args.rdzv_backend == "static" and args.master_port)
    if args.standalone or not given:
        args.rdzv_backend, args.rdzv_endpoint = "c10d", f"[{loopback}]:0"
        args.rdzv_id = str(uuid.uuid4())
    elif args.rdzv_backend == "c10d":
        _check_port(args.rdzv_endpoint)
    args.standalone = False
    _choose_interface(loopback)


def _meet_others(args: Namespace) -> None:
    if args.standalone:
        refuse(f"--standalone is for one node, --nnodes {args.nnodes} for several: leave one out")
    if args.rdzv_backend != "c10d":
        return
    if not args.rdzv_endpoint:
        refuse(
            f"--nnodes {args.nnodes} needs a place to meet: --rdzv-endpoint FIRST_NODE:PORT, the "
            f"same on every node"
        )
    _check_port(args.rdzv_endpoint)
    host, port = parse_rendezvous_endpoint(args.rdzv_endpoint, DEFAULT_PORT)
    address = _address_towards(host, port)
    if args.local_addr is None:
        args.local_addr = host if is_this_machine(host) else address
    if not _own_name_will_do():
        _choose_interface(address)


def _addresses(host: str, port: int = 0) -> list[tuple]:
    """The results of socket.getaddrinfo for `host`; empty if it does not resolve."""
    with suppress(socket.gaierror, UnicodeError):
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return []


def is_this_machine(host: str) -> bool:
    """Whether `host` is an address of this machine, on any network interface."""
    for family, kind, protocol, _, address in _addresses(host):
        with socket.socket(family, kind, protocol) as probe, suppress(OSError):
            probe.bind(address)
            return True
    return False


def _address_towards(host: str, port: int) -> str | None:
    """This machine's address on the route to `host`; None if there is no route."""
    for family, _, _, _, address in _addresses(host, port):
        with socket.socket(family, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect(address)  # chooses a route and sends nothing
            return probe.getsockname()[0]
    return None


def _own_name_will_do() -> bool:
    """Whether this machine's name, which gloo resolves, gives an address that others can reach."""
    name = socket.gethostname()
    found = [ipaddress.ip_address(address[0]) for *_, address in _addresses(name)]
    return is_this_machine(name) and not any(address.is_loopback for address in found)


def _choose_interface(address: str | None) -> None:
    """Makes gloo use the network interface with `address` instead of resolving this machine's name.

    Ranks inherit the choice. The user's own choice is not changed.
    """
    for interface, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _check_port(endpoint: str) -> None:
    """Ends the program if the endpoint is on this machine and another program has its port.

    torch would take that program for the rendezvous and wait.
    """
    host, port = parse_rendezvous_endpoint(endpoint, DEFAULT_PORT)
    if not port or not is_this_machine(host):
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            return
        except OSError as error:
            reason = error.strerror
    if not _answers_as_a_store(host, port):
        refuse(
            f"port {port} of {host} cannot be used for the rendezvous ({reason}): choose another "
            f"one, --rdzv-endpoint {host}:PORT, the same on every node"
        )


def _answers_as_a_store(host: str, port: int) -> bool:
    """Whether a rendezvous already listens there, for example of another node on this machine."""

    def ask() -> None:
        with suppress(DistError):
            TCPStore(host, port, is_master=False, timeout=timedelta(seconds=PROBE_SECONDS))
            answered.set()

    answered = threading.Event()
    # In a separate thread, because torch waits forever for a program that accepts but never answers.
    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(PROBE_SECONDS)
