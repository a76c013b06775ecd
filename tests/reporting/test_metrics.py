"""The numbers of a step are what their names say, and both logs hold all of them.

The values are computed again from the step's rollout buffer by plain loops, by the formulas of
arXiv 2501.03262 and not with the functions of the package.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rpp import train
from megatron_rpp.reporting.console import Console
from megatron_rpp.runtime.inputs import load_inputs
from megatron_rpp.runtime.run import build
from tests.small_run import config_of, make_data
from tests.whole_runs import layout, rows, train_run

TAGS = {
    "reward/mean", "reward/std", "reward/timeouts", "reward/cut", "reward/zero_variance_share",
    "reward/clipped_share", "reward/shaped_mean", "reward/shaped_std", "reward/shaped_min", "reward/shaped_max",
    "kl/k1", "kl/k2", "kl/k3", "kl/coef",
    "policy/loss", "policy/clip_fraction", "policy/entropy", "policy/grad_norm",
    "policy/ratio_max", "policy/approx_kl", "policy/learning_rate", "policy/skipped_updates",
    "advantage/count", "advantage/mean", "advantage/var",
    "response/length_mean", "response/truncated_share", "rollout/logprob_abs_diff",
    "rollout/logprob_abs_diff_max", "rollout/ess", "rollout/correction_clipped_share", "rollout/staleness",
    "time/rollout", "time/reward", "time/score", "time/update", "time/checkpoint", "time/step",
    "throughput/tokens_per_second", "throughput/generated_tokens_per_second", "memory/peak_gb",
}  # fmt: skip
OF_EVALUATIONS = {"eval/accuracy", "eval/reward"}
KL_COEF, LR, EVALUATED = 0.05, 1e-3, [0, 2, 3]
SCALE, CLIP = 0.5, 0.75  # of the scores 0, 1, 2, 3 that there are
SETTINGS = {
    # Groups of two, so that some have equal scores.
    "rollout__prompts_per_step": 6,
    "rollout__samples_per_prompt": 2,
    "reward__functions": "[tests.reporting.test_metrics:short, exact_match]",
    "reward__workers": 0,
    "reward__weights": "[2.0, 1.0]",
    "reward__scale": SCALE,
    "reward__clip": CLIP,
    "algorithm__kl_coef": KL_COEF,
    "train__steps": 3,
    "train__minibatches": 3,
    "train__epochs": 1,
    "optimizer__lr": LR,
    "evaluation__interval": 2,
}


def short(prompts, responses, labels, metadata) -> list[float]:
    """1 for a response of at most 6 characters, else 0."""
    return [float(len(response) <= 6) for response in responses]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def steps(data, tmp_path_factory) -> list[tuple]:
    """(row, buffer) of two steps; in the second the policy differs from the reference."""
    config = config_of(data, tmp_path_factory.mktemp("steps"), **SETTINGS)
    inputs = load_inputs(config)
    with layout(config):
        run = build(config, inputs, Console(False))
        first = train.rl_step(run)
        run.advance(6)
        return [first, train.rl_step(run)]


@pytest.fixture(scope="module")
def logs(data, tmp_path_factory) -> Path:
    """The log directory of a whole run of three steps."""
    run = tmp_path_factory.mktemp("run")
    train_run(data, run, **SETTINGS)
    return run / "logs"


@pytest.fixture(scope="module")
def events(logs) -> EventAccumulator:
    everything = dict.fromkeys(("scalars", "histograms", "tensors"), 0)
    return EventAccumulator(str(logs), size_guidance=everything).Reload()


def mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def variance(values) -> float:
    center = mean(values)
    return mean((value - center) ** 2 for value in values)


def by_sample(buffer, column) -> list[list[float]]:
    """A column of the buffer's response tokens, cut into its samples."""
    values, start, samples = column.double().tolist(), 0, []
    for length in buffer.response_lengths.tolist():
        samples.append(values[start : start + length])
        start += length
    assert start == len(values)
    return samples


@pytest.mark.parametrize("step", [0, 1])
def test_reward(steps, step):
    row, buffer = steps[step]
    scores = buffer.scores.double().tolist()
    assert row["reward/mean"] == pytest.approx(mean(scores)) and 0 < mean(scores) < 3
    assert row["reward/std"] == pytest.approx(math.sqrt(variance(scores)))
    parts = row["reward/tests.reporting.test_metrics:short"], row["reward/exact_match"]
    assert row["reward/mean"] == pytest.approx(2 * parts[0] + parts[1])


def shaped(buffer) -> list[float]:
    return [min(SCALE * score, CLIP) for score in buffer.scores.double().tolist()]


@pytest.mark.parametrize("step", [0, 1])
def test_shaped_reward(steps, step):
    row, buffer = steps[step]
    scores = shaped(buffer)
    assert row["reward/shaped_mean"] == pytest.approx(mean(scores))
    assert row["reward/shaped_std"] == pytest.approx(math.sqrt(variance(scores)))
    assert (row["reward/shaped_min"], row["reward/shaped_max"]) == (min(scores), max(scores))
    share = mean(SCALE * score > CLIP for score in buffer.scores.tolist())
    assert row["reward/clipped_share"] == pytest.approx(share) and 0 < share < 1


@pytest.mark.parametrize("step", [0, 1])
def test_zero_variance_share(steps, step):
    row, buffer = steps[step]
    of_group = defaultdict(set)
    for group, score in zip(buffer.group_ids.tolist(), buffer.scores.tolist()):
        of_group[group].add(score)
    share = mean(len(scores) == 1 for scores in of_group.values())
    assert row["reward/zero_variance_share"] == pytest.approx(share)
    assert len(of_group) == 6 and 0 < share < 1


@pytest.mark.parametrize("step", [0, 1])
def test_response(steps, step, data):
    row, buffer = steps[step]
    eos = load_inputs(config_of(data, data)).tokenizer.eos_id
    responses = [buffer.response(index) for index in range(len(buffer))]
    assert row["response/length_mean"] == pytest.approx(mean(map(len, responses)))
    assert row["response/truncated_share"] == pytest.approx(mean(r[-1] != eos for r in responses))
    assert 0 < row["response/truncated_share"] < 1
    assert all(len(r) <= 6 and eos not in r[:-1] for r in responses)


@pytest.mark.parametrize("step", [0, 1])
def test_kl_of_the_policy_against_the_reference(steps, step):
    row, buffer = steps[step]
    k1 = (buffer.old_logprobs.double() - buffer.ref_logprobs.double()).tolist()
    assert row["kl/k1"] == pytest.approx(mean(k1), abs=1e-7)
    assert row["kl/k2"] == pytest.approx(mean(k * k / 2 for k in k1), rel=1e-5)
    assert row["kl/k3"] == pytest.approx(mean(math.exp(-k) - 1 + k for k in k1), rel=1e-4)
    assert row["kl/coef"] == KL_COEF
    if step == 0:
        assert row["kl/k1"] == row["kl/k2"] == row["kl/k3"] == 0
    else:
        assert row["kl/k2"] > 0 and row["kl/k3"] > 0


@pytest.mark.parametrize("step", [0, 1])
def test_advantage_before_normalisation(steps, step):
    """G_t = R - beta * (k1_t + .. + k1_T), of every response token."""
    row, buffer = steps[step]
    k1 = by_sample(buffer, buffer.old_logprobs.double() - buffer.ref_logprobs.double())
    returns = [
        score - KL_COEF * math.fsum(kl[position:])
        for score, kl in zip(shaped(buffer), k1)
        for position in range(len(kl))
    ]
    assert row["advantage/count"] == len(returns)
    assert row["advantage/mean"] == pytest.approx(mean(returns), rel=1e-5)
    assert row["advantage/var"] == pytest.approx(variance(returns), rel=1e-5)
    scale = math.sqrt(variance(returns))
    normalised = [(value - mean(returns)) / scale for value in returns]
    assert buffer.advantages.tolist() == pytest.approx(normalised, abs=1e-5)


def test_update(steps):
    (first, buffer), (second, _) = steps
    assert first["policy/learning_rate"] == LR
    assert first["policy/ratio_max"] > 1 and first["policy/grad_norm"] > 0
    assert 0 <= first["policy/clip_fraction"] <= 1
    assert 0 < first["policy/approx_kl"] < 1
    assert 0 < first["policy/entropy"] < math.log(41)  # of 41 pieces
    assert second["policy/loss"] != first["policy/loss"]
    # Generation computes the same log-probs with a cache, one token at a time.
    difference = (buffer.rollout_logprobs.double() - buffer.old_logprobs.double()).abs().tolist()
    assert first["rollout/logprob_abs_diff"] == pytest.approx(mean(difference))
    assert first["rollout/logprob_abs_diff"] < 1e-5
    assert first["rollout/logprob_abs_diff_max"] == max(difference) < 1e-4
    assert first["rollout/ess"] == pytest.approx(1, abs=1e-8)
    assert first["rollout/correction_clipped_share"] == first["rollout/staleness"] == 0


def test_times_and_throughput(steps):
    for row, buffer in steps:
        stages = [row[f"time/{stage}"] for stage in ("rollout", "reward", "score", "update")]
        assert all(seconds > 0 for seconds in stages)
        assert row["time/step"] == pytest.approx(sum(stages))
        tokens = row["throughput/tokens_per_second"] * row["time/step"]
        assert tokens == pytest.approx(len(buffer.tokens))
        generated = row["throughput/generated_tokens_per_second"] * row["time/rollout"]
        assert generated == pytest.approx(int(buffer.response_lengths.sum()))
        assert 0.05 < row["memory/peak_gb"] < 64


def test_one_row_a_step_with_every_tag(logs):
    written = rows(logs / "metrics.jsonl")
    assert [row["step"] for row in written] == [1, 2, 3]
    parts = {"reward/tests.reporting.test_metrics:short", "reward/exact_match"}
    for row in written:
        evaluated = OF_EVALUATIONS if row["step"] in EVALUATED else set()
        assert row.keys() == {"step"} | TAGS | parts | evaluated
        assert all(math.isfinite(value) for value in row.values())
    assert written[-1]["time/checkpoint"] > 0 == written[0]["time/checkpoint"]


def test_the_row_of_a_run_is_that_of_the_step(logs, steps):
    """The log adds nothing and loses nothing."""
    first = rows(logs / "metrics.jsonl")[0]
    measured = ("time/", "throughput/", "memory/")
    for tag, value in steps[0][0].items():
        assert tag.startswith(measured) or first[tag] == value, tag


def test_tensorboard_holds_the_same(logs, events):
    written = rows(logs / "metrics.jsonl")
    evaluated = {row["step"]: row for row in rows(logs / "evaluations.jsonl")}
    scalars = {tag for row in written for tag in row} - {"step"}
    assert set(events.Tags()["scalars"]) == scalars
    for tag in scalars:
        expected = [(row["step"], row[tag]) for row in written if tag in row]
        if tag in OF_EVALUATIONS:
            expected.insert(0, (0, evaluated[0][tag.removeprefix("eval/")]))
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in found] == [step for step, _ in expected], tag
        for (_, ours), (_, theirs) in zip(found, expected):
            assert ours == pytest.approx(theirs, rel=1e-6), tag


def test_tensorboard_holds_histograms_of_every_step(logs, events):
    written = rows(logs / "metrics.jsonl")
    advantages = events.Histograms("advantage/histogram")
    lengths = events.Histograms("response/length_histogram")
    assert [event.step for event in advantages] == [event.step for event in lengths] == [1, 2, 3]
    for row, advantage, length in zip(written, advantages, lengths):
        assert advantage.histogram_value.num == row["advantage/count"]
        assert advantage.histogram_value.sum == pytest.approx(0, abs=1e-4)  # they are normalised
        assert length.histogram_value.num == 12
        assert length.histogram_value.sum / 12 == pytest.approx(row["response/length_mean"])


def test_evaluations_and_their_answers(logs, events):
    evaluated = rows(logs / "evaluations.jsonl")
    assert [row["step"] for row in evaluated] == EVALUATED
    for row in evaluated:
        assert row["count"] == 16 and len(row["samples"]) == 4
        assert row["reward"] >= 2 * row["accuracy"]  # correct is what the first reward gives 1.0
        for sample in row["samples"]:
            points = 2.0 * (len(sample["response"]) <= 6)
            assert sample["score"] == points + (sample["response"].strip() == sample["label"])
    for number in range(4):
        texts = events.Tensors(f"eval/sample_{number}/text_summary")
        assert [event.step for event in texts] == EVALUATED
        for row, event in zip(evaluated, texts):
            sample = row["samples"][number]
            text = event.tensor_proto.string_val[0].decode()
            assert sample["prompt"] in text and f"**{sample['response']}**" in text
            assert f"(label {sample['label']})" in text
