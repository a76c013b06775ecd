"""The loss, entropy and clip share of a real update equal the oracle's, for both aggregations and
with every term of the loss. The oracle is NumPy fp64, from the model's hidden states on.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_rpp import train
from megatron_rpp.model import pipeline
from megatron_rpp.model.language_model import chunks
from megatron_rpp.reporting.console import Console
from megatron_rpp.runtime import run as runs
from megatron_rpp.runtime.inputs import load_inputs
from megatron_rpp.stages import logprobs, update
from tests.algorithms import oracle
from tests.small_run import config_of, make_data
from tests.whole_runs import VARIED, layout

TEMPERATURE, CLIP_LOW, CLIP_HIGH, DUAL, ENTROPY, KL = 0.8, 0.2, 0.28, 1.5, 0.1, 0.3
SETTINGS = VARIED | {
    "train__minibatches": 1,
    "train__epochs": 1,
    "optimizer__lr": 1e-9,  # the policy that made the buffer is still the one that is updated
    "rollout__temperature": TEMPERATURE,
    "algorithm__name": "rloo",
    "algorithm__clip_low": CLIP_LOW,
    "algorithm__clip_high": CLIP_HIGH,
    "algorithm__dual_clip": DUAL,
    "algorithm__entropy_coef": ENTROPY,
    "algorithm__kl_loss_coef": KL,
    "algorithm__rollout_correction": "cap",
}


def vocabulary_logits(run, buffer) -> tuple[np.ndarray, np.ndarray]:
    """Returns fp64 logits [R, vocabulary] / temperature and the tokens [R] of all responses."""
    model = run.policy.model
    weight = chunks(model)[-1].output_weight[: run.inputs.vocab_size].detach().double()
    logits = np.zeros((len(buffer.mask), len(weight)))
    targets = np.zeros(len(buffer.mask), dtype=int)

    def head(batch, hidden):
        column = batch.column.numpy()
        logits[column] = (hidden[batch.rows, 0].double() @ weight.T / TEMPERATURE).numpy()
        targets[column] = batch.targets.numpy()

    pipeline.forward(
        model,
        logprobs.make_micro_batches(model, buffer, list(range(len(buffer))), max_tokens=64),
        head,
    )
    return logits, targets


def perturb(buffer) -> None:
    """Changes the old log-probs, and makes holes in the mask with rubbish under them."""
    random = torch.Generator().manual_seed(5)

    def noise() -> torch.Tensor:
        return torch.randn(len(buffer.mask), generator=random)

    buffer.old_logprobs += noise() / 2
    buffer.ref_logprobs += noise() / 2
    buffer.advantages = noise()
    buffer.rollout_weights = noise().exp().clamp(max=2)
    buffer.mask &= noise() > -1
    buffer.mask[: int(buffer.response_lengths[0])] = False  # a whole response
    for column in (buffer.old_logprobs, buffer.ref_logprobs, buffer.advantages):
        column[~buffer.mask] = torch.nan


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """Returns (updates by aggregation, the buffer that they trained on, logits, tokens)."""
    data = tmp_path_factory.mktemp("data")
    make_data(data)
    config = config_of(data, data, **SETTINGS)
    with layout(config):
        run = runs.build(config, load_inputs(config), Console(False))
        _, buffer = train.rl_step(run)
        perturb(buffer)
        logits, targets = vocabulary_logits(run, buffer)
        updates = {}
        for kind in ("token_mean", "sequence_mean"):
            settings = config_of(data, data, **SETTINGS, algorithm__aggregation=kind)
            updates[kind] = update.update_policy(
                run.policy, buffer, settings.algorithm, train=settings.train,
                rollout=settings.rollout, key=run.step_key, state=run.state,
                progress=update.UpdateProgress(), safe_point=lambda: None,
            )  # fmt: skip
    return updates, buffer, logits, targets


def padded(buffer, values: np.ndarray) -> np.ndarray:
    return buffer.padded(torch.from_numpy(values)).numpy()


@pytest.mark.parametrize("kind", ["token_mean", "sequence_mean"])
def test_update_is_that_of_the_oracle(step, kind):
    updates, buffer, logits, targets = step
    entropy = oracle.entropy(logits)
    logprobs = np.array([row[token] - np.log(np.exp(row).sum())
                         for row, token in zip(logits, targets)])  # fmt: skip
    mask = buffer.mask.numpy()
    old, reference, advantages, weights = (
        np.where(mask, column.double().numpy(), 0.0)
        for column in (
            buffer.old_logprobs, buffer.ref_logprobs, buffer.advantages, buffer.rollout_weights
        )
    )  # fmt: skip
    policy = oracle.policy_loss(logprobs, old, advantages, CLIP_LOW, CLIP_HIGH, DUAL)
    per_token = policy * weights - ENTROPY * entropy + KL * oracle.kl(logprobs, reference, "k2")
    total, count = oracle.aggregate(padded(buffer, per_token), padded(buffer, mask), kind)
    assert updates[kind].loss == pytest.approx(total / count, rel=2e-6)
    assert updates[kind].entropy == pytest.approx(entropy[mask].mean(), rel=1e-6)
    ratio = np.exp(logprobs - old)
    clipped = np.where(advantages > 0, ratio > 1 + CLIP_HIGH, ratio < 1 - CLIP_LOW)
    assert updates[kind].clip_fraction == pytest.approx(clipped[mask].mean())
    assert updates[kind].ratio_max == pytest.approx(ratio[mask].max(), rel=1e-5)
    # Every term of the loss has an effect here.
    assert 0.2 < clipped[mask].mean() < 0.8 and not mask.all() and count > 10
    assert np.any((ratio > DUAL) & (advantages < 0) & mask)


def test_the_aggregations_differ(step):
    updates = step[0]
    assert abs(updates["token_mean"].loss - updates["sequence_mean"].loss) > 1e-3
