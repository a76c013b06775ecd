"""The frozen reference model: a second model on the device, or weights on the host.

`resident` costs a second copy of the weights on the device; `offload` costs a copy in host memory
and two exchanges with the policy's weights per scoring, which restore the policy bit for bit.
"""

from __future__ import annotations

import contextlib
from typing import Iterator, Protocol

import torch

from megatron_rpp.parallel import device as devices


class Reference(Protocol):
    def active(self) -> contextlib.AbstractContextManager[torch.nn.Module]:
        """A model that holds the reference weights while the context is open."""


class ResidentReference:
    """A second model that stays on the device."""

    def __init__(self, stage: torch.nn.Module):
        self.stage = stage.requires_grad_(False).eval()

    @contextlib.contextmanager
    def active(self) -> Iterator[torch.nn.Module]:
        yield self.stage


class OffloadedReference:
    """The reference weights on the host, taken from `policy` as it is now."""

    def __init__(self, policy: torch.nn.Module):
        self.policy = policy
        self.host = [self._on_host(parameter) for parameter in policy.parameters()]

    @staticmethod
    def _on_host(parameter: torch.Tensor) -> torch.Tensor:
        copy = parameter.detach().to("cpu", copy=True)
        return copy if devices.ON_CPU else copy.pin_memory()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, host in zip(self.policy.parameters(), self.host, strict=True):
            mine = parameter.detach().to("cpu", copy=True)
            parameter.copy_(host)
            host.copy_(mine)

    @contextlib.contextmanager
    def active(self) -> Iterator[torch.nn.Module]:
        self._swap()
        try:
            yield self.policy
        finally:
            self._swap()
