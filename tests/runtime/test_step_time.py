"""The arithmetic of a step's time, against Megatron-LM's published figures and by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_rpp.config import (
    Config,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
)  # fmt: skip
from megatron_rpp.parallel import device as devices
from megatron_rpp.reporting.flops import body_flops
from megatron_rpp.runtime.assumptions import Assumptions
from megatron_rpp.runtime.machines import MACHINES
from megatron_rpp.runtime.step_time import body_flops_per_token, step_time

H100 = MACHINES["h100"]
LENGTH, VOCAB = 4096, 131072
REPLICAS = 48
# Megatron-LM's README, images/model_table.png: layers, hidden size, heads, TP, PP, sequences of a step,
# TFLOP/s of a GPU. The MFU printed there is that over the peak of 989.4 TFLOP/s: 41% to 49%.
PUBLISHED = {
    "1.7B": (24, 2048, 16, 1, 1, 192, 408.8),
    "7.1B": (30, 4096, 32, 2, 1, 192, 465.9),
    "16B": (32, 6144, 48, 4, 1, 192, 489.1),
    "32B": (48, 7168, 56, 8, 1, 192, 459.6),
    "70B": (84, 8192, 64, 8, 2, 384, 419.7),
    "119B": (92, 10240, 80, 8, 4, 768, 420.5),
    "177B": (96, 12288, 96, 8, 6, 1152, 432.8),
    "314B": (96, 16384, 128, 8, 8, 1536, 474.4),
    "462B": (112, 18432, 144, 8, 16, 3072, 459.9),
}
MEGATRON = Assumptions(
    hidden_share=0.6,  # they ran with --tp-comm-overlap; the share is the one that fits best
    row_fill=1.0, mean_prompt=1, mean_response=LENGTH - 1,
)  # fmt: skip


def pretraining(
    layers: int, hidden: int, heads: int, *, tensor: int = 1, pipeline: int = 1, sequences: int = 32
) -> Config:
    """One optimizer step of full sequences, without KL and with interleaved stages.

    SwiGLU of 8/3 h channels has the FLOPs of their GELU of 4 h.
    """
    return Config(
        model=ModelConfig(
            layers=layers, hidden=hidden, ffn_hidden=8 * hidden // 3 // 128 * 128,
            heads=heads, max_length=LENGTH, dtype="bf16",
        ),
        parallel=ParallelConfig(
            tensor=tensor, pipeline=pipeline, sequence_parallel=tensor > 1,
            virtual_pipeline=layers // pipeline if pipeline > 1 else 1,
        ),
        rollout=RolloutConfig(
            prompts_per_step=sequences, samples_per_prompt=1, max_new_tokens=LENGTH - 1
        ),
        train=TrainConfig(max_tokens_per_microbatch=LENGTH, minibatches=1, epochs=1),
    )  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_utilisation_of_h100s(name):
    """Within 3 points of MFU, by Megatron's own count of FLOPs (arXiv 2104.04473, eq. 3, without
    recomputation), which counts the whole attention matrix. The exchange between replicas was
    overlapped, so it does not count."""
    layers, hidden, heads, tensor, pipeline, sequences, teraflops = PUBLISHED[name]
    config = pretraining(
        layers, hidden, heads, tensor=tensor, pipeline=pipeline, sequences=sequences
    )
    time = step_time(config, VOCAB, replicas=REPLICAS, machine=H100, assumed=MEGATRON)
    shape = 1 + LENGTH / (6 * hidden) + VOCAB / (12 * layers * hidden)
    flops = 72 * sequences * LENGTH * layers * hidden**2 * shape
    spent = (time.parts["passes"] + time.parts["adam"]) * tensor * pipeline * REPLICAS
    found, percent = (100 * rate / H100.bf16_flops for rate in (flops / spent, teraflops * 1e12))
    print(f"{name}: {found:.1f}% of {percent:.1f}%")
    assert found == pytest.approx(percent, abs=3)


SMALL = pretraining(8, 1024, 8)


def test_flops_are_those_of_the_metrics():
    lengths = torch.tensor([100, 100])
    assert body_flops_per_token(SMALL.model, 100) * 200 == body_flops(SMALL.model, lengths)
    assert devices.peak_flops_of("NVIDIA H100 80GB HBM3") == H100.bf16_flops


def seconds(config: Config = SMALL, **settings):
    return step_time(
        config, VOCAB, replicas=settings.pop("replicas", 1), machine=H100,
        assumed=replace(MEGATRON, **settings),
    )  # fmt: skip


def test_efficiency_divides_the_time_of_matrix_products():
    """Half the efficiency takes twice as long, but for the memory traffic."""
    fast, slow = (seconds(efficiency=share).parts["passes"] for share in (0.64, 0.32))
    traffic = 2 * fast - slow  # what does not depend on the efficiency
    assert 0 < traffic < fast


def test_decoding_by_hand():
    """One sequence: all weights of the layers and the head are read for each token."""
    config = replace(SMALL, rollout=replace(SMALL.rollout, prompts_per_step=1, max_new_tokens=1000))
    layer = 4 * 1024**2 + 3 * 1024 * config.model.ffn_hidden + 2 * 1024
    weights = 2 * (8 * layer + VOCAB * 1024)
    found = seconds(config, host_ms_per_layer=0, mean_prompt=1, mean_response=1).parts["token"]
    assert found == pytest.approx(weights / (H100.bandwidth * 0.7), rel=1e-3)
    launched = seconds(config, host_ms_per_layer=2.0)
    assert launched.parts["token"] == 8 * 2e-3
    assert launched.rollout == pytest.approx(1000 * 16e-3, rel=0.01)


def test_the_bubble():
    """Two stages, two micro-batches: (2 + 1) / 2 of the time without a bubble; interleaved, half."""
    none = {"efficiency": 1e-4, "half_width": 0.0, "host_ms_per_layer": 0.0}  # nothing else counts
    config = replace(
        SMALL,
        rollout=replace(SMALL.rollout, prompts_per_step=2),
        model=replace(SMALL.model, layers=80),
    )
    one = seconds(config, **none).parts["passes"]
    two = replace(config, parallel=ParallelConfig(pipeline=2))
    four = replace(config, parallel=ParallelConfig(pipeline=2, virtual_pipeline=2))
    assert seconds(two, **none).parts["passes"] / (one / 2) == pytest.approx(1.5, rel=0.2)
    saved = seconds(two, **none).parts["passes"] - seconds(four, **none).parts["passes"]
    assert saved / (one / 2) == pytest.approx(0.25, rel=0.2)


def test_recomputation_and_offload_cost_time():
    recomputed = [
        seconds(replace(SMALL, train=replace(SMALL.train, recompute=kind))).update
        for kind in ("none", "selective", "full")
    ]
    assert recomputed == sorted(set(recomputed)) and recomputed[2] < 4 / 3 * recomputed[0]
    offloaded = replace(SMALL, optimizer=OptimizerConfig(offload=True))
    assert seconds(offloaded).parts["adam"] > 10 * seconds().parts["adam"]
