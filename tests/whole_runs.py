"""Whole runs of `train.py` for tests, and the comparison of two runs.

Real ranks, models, generation and checkpoints; only the sizes are small (small_run.py).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from megatron_rpp import train
from megatron_rpp.checkpoint import store
from megatron_rpp.checkpoint.weights import load_model
from megatron_rpp.config import Config, ParallelConfig
from megatron_rpp.model import build
from megatron_rpp.model.build import build_model
from megatron_rpp.model.language_model import LanguageModel
from megatron_rpp.model.scalar_model import ScalarModel
from megatron_rpp.parallel import groups
from megatron_rpp.runtime.inputs import load_inputs
from tests.small_run import config_of, make_data

from megatron.core.distributed import DistributedDataParallelConfig

# Measurements differ between any two runs; the last is itself the rounding between two kernels.
MEASURED = ("time/", "throughput/", "memory/", "rollout/logprob_abs_diff")
TOLERANCE, FLOOR = 1e-5, 1e-6
# For runs that must learn: exact_match gives an untrained model nothing but zeros.
# In this process: a worker would import all of this module.
VARIED = {"reward__functions": "[tests.whole_runs:varied]", "reward__workers": 0}


def varied(prompts, responses, labels, metadata) -> list[float]:
    """A reward of 0, 0.1 .. 0.9 that depends on every character of the response."""
    return [sum(map(ord, response)) % 10 / 10 for response in responses]


@contextmanager
def layout(config: Config) -> Iterator[None]:
    """Starts the groups of `config` over the existing ranks; without ranks, over a world of one.

    Each rank computes on one thread, because the tests share the machine.
    """
    alone = not dist.is_initialized()
    os.environ["LOCAL_WORLD_SIZE"] = str(len(os.sched_getaffinity(0)))
    groups.start(
        **config.parallel.sizes(), seed=config.seed, deterministic=config.train.deterministic
    )
    del os.environ["LOCAL_WORLD_SIZE"]
    try:
        yield
    finally:
        groups.stop() if alone else groups.destroy()


@contextmanager
def small_buckets(parameters: int = 3000) -> Iterator[None]:
    """Communication that overlaps comes in buckets of about so many parameters. Megatron would make
    a single one of a small model, so nothing would overlap."""
    with pytest.MonkeyPatch.context() as patch:
        config = partial(DistributedDataParallelConfig, bucket_size=parameters)
        patch.setattr(build, "DistributedDataParallelConfig", config)
        yield


def train_run(data: Path, run: Path, **settings) -> Config:
    """Trains by config_of(data, run, **settings) with the reward `varied`, in this process."""
    config = config_of(data, run, **(VARIED | settings))
    inputs = load_inputs(config)
    with layout(config):
        train.train(config, inputs)
    return config


def with_whole_run(base: Path, **settings) -> Path:
    """Makes the data and an uninterrupted run "whole" in `base`; returns `base`."""
    make_data(base)
    train_run(base, base / "whole", **settings)
    return base


def run_program(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Runs a program's `main` in a world of one, and leaves that world even if `main` raises."""
    try:
        main(argv)
    finally:
        if dist.is_initialized():
            groups.stop()


def rows(path: Path) -> list[dict]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(config: Config, path: str | Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint of any layout, read by one rank; those of a critic begin with
    "critic."."""
    alone = replace(config, parallel=ParallelConfig())
    kinds = {"": LanguageModel} | ({"critic.": ScalarModel} if config.algorithm.has_critic else {})
    found = {}
    with layout(alone):
        vocab_size = load_inputs(alone).vocab_size
        for prefix, kind in kinds.items():
            # No run has this seed, so weights that the checkpoint does not fill would be noticed.
            model = build_model(
                alone.model, alone.parallel, vocab_size=vocab_size, seed=99, kind=kind
            )
            load_model(model, store.require(path), prefix)
            for name, value in model[0].named_parameters():
                found[prefix + name] = value.detach().clone()
    return found


def same_bits(ours: Path, theirs: Path, config: Config, step: int, first: int = 1) -> None:
    """Checks that two runs have equal weights at `step` and equal rows from step `first` on, except
    times and memory."""
    measured = ("time/", "throughput/", "memory/")
    mine, other = (
        [
            {tag: value for tag, value in row.items() if not tag.startswith(measured)}
            for row in rows(run / "logs/metrics.jsonl")
            if row["step"] >= first
        ]
        for run in (ours, theirs)
    )
    assert mine == other
    found = [weights(config, run / f"checkpoints/iter_{step:07d}") for run in (ours, theirs)]
    assert compare_weights(*found).size == 0


class Deviation(NamedTuple):
    """The largest relative deviation, and where it is."""

    size: float
    where: str


def relative(ours: float, theirs: float) -> float:
    """Their distance relative to the larger one; 0 within FLOOR."""
    difference = abs(ours - theirs)
    assert math.isfinite(difference), f"{ours} against {theirs}"
    return 0.0 if difference <= FLOOR else difference / max(abs(ours), abs(theirs))


def compare_rows(ours: list[dict], theirs: list[dict]) -> Deviation:
    """The deviation over all tags of all steps, except those in MEASURED."""
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    return max(
        Deviation(relative(mine[tag], other[tag]), f"{tag} of step {mine['step']}")
        for mine, other in zip(ours, theirs)
        for tag in mine
        if not tag.startswith(MEASURED)
    )


def compare_weights(ours: dict, theirs: dict) -> Deviation:
    """The deviation over all tensors, relative to the largest element of each."""
    assert ours.keys() == theirs.keys()
    return max(
        Deviation(float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()), name)
        for name in ours
    )
