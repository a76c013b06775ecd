"""What the machine has, judged by preflight's own rules, and a first collective."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from acceptance.figures import Figure
from acceptance.measure import on_gpu
from acceptance.scale import Scale
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import gpu_facts
from megatron_rpp.runtime.preflight_gpu import Check, judge_gpu, judge_node


def preflight(scale: Scale) -> Iterator[Figure]:
    yield _figure(judge_node(gpu_facts.node_facts(), on_gpu=not devices.ON_CPU))
    yield from on_gpu("libraries, compiler, links", lambda: _gpu(scale))
    values = torch.arange(1024.0, device=devices.device())
    dist.all_reduce(values)
    right = bool((values == torch.arange(1024.0, device=values.device)).all())
    yield Figure(name="all-reduce over one rank", value=devices.backend(), verdict=right)


def _gpu(scale: Scale) -> Iterator[Figure]:
    found = gpu_facts.gpu_facts(tries_compiler=True)
    assert found is not None
    model = scale.wide
    judged = judge_gpu(
        found,
        dtype=model.dtype,
        transformer_impl=model.transformer_impl,
        several_nodes=False,
    )
    yield from map(_figure, judged)


def _figure(check: Check) -> Figure:
    return Figure(name=check.name, value=check.found, verdict=check.passed)
