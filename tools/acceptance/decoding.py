"""Decoding with the key-value cache: its speed, and its log-probs against those of training."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import torch

from acceptance import work
from acceptance.figures import Figure
from acceptance.measure import host_growth, on_gpu, seconds
from acceptance.scale import Scale
from megatron_rpp.data.prompts import Example, Prompt
from megatron_rpp.parallel import device as devices
from megatron_rpp.rollout.buffer import from_generations
from megatron_rpp.stages.logprobs import response_logprobs

HOST_GROWTH = 100.0
"""MB. A cache that keeps something for every token would grow faster."""
MEAN_NATS, LARGEST_NATS = 0.02, 0.5
"""Thresholds of log-probs in bf16, of the rollout against training."""


def decode(scale: Scale) -> Iterator[Figure]:
    model, limits = work.stage(scale.wide), scale.speed

    def run() -> None:
        work.generate(model, prompt=scale.prompt, batch=scale.batch, tokens=scale.decode_tokens)

    run()  # the first run allocates and compiles
    growth = host_growth(run)
    off = seconds(run, rounds=1) * 1e3 / scale.decode_tokens
    yield Figure(name="cuDNN off, host memory", value=growth, unit="MB more", at_most=HOST_GROWTH)
    yield Figure(name="cuDNN off", value=off, unit="ms a token", at_most=limits.decode_ms)

    def with_cudnn() -> Iterator[Figure]:
        for name, multiple in (("cuDNN on", None), ("cuDNN on, lengths not rounded", 1)):
            growth, passed = _with_cudnn(run, multiple)
            each = passed * 1e3 / scale.decode_tokens
            yield Figure(name=f"{name}, host memory", value=growth, unit="MB more")
            yield Figure(name=name, value=each, unit="ms a token")
            gain = None if multiple else limits.cudnn_gain
            yield Figure(name=f"{name}, time over off", value=each / off, at_least=gain)

    yield from on_gpu("cuDNN on", with_cudnn)


def _with_cudnn(run, multiple: int | None) -> tuple[float, float]:
    """(growth of host memory, seconds) of `run` with cuDNN's attention.

    multiple: decoding attends to a multiple of this many positions; None = as in a run.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    times: list[float] = []
    try:
        with mock.patch.object(devices, "ATTENDED_MULTIPLE", multiple or devices.ATTENDED_MULTIPLE):
            growth = host_growth(lambda: times.append(seconds(run, rounds=1)))
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    return growth, times[0]


def rollout(scale: Scale) -> Iterator[Figure]:
    model = work.stage(scale.wide)
    requests, generations = work.generate(
        model, prompt=scale.prompt, batch=scale.batch, tokens=scale.decode_tokens
    )
    prompts = [Prompt(Example("acceptance"), request.prompt) for request in requests]
    samples = from_generations(prompts, requests, generations, samples_per_prompt=1)
    trained = response_logprobs(model, samples, sum(scale.row), temperature=1.0)
    apart = (trained - samples.rollout_logprobs).abs()
    yield Figure(name="tokens", value=len(apart))
    yield Figure(name="mean difference", value=float(apart.mean()), unit="nats", at_most=MEAN_NATS)
    largest = float(apart.max())
    yield Figure(name="largest difference", value=largest, unit="nats", at_most=LARGEST_NATS)
