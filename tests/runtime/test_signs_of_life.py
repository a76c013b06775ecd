"""Start-up gives a sign of life for each tensor and file, so that a large model is not taken for a hang;
so does each micro-batch of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_rpp import train
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.runtime.inputs import load_inputs
from tests.small_run import config_of
from tests.whole_runs import VARIED, layout, with_whole_run

SETTINGS = {"train__steps": 1, "model__layers": 2, "train__max_tokens_per_microbatch": 64}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the signs of life in the context, by phase."""
    signs: Counter[str] = Counter()

    def count() -> None:
        signs[heartbeat.current.name] += 1

    heartbeat.current.followers.append(count)
    try:
        yield signs
    finally:
        heartbeat.current.followers.remove(count)


def test_a_run_and_its_resume(tmp_path):
    with counted() as signs:
        with_whole_run(tmp_path, **SETTINGS)
    config = config_of(tmp_path, tmp_path / "whole", **(VARIED | SETTINGS))
    files = len(list((tmp_path / "whole/checkpoints/iter_0000001").iterdir()))
    tensors = 2 * 7 + 3  # of a layer; embedding, last norm, output
    assert signs["build a model"] >= tensors
    assert signs["rollout"] >= config.rollout.max_new_tokens
    assert signs["logprobs"] > 2 * 5 and signs["update"] > 4 * 2, "one of each micro-batch"
    with counted() as signs, layout(config):
        train.train(config, load_inputs(config), dry_run=True)
    assert signs["check a checkpoint"] >= files - 1  # the manifest has no entry
    assert signs["resume"] >= 3 * tensors  # weights and two moments
