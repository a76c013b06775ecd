"""A reward model learns from pairs and from scores, equally on every layout, and resumes exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rpp import reward_model
from megatron_rpp.checkpoint import state as checkpoint
from megatron_rpp.data.pair_files import RatedPrompt
from megatron_rpp.lifecycle import entrypoint, exit_codes
from megatron_rpp.model import pipeline
from megatron_rpp.model.scalar_model import ScalarModel
from megatron_rpp.runtime.policy import build_start
from megatron_rpp.runtime.rated_inputs import load_rated_inputs
from megatron_rpp.stages import rating
from tests.algorithms import oracle
from tests.distributed import run_ranks
from tests.preference_run import arguments, config_of, goodness, make_preferences
from tests.supervised_runs import interrupt_and_finish, left_alone, without_times
from tests.whole_runs import (
    TOLERANCE,
    compare_rows,
    compare_weights,
    layout,
    relative,
    rows,
    run_program,
    small_buckets,
)

LAYOUTS = {
    "TP2": {"parallel__tensor": 2, "parallel__sequence_parallel": "true"},
    "PP2": {"parallel__pipeline": 2},
    "CP2": {"parallel__context": 2},
    "DP2": {"parallel__overlap_param_gather": "true"},
}


def graded(base: Path) -> dict:
    """Settings of a run on rows with scores."""
    return {
        "data__train": base / "graded_train.jsonl",
        "data__eval": base / "graded_eval.jsonl",
        "reward_model__steps": 8,
        "reward_model__eval_interval": 4,
    }


def learn(base: Path, name: str, **settings) -> None:
    config = config_of(base, base / name, **settings)
    inputs = load_rated_inputs(config)
    with layout(config):
        reward_model.train_rewards(config, inputs)


def on_two_ranks(rank: int, base: Path) -> None:
    for name, settings in LAYOUTS.items():
        with small_buckets():
            learn(base, name, **settings)
    for name in ("CP2", "DP2"):
        learn(base, f"graded {name}", **graded(base), **LAYOUTS[name])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The folder of the data and of the runs "one" and "graded", by the real program on one rank."""
    base = tmp_path_factory.mktemp("reward_model")
    make_preferences(base)
    run_program(reward_model.main, arguments(base, base / "one"))
    run_program(reward_model.main, arguments(base, base / "graded", **graded(base)))
    return base


@pytest.fixture(scope="module")
def layouts(base, tmp_path_factory) -> Path:
    run_ranks(on_two_ranks, 2, tmp_path_factory.mktemp("ranks"), base)
    return base


def log(base: Path, run: str) -> list[dict]:
    return rows(base / run / "metrics.jsonl")


def weights(base: Path, run: str) -> dict[str, torch.Tensor]:
    """The weights of a run's last checkpoint, read by one rank."""
    config = config_of(base, base / run, seed=99)  # no run has this seed
    with layout(config):
        model = build_start(config, load_rated_inputs(config).vocab_size, kind=ScalarModel)
        checkpoint.load_weights(model, base / run)
        return {name: value.detach().clone() for name, value in model[0].named_parameters()}


def test_it_learns_the_preference(base):
    """Before the first step it guesses."""
    config = config_of(base, base / "one")
    inputs = load_rated_inputs(config)
    with layout(config):
        model = build_start(config, inputs.vocab_size, kind=ScalarModel)
        before = rating.evaluate(
            model, inputs.held_out, "pairs", batch_size=13, max_tokens=96, stop=lambda: False
        )
    assert 0.3 < before["eval/accuracy"] < 0.7
    found = log(base, "one")
    assert [row["step"] for row in found if "eval/accuracy" in row] == [6, 12]
    assert found[-1]["eval/accuracy"] > 0.9 and found[-1]["eval/loss"] < 0.7 * before["eval/loss"]
    assert found[-1]["rm/accuracy"] > 0.9 and found[-1]["rm/margin_mean"] > 0.5


def test_it_learns_scores(base):
    found = log(base, "graded")
    assert found[-1]["eval/correlation"] > 0.8 and found[-1]["rm/loss"] < 0.7 * found[0]["rm/loss"]
    assert {tag for row in found for tag in row} == {
        "step", "rm/loss", "rm/grad_norm", "rm/skipped_updates", "time/step", "time/checkpoint",
        "eval/loss", "eval/correlation",
    }  # fmt: skip


def reward(model: torch.nn.ModuleList, sequence: tuple[int, ...]) -> float:
    """The reward of one sequence, without packing: the head at its last hidden state."""
    hidden = pipeline.stage_forward(model, torch.tensor([sequence]))[-1, 0].detach().double()
    return float(hidden @ model[0].score.weight.detach().double()[0])


@pytest.mark.parametrize("run", ["one", "graded"])
def test_the_first_step_is_that_of_the_equations(base, run):
    """Loss, accuracy and margin from rewards of single sequences, by the oracle."""
    config = config_of(base, base / run, **(graded(base) if run == "graded" else {}))
    inputs = load_rated_inputs(config)
    prompts = [inputs.train[row] for row in inputs.train.order(0, 13, config.seed)]
    with layout(config):
        model = build_start(config, inputs.vocab_size, kind=ScalarModel)
        found = np.array([[reward(model, s) for s in prompt.sequences] for prompt in prompts])
    targets = np.array([prompt.example.target for prompt in prompts])
    first = log(base, run)[0]
    if run == "graded":
        expected = np.mean((found[:, 0] - targets) ** 2)
        texts = [json.loads(prompt.example.label)[0][0] for prompt in prompts]
        assert targets.tolist() == [goodness(text) / 4 for text in texts]
    else:
        assert 0 < np.count_nonzero(targets) < len(targets)
        expected = oracle.bradley_terry(found[:, 0], found[:, 1], targets).mean()
        lead = found[:, 0] - found[:, 1]
        assert first["rm/accuracy"] == pytest.approx((lead > 0).mean())
        assert first["rm/margin_mean"] == pytest.approx(lead.mean(), rel=1e-4, abs=1e-6)
    assert first["rm/loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [*LAYOUTS, "graded CP2", "graded DP2"])
def test_every_layout_learns_the_same(layouts, name):
    one = "graded" if name.startswith("graded") else "one"
    deviation = compare_rows(log(layouts, name), log(layouts, one))
    assert deviation.size <= TOLERANCE, deviation
    assert compare_weights(weights(layouts, name), weights(layouts, one)).size <= TOLERANCE


def test_another_order_of_the_data_is_detected(base):
    """The comparison can fail."""
    learn(base, "other seed", seed=4321, reward_model__steps=4)
    losses = (log(base, run)[3]["rm/loss"] for run in ("other seed", "one"))
    assert relative(*losses) > 100 * TOLERANCE


def test_the_micro_batches_do_not_change_the_result(base):
    """A pair that is larger than the budget still stays together."""
    for tokens in (1, 4096):
        learn(base, f"budget {tokens}", train__max_tokens_per_microbatch=tokens)
        assert compare_rows(log(base, f"budget {tokens}"), log(base, "one")).size <= TOLERANCE


def test_a_finished_run_is_left_alone(base, capsys):
    words = arguments(base, base / "one")
    left_alone(base / "one", lambda: run_program(reward_model.main, words))
    said = capsys.readouterr().out
    assert "data: 240 pairs, 61 held out, 0 dropped as too long" in said
    assert "finished before, at step 12: raise reward_model.steps to go on" in said


def test_a_dry_run_trains_nothing(base, tmp_path, capsys):
    run_program(reward_model.main, [*arguments(base, tmp_path / "dry"), "--dry-run"])
    assert "dry run: everything is built and nothing was trained" in capsys.readouterr().out
    assert not list((tmp_path / "dry").glob("*"))


def test_it_stops_at_the_accuracy(base, tmp_path):
    settings = {"reward_model__stop_accuracy": 0.9, "reward_model__eval_interval": 2}
    run_program(
        reward_model.main,
        arguments(base, tmp_path, **settings, reward_model__steps=500),
    )
    assert 2 <= rows(tmp_path / "metrics.jsonl")[-1]["step"] < 100


def test_a_killed_and_stopped_run_resumes_bit_for_bit(base):
    learn(base, "whole")
    interrupt_and_finish(
        lambda: learn(base, "resumed", reward_model__checkpoint_interval=4), "reward-model step"
    )
    ours, theirs = (without_times(log(base, run)) for run in ("resumed", "whole"))
    assert ours == theirs
    assert compare_weights(weights(base, "resumed"), weights(base, "whole")).size == 0


REFUSED = {
    "equal": ({"chosen": "ab", "rejected": "ab"}, "both responses are the same: remove the row"),
    "empty": ({"chosen": "", "rejected": "ab"}, "'chosen' is empty: remove the row, or write"),
    "margin": ({"chosen": "a", "rejected": "e", "margin": "x"}, "'margin' is 'x', it must be a"),
    "no template": (
        {"chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a"}],
         "rejected": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "e"}]},
        "which has no chat template: set data.tokenizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_rows_end_the_program_before_a_model_is_built(base, tmp_path, capsys, case):
    row, message = REFUSED[case]
    path = tmp_path / "rows.jsonl"
    path.write_text((base / "train.jsonl").read_text() + json.dumps(row) + "\n")
    words = arguments(base, tmp_path / "run", data__train=path)
    with pytest.raises(SystemExit) as end:
        entrypoint.run(lambda: reward_model.main(words))
    assert end.value.code == exit_codes.REFUSED == 2
    said = capsys.readouterr().err
    assert f"{path}, line 241" in said and message in said


def test_a_target_accuracy_needs_pairs(base, tmp_path):
    config = config_of(base, tmp_path, **graded(base), reward_model__stop_accuracy=0.9)
    with pytest.raises(ValueError, match="reward_model.stop_accuracy 0.9 needs pairs"):
        load_rated_inputs(config)


def test_a_row_of_the_data_is_a_pair_of_sequences(base):
    prompt = load_rated_inputs(config_of(base, base / "one")).train[0]
    assert isinstance(prompt, RatedPrompt) and len(prompt.sequences) == 2
