"""The frozen reference model: a second model on the device, or weights on the host.

`resident` is a FrozenModel, a second copy of the weights on the device. `offload` needs a copy in host
memory, and swaps it with the policy's weights and back each time; the policy is restored bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch

from megatron_rpp.parallel import device as devices


class Reference(Protocol):
    def active(self) -> contextlib.AbstractContextManager[torch.nn.ModuleList]:
        """Yields a model that holds the reference weights while the context is open."""


class OffloadedReference:
    """A copy on the host of the weights that `policy` has at construction."""

    def __init__(self, policy: torch.nn.ModuleList):
        self.policy = policy
        self.host = [devices.host_copy(parameter) for parameter in policy.parameters()]

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchanges the weights on the device with those on the host, one parameter at a time.

        The host does not wait in between: the copies of a GPU run in order on its stream, and the
        memory on the host is pinned. Only the exchanged weights are read next, on the same stream.
        """
        for parameter, host in zip(self.policy.parameters(), self.host, strict=True):
            current = parameter.detach().clone()
            parameter.copy_(host, non_blocking=True)
            host.copy_(current, non_blocking=True)
        devices.synchronize()  # what reads the host's copies next is not on the stream

    @contextlib.contextmanager
    def active(self) -> Iterator[torch.nn.ModuleList]:
        self._swap()
        try:
            yield self.policy
        finally:
            self._swap()
