"""The functions of verl and TRL give the same numbers, except for the differences named here.

Skipped if a peer is not installed, as in CI. Run it in a virtual environment that includes this
project's packages, so that torch stays the same:

    python3.11 -m venv /tmp/peers
    realpath .venv/lib/python3.11/site-packages > /tmp/peers/lib/python3.11/site-packages/ours.pth
    /tmp/peers/bin/pip install --no-deps verl==0.9.1 ray msgpack requests urllib3 certifi \
        charset-normalizer idna jsonschema attrs referencing rpds-py jsonschema_specifications \
        tensordict pyvers cloudpickle omegaconf codetiming orjson \
        trl==1.16.0 accelerate datasets dill multiprocess pandas pyarrow xxhash python-dateutil
    rm -r /tmp/peers/lib/python3.11/site-packages/tests   # verl's wheel brings its own
    /tmp/peers/bin/python -m pytest tests/algorithms/test_peers.py

Differences, each asserted:
    verl whitens with the sample variance plus 1e-8 (ours: the population variance, at least 1e-8),
    a factor of sqrt(1 - 1/n). It does not change the score of a prompt with one sample (ours: 0,
    the score minus its mean). It bounds k3 at 10 and always applies its dual clip (3.0).
    TRL adds the KL as k3 (ours: k2, whose gradient is that of the KL), so beta is 0 here. Its
    sequence mean counts empty responses.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algorithms import (
    KL_KINDS,
    adapted_kl_factor,
    correction_weights,
    group_baseline,
    importance_ratio,
    kl_estimate,
    policy_loss,
    token_rewards,
)
from megatron_rpp.algorithms.advantages import compute_advantages
from tests.algorithms.strategies import aggregate, batches, quick

NAMES = {"token_mean": ("token-mean", "bnpo"), "sequence_mean": ("seq-mean-token-mean", "grpo")}


@pytest.fixture(scope="module")
def verl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("verl.trainer.ppo.core_algos")


@pytest.fixture(scope="module")
def trl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer


def tensors(batch):
    mask, *values = batch
    return torch.tensor(mask), *(torch.tensor(x) for x in values)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", KL_KINDS)
def test_verl_kl(verl, kind):
    logprobs, reference = torch.linspace(-2, 0, 9).double(), torch.linspace(-0.5, -2.1, 9).double()
    close(kl_estimate(logprobs, reference, kind), verl.kl_penalty(logprobs, reference, kind))
    far = kl_estimate(torch.zeros(1), torch.full((1,), 5.0), "k3")
    assert far > 100 and verl.kl_penalty(torch.zeros(1), torch.full((1,), 5.0), "k3") == 10


def reinforce_batch(seed=3):
    """Returns (scores, kl, mask with gaps, ids of uneven groups, one with a single sample)."""
    random = np.random.default_rng(seed)
    mask = torch.tensor(random.random((9, 11)) < 0.7)
    mask[:, 0] = True
    scores, kl = (torch.tensor(random.normal(size=size)) for size in (9, (9, 11)))
    return scores, kl, mask, torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])


def at_last_token(scores, mask):
    return token_rewards(scores, None, mask, 0.0)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_verl_reinforce_plus_plus(verl, gamma):
    scores, kl, mask, ids = reinforce_batch()
    ours, returns, stats = compute_advantages(
        "reinforce++", scores, mask, group_ids=ids, kl=kl, kl_coef=0.1, gamma=gamma
    )
    rewards = verl.compute_rewards(at_last_token(scores, mask), kl, torch.zeros_like(kl), 0.1)
    theirs, their_returns = verl.compute_reinforce_plus_plus_outcome_advantage(
        rewards, mask.double(), SimpleNamespace(gamma=gamma)
    )
    close(returns, their_returns)
    close(ours * math.sqrt(1 - 1 / stats.count), theirs)


def test_verl_baseline(verl):
    scores, _, mask, ids = reinforce_batch()
    scores[ids == 3] = 0.0  # the prompt of one sample
    ours, _, stats = compute_advantages("reinforce++_baseline", scores, mask, group_ids=ids)
    theirs, _ = verl.compute_reinforce_plus_plus_baseline_outcome_advantage(
        at_last_token(scores, mask), mask.double(), ids.tolist()
    )
    close(ours * math.sqrt(1 - 1 / stats.count), theirs)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_verl_groups(verl, kind):
    scores, _, mask, ids = reinforce_batch()
    ours = compute_advantages(kind, scores, mask, group_ids=ids)[0]
    function = getattr(verl, f"compute_{kind}_outcome_advantage")
    close(ours, function(at_last_token(scores, mask), mask.double(), ids.numpy())[0])


def test_verl_leaves_a_single_sample_as_it_is(verl):
    one, mask, ids = torch.tensor([0.7]), torch.ones(1, 1, dtype=torch.bool), torch.tensor([0])
    assert group_baseline(one, ids, "mean") == 0
    assert group_baseline(one, ids, "rloo") == torch.tensor(0.7)
    theirs = verl.compute_rloo_outcome_advantage(at_last_token(one, mask), mask, ids.numpy())[0]
    assert theirs == torch.tensor(0.7)


@pytest.mark.parametrize("aggregation", NAMES)
@pytest.mark.parametrize("weighted", [False, True])
def test_verl_loss_and_gradient(verl, aggregation, weighted):
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio_low=0.2,
        clip_ratio_high=0.28, clip_ratio_c=3.0,
    )  # fmt: skip

    @quick
    @given(batches(4))
    def check(batch):
        mask, logprobs, old, advantage, behaviour = tensors(batch)
        mask[0, 0] = True
        weights = torch.ones_like(old)
        if weighted:
            weights = correction_weights(importance_ratio(old, behaviour), "cap", 2.0)
        ours, theirs = (logprobs.clone().requires_grad_() for _ in range(2))
        per_token = policy_loss(ours, old, advantage, 0.2, 0.28, 3.0) * weights
        total, count = aggregate(per_token, mask, aggregation)
        (total / count).backward()
        loss, _ = verl.compute_policy_loss_vanilla(
            old, theirs, advantage, mask.double(), NAMES[aggregation][0], config, weights
        )
        loss.backward()
        close((total / count).detach(), loss.detach())
        smooth = ~on_a_kink(logprobs - old, advantage)
        close(ours.grad[smooth], theirs.grad[smooth])

    check()


def on_a_kink(log_ratio, advantage):
    """Marks tokens with two valid gradients: the ratio is on a bound, or the advantage is 0."""
    bounds = torch.tensor([0.8, 1.28, 3.0], dtype=torch.float64).log()
    return ((log_ratio[..., None] - bounds).abs() < 1e-6).any(-1) | (advantage == 0)


@quick
@given(st.floats(-1, 5), st.integers(1, 100))
def test_verl_controller(kl, samples):
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    theirs = core.AdaptiveKLController(0.3, 0.1, 100)
    theirs.update(kl, samples)
    assert 0.3 * adapted_kl_factor(
        1.0, kl, target=0.1, samples=samples, horizon=100
    ) == pytest.approx(theirs.value)


def trl_loss(trl, logprobs, old, advantage, mask, kind):
    """Calls TRL's `_compute_loss` with a stand-in for its trainer that has only what it reads.

    Our log-probs take the place of the model's.
    """
    accelerator = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs, -logprobs, None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=0.0, loss_type=kind, epsilon_low=0.2,
        epsilon_high=0.28, args=SimpleNamespace(delta=3.0), use_vllm=False,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False, accelerator=accelerator,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids,
        "completion_mask": mask.double(), "advantages": advantage, "old_per_token_logps": old,
    }  # fmt: skip
    return trl._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("aggregation", NAMES)
def test_trl_loss_and_gradient(trl, aggregation):
    @quick
    @given(batches(3))
    def check(batch):
        mask, logprobs, old, advantage = tensors(batch)
        mask[:, 0] = True
        ours, theirs = (logprobs.clone().requires_grad_() for _ in range(2))
        total, count = aggregate(
            policy_loss(ours, old, advantage, 0.2, 0.28, 3.0), mask, aggregation
        )
        (total / count).backward()
        loss = trl_loss(trl, theirs, old, advantage, mask, NAMES[aggregation][1])
        loss.backward()
        close((total / count).detach(), loss.detach())
        smooth = ~on_a_kink(logprobs - old, advantage)
        close(ours.grad[smooth], theirs.grad[smooth])

    check()


def test_trl_counts_empty_responses(trl):
    mask = torch.tensor([[True], [False]])
    logprobs, advantage = torch.zeros(2, 1), torch.ones(2, 1)
    loss = trl_loss(trl, logprobs, logprobs, advantage, mask, "grpo")
    total, count = aggregate(-advantage, mask, "sequence_mean")
    assert loss == -0.5 and total / count == -1.0
