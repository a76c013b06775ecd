"""Ports for programs that tests start."""

from __future__ import annotations

import random
import socket
from contextlib import suppress


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on. It is below those that the system hands out by itself,
    so that no connection takes it before the program of the test does, seconds later."""
    while True:
        # From the system, because hypothesis seeds random alike in all processes that run tests.
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def free_ports(count: int) -> list[int]:
    """Different ones; see `free_port`."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)
