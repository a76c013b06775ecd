"""The most bytes of tensors that lived at once, counted on any device.

Each storage counts once, from the operation that returns it until it is freed. Not counted: what an
operation allocates and frees within itself, and the allocator's rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts storages that come into being while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._held = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        for tensor in tree_iter((args, kwargs)):  # what is older than the mode does not count
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), size=0)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), size=tensor.untyped_storage().nbytes())
        return result

    def _add(self, storage: torch.UntypedStorage, *, size: int) -> None:
        if storage._cdata in self._storages:
            return
        # The weak reference keeps the address from being given to another storage.
        self._storages[storage._cdata] = StorageWeakRef(storage), size
        self._held += size
        if self._held > self.peak:  # perhaps: some may have been freed since
            self._forget_the_freed()
            self.peak = max(self.peak, self._held)

    def _forget_the_freed(self) -> None:
        for address in [key for key, (weak, _) in self._storages.items() if weak.expired()]:
            self._held -= self._storages.pop(address)[1]
