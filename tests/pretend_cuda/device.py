"""A CUDA device that is not there: `with pretended_cuda() as watch:` runs the CUDA branches on a CPU.

`devices.ON_CPU` is False inside; "cuda" means a place (places.py) instead of the CPU; tensors made
there answer `.device` with cuda:0; and every operation is watched (watch.py). The process group stays
gloo, so its ranks must exist already. All is undone at the end.

Left out: gradients of a copy between the places, `with torch.device("cuda"):`, CUDA generators, the
contents of pickles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._device import _device_constructors

from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.parallel import cuda_on_cpu
from megatron_rpp.parallel import device as devices
from tests.pretend_cuda import rules
from tests.pretend_cuda.places import Place, names_cuda, on_cuda, place_of, put, shares_storage
from tests.pretend_cuda.watch import Watch

CUDA0 = torch.device("cuda", 0)
MEMORY = 80 * 10**9
NAME = "NVIDIA H100 80GB HBM3"


@contextmanager
def pretended_cuda() -> Iterator[Watch]:
    """Pretends in this process that there is a CUDA device; yields what watches it."""
    assert devices.ON_CPU, "there is a CUDA device"
    watch = Watch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heartbeat.current, "listeners", [*heartbeat.current.listeners, watch.enter])
        patch.setattr(devices, "ON_CPU", False)
        for name in ("has_varlen_attention", "has_paged_attention", "has_cuda_graphs"):
            patch.setattr(devices, name, lambda: False)  # not on the CPU
        _pretend_runtime(patch, watch)
        _pretend_factories(patch, watch)
        _pretend_attributes(patch)
        _pretend_copies(patch, watch)
        _pretend_reads(patch, watch)
        _pretend_object_collectives(patch, watch)
        with watch:
            yield watch


def _pretend_runtime(patch: pytest.MonkeyPatch, watch: Watch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 8)
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(torch.cuda, "get_device_name", lambda *args: NAME)
    patch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    patch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: True)
    properties = SimpleNamespace(name=NAME, major=9, minor=0, total_memory=MEMORY)
    patch.setattr(torch.cuda, "get_device_properties", lambda *args: properties)
    patch.setattr(torch.cuda, "mem_get_info", lambda *args: (MEMORY, MEMORY))
    patch.setattr(torch.cuda, "max_memory_allocated", lambda *args: 0)
    patch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    # A torch built for CUDA would look for the stream of the real one.
    patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    patch.setattr(dist, "get_backend", lambda group=None: "nccl")

    def synchronize(*args: Any, **kwargs: Any) -> None:
        watch.note(rules.SYNCHRONIZE)

    patch.setattr(torch.cuda, "synchronize", synchronize)
    for kind in (cuda_on_cpu._Stream, cuda_on_cpu._Event):
        patch.setattr(kind, "synchronize", synchronize)


_FROM_HOST = {"tensor", "as_tensor", "asarray", "new_tensor"}
"""Factories that copy values of the host."""


def _makes(function: Callable, watch: Watch) -> Callable:
    """Wraps a factory: what it makes is where `device` says."""
    name = function.__name__

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        pinned = kwargs.pop("pin_memory", False)  # a CPU without an accelerator refuses it
        made = function(*args, **kwargs)
        device = kwargs.get("device")
        if isinstance(made, torch.Tensor) and made.device.type != "meta":
            if device is not None:
                put(made, Place.CUDA if names_cuda(device) else Place.HOST)
            if pinned:
                put(made, Place.PINNED)
            if name in _FROM_HOST and on_cuda(made) and not isinstance(args[-1], torch.Tensor):
                watch.note(rules.TO_DEVICE)
        return made

    return call


def _pretend_factories(patch: pytest.MonkeyPatch, watch: Watch) -> None:
    makers = _device_constructors()
    for module in (torch, torch.fft, torch.nested):
        for name, function in list(vars(module).items()):
            if callable(function) and getattr(function, "__wrapped__", None) in makers:
                patch.setattr(module, name, _makes(function, watch))
    for name in cuda_on_cpu._LIKE:
        name = f"{name}_like"
        patch.setattr(torch, name, _makes(getattr(torch, name), watch))
    for name in cuda_on_cpu._NEW:
        name = f"new_{name}"
        patch.setattr(torch.Tensor, name, _makes(getattr(torch.Tensor, name), watch))


def _pretend_attributes(patch: pytest.MonkeyPatch) -> None:
    real_device, real_type = torch.Tensor.device, torch.Tensor.type

    def device(self: torch.Tensor) -> torch.device:
        if has_torch_function((self,)):  # the sharded tensors of checkpoints answer for themselves
            return handle_torch_function(real_device.__get__, (self,), self)
        real = real_device.__get__(self)
        return CUDA0 if real.type == "cpu" and on_cuda(self) else real

    def kind(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real_type(self, *args, **kwargs)
        if isinstance(answer, str) and not on_cuda(self):
            return answer.replace("torch.cuda.", "torch.")
        return answer

    patch.setattr(torch.Tensor, "device", property(device), raising=False)
    patch.setattr(torch.Tensor, "is_cuda", property(on_cuda), raising=False)
    patch.setattr(torch.Tensor, "is_cpu", property(lambda self: not on_cuda(self)), raising=False)
    patch.setattr(torch.Tensor, "is_pinned", lambda self: place_of(self) is Place.PINNED)
    patch.setattr(torch.Tensor, "get_device", lambda self: 0 if on_cuda(self) else -1)
    patch.setattr(torch.Tensor, "type", kind)


def _pretend_copies(patch: pytest.MonkeyPatch, watch: Watch) -> None:
    real_to, real_deepcopy = torch.Tensor.to, torch.Tensor.__deepcopy__

    def move(
        source: torch.Tensor, result: torch.Tensor, to_cuda: bool, non_blocking: bool
    ) -> torch.Tensor:
        """`result`, which has the values of `source`, in the other place if it is not there yet."""
        if to_cuda == on_cuda(source):
            return result
        # A non-blocking copy to the host goes to pinned memory that torch allocates for it.
        host = Place.PINNED if non_blocking else Place.HOST
        target = Place.CUDA if to_cuda else host
        kind = rules.copy_wait(place_of(source), target, non_blocking)
        if kind is not None:
            watch.note(kind)
        return put(result.clone() if shares_storage(source, result) else result, target)

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = real_to(self, *args, **kwargs)
        target = args[0] if args else kwargs.get("device", kwargs.get("other"))
        if isinstance(target, torch.Tensor):
            target = target.device
        if target is None or isinstance(target, torch.dtype) or result.device.type == "meta":
            return result
        position = 1 if args and isinstance(args[0], torch.Tensor) else 2
        default = args[position] if len(args) > position else False
        non_blocking = kwargs.get("non_blocking", default)
        return move(self, result, names_cuda(target), non_blocking)

    def cuda(self: torch.Tensor, device: Any = None, non_blocking: bool = False) -> torch.Tensor:
        return move(self, self, True, non_blocking)

    def deepcopy(self: torch.Tensor, memo: dict) -> torch.Tensor:
        return put(real_deepcopy(self, memo), place_of(self))

    patch.setattr(torch.Tensor, "to", to)
    patch.setattr(torch.Tensor, "cuda", cuda)
    patch.setattr(torch.Tensor, "cpu", lambda self, **kwargs: move(self, self, False, False))
    patch.setattr(torch.Tensor, "pin_memory", lambda self: put(self.clone(), Place.PINNED))
    patch.setattr(torch.Tensor, "__deepcopy__", deepcopy)


def _pretend_reads(patch: pytest.MonkeyPatch, watch: Watch) -> None:
    """Reads that the CPU answers without an operation that could be watched."""
    real_tolist, real_numpy = torch.Tensor.tolist, torch.Tensor.numpy

    def tolist(self: torch.Tensor) -> Any:
        if on_cuda(self):
            watch.note(rules.READS)
        with watch.muted():
            return real_tolist(self)

    def numpy(self: torch.Tensor, **kwargs: Any) -> Any:
        if on_cuda(self):
            watch.refuse("numpy() of a CUDA tensor")
        return real_numpy(self, **kwargs)

    patch.setattr(torch.Tensor, "tolist", tolist)
    patch.setattr(torch.Tensor, "numpy", numpy)


_OBJECT_COLLECTIVES = (
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
)  # fmt: skip


def _pretend_object_collectives(patch: pytest.MonkeyPatch, watch: Watch) -> None:
    """Objects travel as tensors of the group's device, which is the CPU for gloo."""

    def silent(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            watch.note(rules.OBJECTS)
            if "device" in kwargs:
                kwargs["device"] = torch.device("cpu")
            with watch.muted():
                return function(*args, **kwargs)

        return call

    for name in _OBJECT_COLLECTIVES:
        patch.setattr(dist, name, silent(getattr(dist, name)))

    wait_for = dist.Work.wait

    def work_wait(self: dist.Work, *args: Any) -> Any:
        with watch.muted():  # gloo copies results here; NCCL only orders its stream
            return wait_for(self, *args)

    patch.setattr(dist.Work, "wait", work_wait)
