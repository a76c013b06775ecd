"""Gradients that should be equal: of two identical updates, and with and without recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from acceptance import work
from acceptance.figures import Figure
from acceptance.measure import gpu_peak, on_gpu
from acceptance.scale import Scale
from megatron_rpp.config import ModelConfig, TrainConfig
from megatron_rpp.model.trained_model import TrainedModel

APART = 0.01
"""Of the largest gradient. Kernels on GPUs may sum in another order each time, in bf16."""


def _model(scale: Scale) -> ModelConfig:
    """With a smaller vocabulary, so that the gradients of two models fit into the memory."""
    return replace(scale.wide, vocab_size=scale.pair.vocab_size)


def determinism(scale: Scale) -> Iterator[Figure]:
    first, second = _updated(scale), _updated(scale)
    for name, one, other in zip(("gradients", "weights"), first, second, strict=True):
        yield from _compared(name, one, other, most=APART if name == "gradients" else None)


def _updated(scale: Scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients and weights of a random model after an update."""
    model = _model(scale)
    policy, samples = work.policy(model), work.buffer(model, scale.row)
    samples.old_logprobs = work.score(policy, samples)
    work.update(policy, samples)
    weights = torch.cat([parameter.detach().flatten() for parameter in policy.model.parameters()])
    return _gradients(policy), weights


def _gradients(policy: TrainedModel) -> torch.Tensor:
    return torch.cat([buffer.grad_data for chunk in policy.model for buffer in chunk.buffers])


def recompute(scale: Scale) -> Iterator[Figure]:
    plain, full = (_differentiated(scale, kind) for kind in ("none", "full"))
    yield from _compared("gradients", plain, full, most=APART)
    del plain, full
    yield from on_gpu("peak memory", lambda: _peaks(scale))


def _differentiated(scale: Scale, kind: str) -> torch.Tensor:
    policy = work.policy(_model(scale), TrainConfig(recompute=kind))
    work.backward(policy, work.buffer(_model(scale), scale.row))
    return _gradients(policy)


def _peaks(scale: Scale) -> Iterator[Figure]:
    none, full = (_peak(scale, kind) for kind in ("none", "full"))
    for kind, peak in (("none", none), ("full", full)):
        yield Figure(name=f"peak memory, {kind}", value=peak, unit="GB")
    most = scale.speed.recompute_share
    yield Figure(name="peak memory, full over none", value=full / none, at_most=most)


def _peak(scale: Scale, kind: str) -> float:
    """GB that forward and backward need beyond weights and gradients."""
    policy = work.policy(_model(scale), TrainConfig(recompute=kind))
    samples = work.buffer(_model(scale), scale.row)
    work.backward(policy, samples)  # the first pass compiles and makes workspaces
    return gpu_peak(lambda: work.backward(policy, samples))


def _compared(
    name: str, first: torch.Tensor, second: torch.Tensor, *, most: float | None
) -> Iterator[Figure]:
    apart = (first - second).abs_()
    differing = int(apart.count_nonzero()) / len(apart)
    yield Figure(name=f"{name}, elements that differ", value=differing, unit="of 1")
    largest = float(apart.max()) / float(first.abs().max())
    yield Figure(name=f"{name}, largest difference", value=largest, at_most=most)
