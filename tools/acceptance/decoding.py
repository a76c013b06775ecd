"""Decoding with the key-value cache: its speed, and its log-probs against those of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
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
    each = seconds(run, rounds=1) * 1e3 / scale.decode_tokens
    yield Figure(name="host memory", value=growth, unit="MB more", at_most=HOST_GROWTH)
    yield Figure(name="time", value=each, unit="ms a token", at_most=limits.decode_ms)

    def without_kernels() -> Iterator[Figure]:
        for name, kernel, gain in (
            ("without CUDA graphs", "has_cuda_graphs", limits.graph_gain),
            ("without the paged kernel", "has_paged_attention", limits.paged_gain),
        ):
            with mock.patch.object(devices, kernel, lambda: False):
                ratio = seconds(run, rounds=1) * 1e3 / scale.decode_tokens / each
            yield Figure(name=f"{name}, time over with", value=ratio, at_least=gain)
        yield from cudnn_figures(run)

    yield from on_gpu("without CUDA graphs", without_kernels)


def cudnn_figures(run: Callable[[], object]) -> Iterator[Figure]:
    """What cuDNN's attention would cost, which device.py turns off because it plans for every length.

    Without the paged kernel, which would be used instead, and without CUDA graphs, which would hide
    the plans.
    """
    with ExitStack() as stack:
        for kernel in ("has_cuda_graphs", "has_paged_attention"):
            stack.enter_context(mock.patch.object(devices, kernel, lambda: False))
        run()
        without = seconds(run, rounds=1)
        stack.callback(
            torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.cudnn_sdp_enabled()
        )
        torch.backends.cuda.enable_cudnn_sdp(True)
        times: list[float] = []
        # The first run with it, because it keeps its plans.
        growth = host_growth(lambda: times.append(seconds(run, rounds=1)))
    yield Figure(name="with cuDNN attention, time over without", value=times[0] / without)
    yield Figure(name="with cuDNN attention, host memory", value=growth, unit="MB more")


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
