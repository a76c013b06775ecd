"""Updates of a small model, and its checkpoints: saved, resumed, and written in the background."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from acceptance import profiling, work
from acceptance.figures import Figure
from acceptance.measure import seconds
from acceptance.scale import Scale
from megatron_rpp.checkpoint import state as checkpoint
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.checkpoint.writer import PendingSave
from megatron_rpp.config import CheckpointConfig, ModelConfig
from megatron_rpp.model.language_model import chunks
from megatron_rpp.model.trained_model import TrainedModel
from megatron_rpp.parallel import device as devices
from megatron_rpp.rollout.buffer import RolloutBuffer

UPDATES = 3


def training(scale: Scale) -> Iterator[Figure]:
    yield from _train(scale, scale.pair)


def without_engine(scale: Scale) -> Iterator[Figure]:
    if not devices.has_transformer_engine():
        yield Figure(name="local layers", skipped="no TransformerEngine, so every check uses them")
        return
    yield from _train(scale, replace(scale.pair, transformer_impl="local"))


def in_fp32(scale: Scale) -> Iterator[Figure]:
    yield from _train(scale, replace(scale.pair, dtype="fp32"))


def _train(scale: Scale, model: ModelConfig) -> Iterator[Figure]:
    policy, samples = work.policy(model), work.buffer(model, scale.row)
    assert samples.advantages is not None
    samples.advantages.fill_(1.0)  # so every update makes the responses likelier
    yield Figure(name="layers", value=chunks(policy.model)[0].config.transformer_impl)
    before = work.score(policy, samples)
    for _ in range(UPDATES):
        samples.old_logprobs = work.score(policy, samples)
        stats = work.update(policy, samples)
    gain = float((work.score(policy, samples) - before).mean())
    yield Figure(name="gradient norm", value=stats.grad_norm, at_least=1e-6, at_most=1e6)
    yield Figure(name="responses' mean log-prob gains", value=gain, unit="nats", at_least=1e-3)
    passed = seconds(lambda: work.update(policy, samples))
    yield Figure(name="update", value=passed * 1e3, unit="ms")
    used = profiling.attention_operators(lambda: work.update(policy, samples))
    yield Figure(name="attention operators", value=", ".join(used) or "none was recorded")
    yield Figure(
        name="math kernels among them",
        value=sum("math" in name.lower() for name in used),
        at_most=0,
    )
    yield from _checkpoints(policy, samples, model)


def _checkpoints(
    policy: TrainedModel, samples: RolloutBuffer, model: ModelConfig
) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="acceptance_") as folder:
        settings = CheckpointConfig(dir=folder)
        start, saved = time.perf_counter(), _tensors(policy)
        path = checkpoint.save(policy, RunState(step=1), settings).publish()
        yield Figure(name="save", value=time.perf_counter() - start, unit="s")
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        yield Figure(name="checkpoint", value=size / 1e6, unit="MB")
        yield _difference("resumed state differs by", _resumed(model, path), saved)

        start = time.perf_counter()
        pending = checkpoint.save(policy, RunState(step=2), settings, in_background=True)
        yield Figure(name="background save stalls", value=time.perf_counter() - start, unit="s")
        work.update(policy, samples)  # must not reach the checkpoint
        yield _difference(
            "an update during it changes weights by", _tensors(policy), saved, least=1e-9
        )
        yield _difference("its state differs by", _resumed(model, _published(pending)), saved)


def _published(pending: PendingSave) -> Path:
    pending.written(wait=True)
    return pending.publish()


def _resumed(model: ModelConfig, path: Path) -> list[torch.Tensor]:
    policy = work.policy(model)
    checkpoint.resume(policy, path)
    return _tensors(policy)


def _tensors(policy: TrainedModel) -> list[torch.Tensor]:
    """Copies of the weights, the optimizer's own weights and Adam's moments."""
    (part,) = policy.optimizer.chained_optimizers
    own = [p for group in part.optimizer.param_groups for p in group["params"]]
    states = [part.optimizer.state[p] for p in own]
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    return [tensor.detach().clone() for tensor in [*policy.model.parameters(), *own, *moments]]


def _difference(
    name: str, found: list[torch.Tensor], saved: list[torch.Tensor], *, least: float | None = None
) -> Figure:
    """The largest difference: none if `least` is None, else at least that."""
    pairs = zip(found, saved, strict=True)
    largest = max((float((a - b).abs().max()) for a, b in pairs), default=math.nan)
    most = 0.0 if least is None else None
    return Figure(name=name, value=largest, at_least=least, at_most=most)
