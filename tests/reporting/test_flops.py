"""The formula agrees with what torch counts while Megatron's own modules run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_rpp import train
from megatron_rpp.config import ModelConfig
from megatron_rpp.parallel import device
from megatron_rpp.reporting.console import Console
from megatron_rpp.reporting.flops import body_flops, head_flops, step_flops
from megatron_rpp.runtime import run as runs
from megatron_rpp.runtime.inputs import load_inputs
from megatron_rpp.stages import logprobs
from tests.small_run import config_of, make_data
from tests.whole_runs import VARIED, layout

EPOCHS = 2
SETTINGS = VARIED | {
    "model__head_dim": 12,
    "train__minibatches": 1,
    "train__epochs": EPOCHS,
    "train__max_tokens_per_microbatch": 1,  # one sequence at a time: no padding
    "rollout__prompts_per_step": 2,
    "rollout__samples_per_prompt": 2,
}


def counted(function, *args, **kwargs) -> tuple[float, float, object]:
    """What torch counts in products with weights and in attention, and what `function` returns.

    torch has no count for the CPU's attention kernel, so it runs as two batched products.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = function(*args, **kwargs)
    found = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = found.pop("aten.bmm")
    return sum(found.values()), attention, result


@pytest.fixture(scope="module")
def run_and_step(tmp_path_factory):
    """(run, its row, its buffer, FLOPs of matrix products in scoring and in the whole update)."""
    data: Path = tmp_path_factory.mktemp("flops")
    make_data(data)
    config = config_of(data, data, **SETTINGS)
    with layout(config):
        run = runs.build(config, load_inputs(config), Console(False))
        update = []
        original = train.update.update_policy

        def counting(*args, **kwargs):
            products, _, result = counted(original, *args, **kwargs)
            update.append(products)
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.update, "update_policy", counting)
            patch.setattr(device, "peak_flops", lambda: 1e12)
            row, buffer = train.rl_step(run)
        scored = counted(logprobs.response_logprobs, run.policy.model, buffer, 1, temperature=1.0)
        return config, run, row, buffer, scored[:2], update[0]


def body_and_head(config, run, buffer, attention: bool) -> tuple[float, float]:
    """Forward through the layers, with or without attention, and through the projection."""
    model = config.model
    body = body_flops(model, buffer.lengths)
    if not attention:
        pairs = sum(length * (length + 1) / 2 for length in buffer.lengths.tolist())
        body -= 4 * model.layers * model.heads * model.head_dim * pairs
    return body, head_flops(model, run.inputs.vocab_size, int(buffer.response_lengths.sum()))


def test_a_forward_pass_is_what_torch_counts(run_and_step):
    config, run, _, buffer, (products, attention), _ = run_and_step
    body, head = body_and_head(config, run, buffer, attention=False)
    assert products == body + head
    # torch counts both triangles of attention.
    squares = sum(length**2 for length in buffer.lengths.tolist())
    assert attention == 4 * config.model.layers * config.model.heads * 12 * squares


def test_an_update_is_three_forward_passes(run_and_step):
    """The logits are a single chunk, so backward does not form them again."""
    config, run, _, buffer, _, update = run_and_step
    body, head = body_and_head(config, run, buffer, attention=False)
    assert update == EPOCHS * 3 * (body + head)


def test_by_hand():
    """Widths 4 and 6, 2 heads of 2 over 1 key-value head, 3 layers, 5 words."""
    model = ModelConfig(layers=3, hidden=4, ffn_hidden=6, heads=2, kv_heads=1)
    layer = 4 * 4 + 2 * (4 * 2) + 4 * 4 + 3 * (4 * 6)  # query, key and value, output, SwiGLU
    # Tokens attend to 1, 2, 3 and 1, 2 tokens: 9 pairs, for scores and for values.
    assert body_flops(model, torch.tensor([3, 2])) == 3 * (2 * layer * 5 + 2 * 2 * 4 * 9)
    assert head_flops(model, 5, 7) == 2 * 4 * 5 * 7


def test_a_step_reads_a_repeated_prompt_once(run_and_step):
    config, run, _, buffer, _, _ = run_and_step
    forward = sum(body_and_head(config, run, buffer, attention=True))
    again = buffer.prompt_lengths[::2]  # the second of two samples
    words = run.inputs.vocab_size
    expected = (1 + 1 + 1 + 3 * EPOCHS) * forward - body_flops(config.model, again)
    assert step_flops(config.model, words, buffer, epochs=EPOCHS, passes=2) == pytest.approx(
        expected
    )
    without = step_flops(config.model, words, buffer, epochs=EPOCHS, passes=1)
    assert expected - without == pytest.approx(forward)


def test_utilisation_is_that_of_the_device(run_and_step):
    """With a peak of 1e12 FLOP/s. The CPU has none, and no such tag (test_metrics.py)."""
    config, run, row, buffer, _, _ = run_and_step
    flops = step_flops(config.model, run.inputs.vocab_size, buffer, epochs=EPOCHS, passes=2)
    assert row["throughput/mfu"] == pytest.approx(flops / (row["time/step"] * 1e12))
    assert device.peak_flops() is None


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4), ("NVIDIA B200", 2250), ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362), ("NVIDIA H20", 148),
    ],
)  # fmt: skip
def test_peaks_of_the_data_sheets(name, teraflops):
    assert device.peak_flops_of(name) == teraflops * 1e12


def test_the_peak_of_another_gpu_is_not_guessed():
    assert device.peak_flops_of("Tesla V100-SXM2-16GB") is None
