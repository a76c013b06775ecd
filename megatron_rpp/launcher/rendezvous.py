"""Where the nodes of a launch meet, and the address under which ranks find this one.

Neither asks for this machine's own name, which may resolve to nothing, or to another machine. One
node meets at the loopback address. Of several nodes, the one where they meet is called as the
command line calls it, and another one by its address on the way there.
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
"""The options that say where nodes meet."""
PROBE_SECONDS = 5.0
"""How long what listens at the rendezvous' port may take to show that it is one."""


def refuse(message: str) -> NoReturn:
    print(f"error: launcher: {message}", file=sys.stderr, flush=True)
    raise SystemExit(REFUSED)


def options(argv: list[str] | None) -> Namespace:
    """torchrun's options, with the meeting place filled in. Refuses what cannot be one."""
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
    """What the command line says. What it does not, torch takes from variables PET_...

    On one node those that say where to meet are left alone: they are for another job.
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
    """What `host` resolves to, as socket.getaddrinfo says it; nothing where it does not."""
    with suppress(socket.gaierror, UnicodeError):
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return []


def is_this_machine(host: str) -> bool:
    """Whether `host` is an address of this machine, on whatever network card."""
    for family, kind, protocol, _, address in _addresses(host):
        with socket.socket(family, kind, protocol) as probe, suppress(OSError):
            probe.bind(address)
            return True
    return False


def _address_towards(host: str, port: int) -> str | None:
    """This machine's address on the way to `host`; None where there is no way."""
    for family, _, _, _, address in _addresses(host, port):
        with socket.socket(family, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect(address)  # chooses a route and sends nothing
            return probe.getsockname()[0]
    return None


def _own_name_will_do() -> bool:
    """Whether gloo finds by this machine's name an address that may be one for other nodes."""
    name = socket.gethostname()
    found = [ipaddress.ip_address(address[0]) for *_, address in _addresses(name)]
    return is_this_machine(name) and not any(address.is_loopback for address in found)


def _choose_interface(address: str | None) -> None:
    """The network card with `address` is gloo's, which would look for one by this machine's name.

    Ranks inherit the choice; one that the user made stands.
    """
    for interface, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _check_port(endpoint: str) -> None:
    """Refuses where the rendezvous is to be here, on a port that another program has.

    torch would take that program for the rendezvous, and wait.
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
    """Whether a rendezvous is there already, such as another node's on this machine."""

    def ask() -> None:
        with suppress(DistError):
            TCPStore(host, port, is_master=False, timeout=timedelta(seconds=PROBE_SECONDS))
            answered.set()

    answered = threading.Event()
    # In a thread of its own: torch waits for ever for a program that accepts and says nothing.
    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(PROBE_SECONDS)
