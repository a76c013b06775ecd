"""Where a tensor's storage pretends to be: in host memory, in pinned host memory, or on the GPU.

The place belongs to the storage, so views, detached tensors and parameters whose `.data` is replaced
need no care. A storage that nobody has placed is in host memory.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class Place(Enum):
    HOST = "host"
    PINNED = "pinned host"
    CUDA = "CUDA"


# By the storage's address. The weak reference keeps the address from being given to another storage.
_placed: dict[int, tuple[StorageWeakRef, Place]] = {}
_FIRST_SWEEP = 4096
_sweep_at = _FIRST_SWEEP


def place_of(tensor: torch.Tensor) -> Place:
    found = _placed.get(tensor.untyped_storage()._cdata)
    return Place.HOST if found is None else found[1]


def put(tensor: torch.Tensor, place: Place) -> torch.Tensor:
    """Makes the storage of `tensor` pretend to be at `place`; returns the tensor."""
    storage = tensor.untyped_storage()
    _placed[storage._cdata] = StorageWeakRef(storage), place
    _forget_the_freed()
    return tensor


def _forget_the_freed() -> None:
    global _sweep_at
    if len(_placed) < _sweep_at:
        return
    for address in [key for key, (storage, _) in _placed.items() if storage.expired()]:
        del _placed[address]
    _sweep_at = max(_FIRST_SWEEP, 2 * len(_placed))


def on_cuda(tensor: torch.Tensor) -> bool:
    return place_of(tensor) is Place.CUDA


def shares_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def names_cuda(device: object) -> bool:
    """Whether `device` (object, string or index) names a CUDA device."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)
