"""A model that is only read: a resident reference, or a reward model, whose weights may wait in host
memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from megatron_rpp.parallel import device as devices


class FrozenModel:
    """The chunks of a model without gradients, on the device while they are in use."""

    def __init__(self, stage: torch.nn.ModuleList, *, offload: bool) -> None:
        """offload: keep the weights in host memory between two uses."""
        self.stage = stage.requires_grad_(False).eval()
        parameters = list(stage.parameters()) if offload else []
        self.host = [(parameter, devices.host_copy(parameter)) for parameter in parameters]
        self._release()

    @contextlib.contextmanager
    def active(self) -> Iterator[torch.nn.ModuleList]:
        """Yields the chunks, with their weights on the device while the context is open."""
        for parameter, host in self.host:
            parameter.data = devices.upload(host, devices.device())
        try:
            yield self.stage
        finally:
            self._release()

    def _release(self) -> None:
        """Frees the weights on the device; nothing has changed them."""
        for parameter, host in self.host:
            parameter.data = host
