"""Two network namespaces with a link between them act as two nodes on one machine.

Needs root, the `ip` command and the right to make namespaces; skips the test if one is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest


class Node(NamedTuple):
    prefix: tuple[str, ...]
    """Prefix of a command that runs on this node."""
    address: str
    interface: str


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def two_namespaces() -> Iterator[list[Node]]:
    """Makes two nodes that reach each other and nothing else."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the `ip` command (Debian: iproute2)")
    names = [f"rpp{os.getpid()}{end}" for end in "ab"]
    nodes = [
        Node(("ip", "netns", "exec", name), f"10.213.7.{number}", name)
        for number, name in enumerate(names, start=1)
    ]
    try:
        _make(nodes)
    except subprocess.CalledProcessError as error:
        _remove(names)
        pytest.skip(f"this machine makes no network namespaces: {error.stderr.strip()}")
    try:
        yield nodes
    finally:
        _remove(names)


def _make(nodes: list[Node]) -> None:
    first, second = (node.interface for node in nodes)
    for node in nodes:
        _ip("netns", "add", node.interface)
    _ip("link", "add", first, "netns", first, "type", "veth", "peer", second, "netns", second)
    for node in nodes:
        name = node.interface
        _ip("-n", name, "addr", "add", f"{node.address}/24", "dev", name)
        for interface in ("lo", name):
            _ip("-n", name, "link", "set", interface, "up")


def _remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
