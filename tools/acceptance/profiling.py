"""Reads torch's profiler: which work ran on the device, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from megatron_rpp.parallel import device as devices

COPIES = ("Memcpy", "Memset")


def _record(work: Callable[[], object], activities: Iterable[Any]) -> list[Any]:
    devices.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        devices.synchronize()
    return list(profiler.events())


def attention_operators(work: Callable[[], object]) -> list[str]:
    """The attention operators of PyTorch or TransformerEngine that `work` calls."""
    names = {event.name for event in _record(work, [ProfilerActivity.CPU])}
    names.discard("aten::scaled_dot_product_attention")  # it calls one of the others
    words = ("scaleddotproduct", "varlenattn", "fusedattn", "flashattn")
    return sorted(
        name
        for name in names
        if any(word in name.lower().replace("_", "") for word in words)
        and not name.startswith("autograd::")
    )


@dataclass(frozen=True)
class Timeline:
    """When the device worked, in microseconds."""

    kernels: int
    copies: int
    busy: float
    span: float
    """From the beginning of the first piece of work to the end of the last."""
    longest_gap: float

    @property
    def idle(self) -> float:
        """The share of `span` in which the device waited."""
        return 1.0 - self.busy / self.span


def timeline(work: Callable[[], object]) -> Timeline:
    """The kernels of `work` on a GPU; on a CPU the outermost operators take their place."""
    device = devices.device().type.upper()
    # On a GPU no operators are recorded: that slows the host down, and the GPU waits longer for it.
    events = _record(work, [getattr(ProfilerActivity, device)])
    kind = getattr(DeviceType, device)
    own = [
        event
        for event in events
        if event.device_type == kind and event.cpu_parent is None and not event.is_user_annotation
    ]
    copies = sum(event.name.startswith(COPIES) for event in own)
    spans = sorted((event.time_range.start, event.time_range.end) for event in own)
    return Timeline(len(own) - copies, copies, *_busy(spans))


def _busy(spans: list[tuple[float, float]]) -> tuple[float, float, float]:
    """(time that any of the sorted `spans` covers, from first to last, longest gap)."""
    if not spans:
        raise ValueError("the profiler has recorded no work of the device")
    first, reached = spans[0][0], spans[0][0]
    busy = gap = 0.0
    for start, end in spans:
        gap = max(gap, start - reached)
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy, reached - first, gap
