"""Messages of interleaved pipeline stages must not be batched (`model.build.transformer_config`).

With two stages, the previous and the next stage are the same rank, and Megatron's interleaved
schedule sends to both at once. If the messages are batched, the receiver cannot tell them apart and
takes activations for gradients: the gradient norm is wrong, without an error. Two real ranks compute
one gradient both ways.
"""

from __future__ import annotations

import os

import pytest
import torch

from megatron_rpp.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rpp.model import build
from megatron_rpp.model.language_model import chunks
from megatron_rpp.model.optimizer import build_optimizer
from megatron_rpp.model.trained_model import TrainedModel
from megatron_rpp.parallel import groups
from megatron_rpp.stages.logprobs import make_micro_batches, token_logprobs
from megatron_rpp.stages.minibatches import optimizer_step
from tests.distributed import run_ranks
from tests.rollout.test_buffer import make_buffer

MODEL = ModelConfig(layers=4, hidden=32, ffn_hidden=64, heads=4, max_length=32, init_std=0.2)
LAYOUTS = {
    "one stage": ParallelConfig(),
    "two stages": ParallelConfig(pipeline=2),
    "interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "interleaved, batched": ParallelConfig(pipeline=2, virtual_pipeline=2),
}


def gradient_norm(layout):
    """Gradient norm of the mean log-prob of eight responses in four micro-batches."""
    parallel = LAYOUTS[layout]
    groups.start(**parallel.sizes(), seed=1)
    model = build.wrap_for_training(build.build_model(MODEL, parallel, vocab_size=50, seed=3), True)
    if layout == "interleaved, batched":
        for chunk in chunks(model):
            chunk.config.overlap_p2p_comm, chunk.config.batch_p2p_comm = False, True
    policy = TrainedModel(model, *build_optimizer(model, OptimizerConfig(), bf16=False))
    samples = [([1 + i, 2], [3 + (i + j) % 40 for j in range(6)]) for i in range(8)]
    buffer = make_buffer(samples if groups.data_rank() == 0 else [])

    def loss(batch, hidden):
        logprobs, _ = token_logprobs(model, batch, hidden, temperature=1.0)
        total, count = -logprobs.sum(), torch.tensor(len(logprobs), dtype=torch.int)
        return total, count, total.detach()

    batches = make_micro_batches(model, buffer, list(range(len(buffer))), max_tokens=16)
    norm = optimizer_step(policy, batches, loss).grad_norm
    groups.destroy()
    return norm


def every_layout(rank):
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return {layout: gradient_norm(layout) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def norms(tmp_path_factory):
    return run_ranks(every_layout, 2, tmp_path_factory.mktemp("ranks"))[0]


@pytest.mark.parametrize("layout", ["two stages", "interleaved"])
def test_the_gradient_is_that_of_one_stage(norms, layout):
    assert norms[layout] == pytest.approx(norms["one stage"], rel=1e-5)


def test_batched_messages_of_two_interleaved_stages_cross(norms):
    """If this fails, Megatron or torch tell them apart, and `batch_p2p_comm` may be used again."""
    assert abs(norms["interleaved, batched"] / norms["one stage"] - 1) > 0.01
