"""What the device does in decoding steps and in an update: launches, gaps, utilisation."""

from __future__ import annotations

from collections.abc import Iterator

from acceptance import profiling, work
from acceptance.figures import Figure
from acceptance.measure import on_gpu, seconds
from acceptance.scale import Scale
from megatron_rpp.config import ModelConfig
from megatron_rpp.parallel import device as devices
from megatron_rpp.reporting.flops import body_flops, head_flops
from megatron_rpp.rollout.buffer import RolloutBuffer


def profile(scale: Scale) -> Iterator[Figure]:
    yield from _decoding(scale)
    yield from _update(scale)


def _decoding(scale: Scale) -> Iterator[Figure]:
    """The steps include their share of reading the prompts."""
    model, steps, limits = work.stage(scale.wide), scale.profiled_tokens, scale.speed

    def run() -> None:
        work.generate(model, prompt=scale.prompt, batch=scale.batch, tokens=steps)

    run()
    found = profiling.timeline(run)
    yield from on_gpu(
        "decoding, kernels",
        lambda: _timeline("decoding", found, steps, most=(limits.launches, limits.decode_idle)),
    )


def _update(scale: Scale) -> Iterator[Figure]:
    policy, samples = work.policy(scale.wide), work.buffer(scale.wide, scale.row)
    samples.old_logprobs = work.score(policy, samples)

    def run() -> None:
        work.update(policy, samples)

    run()  # the first update allocates Adam's state and compiles
    passed, flops = seconds(run), _flops(scale.wide, samples)
    yield Figure(name="update", value=passed * 1e3, unit="ms")
    yield Figure(name="update, achieved", value=flops / passed / 1e12, unit="TFLOP/s")
    yield from on_gpu("update, MFU", lambda: _utilisation(flops / passed, scale.speed.mfu))
    found, idle = profiling.timeline(run), scale.speed.update_idle
    yield from on_gpu("update, kernels", lambda: _timeline("update", found, 1, most=(None, idle)))


def _utilisation(achieved: float, least: float | None) -> Iterator[Figure]:
    peak = devices.peak_flops()
    if peak is None:
        yield Figure(name="update, MFU", skipped="the peak of this GPU is not known")
        return
    yield Figure(name="update, MFU", value=achieved / peak, at_least=least)


def _timeline(
    name: str,
    found: profiling.Timeline,
    steps: int,
    *,
    most: tuple[float | None, float | None],
) -> Iterator[Figure]:
    """most: kernels a step, share of idle time."""
    count = found.kernels / steps
    yield Figure(name=f"{name}, kernels", value=count, unit="a step", at_most=most[0])
    yield Figure(name=f"{name}, copies", value=found.copies / steps, unit="a step")
    yield Figure(name=f"{name}, span", value=found.span / steps / 1e3, unit="ms a step")
    yield Figure(name=f"{name}, longest gap", value=found.longest_gap / 1e3, unit="ms")
    yield Figure(name=f"{name}, idle", value=found.idle, unit="of 1", at_most=most[1])


def _flops(model: ModelConfig, samples: RolloutBuffer) -> float:
    """Of forward and backward, by the rules of reporting/flops.py."""
    assert model.vocab_size is not None
    head = head_flops(model, model.vocab_size, int(samples.response_lengths.sum()))
    return 3 * (body_flops(model, samples.lengths) + head)
