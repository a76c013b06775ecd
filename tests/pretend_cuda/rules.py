"""What CUDA does with an operation: which mixes of places it refuses, and at which calls it waits.

The waits are those at which `torch.cuda.set_sync_debug_mode` warns: the host stops until the GPU has
done everything that was queued. Copies in either direction wait unless they are non-blocking and the
host side is pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from tests.pretend_cuda.places import Place, on_cuda, place_of

aten = torch.ops.aten

COPIES = {aten.copy_, aten._to_copy, aten._foreach_copy_}
"""They may read in one place and write in another."""
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
"""They take indices from the host for a tensor on the GPU."""
_JOINING = {aten.cat, aten.stack}
"""They take no scalars from the host."""

READS, SHAPE = "reads a value", "shape depends on values"
TO_HOST, TO_DEVICE = "copy to host", "copy to device"
SYNCHRONIZE, OBJECTS = "synchronize", "collective of objects"

_WAITS = {
    aten._local_scalar_dense: READS,  # item, int, float, bool
    aten.equal: READS,
    aten.nonzero: SHAPE,
    aten.masked_select: SHAPE,
    aten.bincount: SHAPE,
    aten._unique2: SHAPE,
    aten.unique_consecutive: SHAPE,
    aten.unique_dim: SHAPE,
}


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors among arguments or results, also inside lists and tuples."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)


@cache
def _written(func: torch._ops.OpOverload) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Positions and names of the arguments that `func` writes to."""
    arguments = list(enumerate(func._schema.arguments))
    written = [(i, a) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return tuple(i for i, _ in written), tuple(a.name for _, a in written)


def mix(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> str | None:
    """Says what is wrong with the places of the operands, or None if CUDA takes them."""
    operands = [*tensors_in(args), *tensors_in(list(kwargs.values()))]
    host = [tensor for tensor in operands if not on_cuda(tensor)]
    packet = func.overloadpacket
    if func.namespace == "c10d" and packet is not torch.ops.c10d.barrier:
        return _told(func, operands, "NCCL takes CUDA tensors only") if host else None
    if not host or len(host) == len(operands) or packet in COPIES:
        return None
    positions, names = _written(func)
    targets = [args[i] for i in positions if i < len(args)]
    targets += [kwargs[name] for name in names if name in kwargs]
    if any(not on_cuda(target) for target in tensors_in(targets)):
        return _told(func, operands, "the result is in host memory")
    if packet in _INDEXING and on_cuda(args[0]):
        host = [tensor for tensor in tensors_in(args[2:]) if not on_cuda(tensor)]
    if packet in _JOINING or any(tensor.dim() for tensor in host):
        return _told(func, operands, "all tensors must be in the same place")
    return None


def _told(func: torch._ops.OpOverload, operands: list[torch.Tensor], why: str) -> str:
    shown = ", ".join(f"{place_of(t).value} {list(t.shape)}" for t in operands)
    return f"{func} of {shown}: {why}"


def copy_wait(source: Place, target: Place, non_blocking: bool) -> str | None:
    """How a copy from `source` to `target` waits, or None."""
    if (source is Place.CUDA) == (target is Place.CUDA):
        return None
    host = target if source is Place.CUDA else source
    if non_blocking and host is Place.PINNED:
        return None
    return TO_HOST if source is Place.CUDA else TO_DEVICE


def wait(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> str | None:
    """How the host waits for the GPU in this operation on CUDA tensors, or None."""
    packet = func.overloadpacket
    if packet in (aten.copy_, aten._foreach_copy_):
        non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        pairs = zip(tensors_in(args[0]), tensors_in(args[1]))
        waits = (copy_wait(place_of(source), place_of(to), non_blocking) for to, source in pairs)
        return next((found for found in waits if found), None)
    if packet is torch.ops.c10d.barrier:
        return SYNCHRONIZE
    if not any(map(on_cuda, tensors_in(args))):
        return None
    if packet is aten.repeat_interleave:
        return None if kwargs.get("output_size") is not None else SHAPE
    if packet in _INDEXING:
        return _index_wait(args)
    return _WAITS.get(packet)


def _index_wait(args: tuple) -> str | None:
    indices = list(tensors_in(args[1]))
    masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
    if masks and not _is_fill(args, len(indices)):
        return SHAPE
    return None if all(map(on_cuda, indices)) else TO_DEVICE


def _is_fill(args: tuple, indices: int) -> bool:
    """Whether `tensor[mask] = number` becomes a masked fill."""
    accumulates = len(args) > 3 and args[3]
    if len(args) < 3 or indices != 1 or accumulates:
        return False
    return args[2].numel() == 1 and not on_cuda(args[2])
