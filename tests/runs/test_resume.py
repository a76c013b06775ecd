"""A resumed run equals an uninterrupted one in rows, weights and moments, on any layout.

On the layout that wrote the checkpoint everything is equal bit for bit (the same kernels run on the
same numbers); on another layout within fp32 rounding. Checkpoints that do not fit are in
test_checkpoint.py, Adam's moments within one process in test_resume_moments.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rpp import train
from megatron_rpp.checkpoint.state import POINTER
from megatron_rpp.lifecycle.config_error import ConfigError
from tests import whole_runs
from tests.distributed import run_ranks
from tests.small_run import arguments, config_of, make_data
from tests.whole_runs import (
    TOLERANCE,
    VARIED,
    compare_rows,
    compare_weights,
    rows,
    run_program,
    train_run,
    weights,
)

# Learning rate and KL coefficient change in every step, so the tests notice a schedule or a
# controller that starts over. Adam's epsilon: see test_layouts.py.
SETTINGS = {
    "train__steps": 4,
    "train__epochs": 1,
    "checkpoint__interval": 2,
    "evaluation__interval": 2,
    "optimizer__warmup_steps": 3,
    "optimizer__decay_steps": 12,
    "optimizer__eps": 1e-5,
    "algorithm__kl_controller": "adaptive",
    "algorithm__kl_estimator": "k3",
    "algorithm__kl_target": 0.01,
    "algorithm__kl_horizon": 100,
}
TP2, PP2 = {"parallel__tensor": 2}, {"parallel__pipeline": 2}
KINDS = {
    "fp32": {},
    "whole optimizer": {"optimizer__distributed": "false"},
    "bf16": {"model__dtype": "bf16"},
    "offloaded reference": {"reference__placement": "offload"},
    "at the end of an epoch": {"data__train": "two steps.jsonl"},
    "ppo": {
        "algorithm__name": "ppo",
        "algorithm__gae_lambda": 0.9,
        "critic__warmup_steps": 1,
        "critic__optimizer__warmup_steps": 3,
        "critic__optimizer__decay_steps": 12,
        "critic__optimizer__eps": 1e-5,
    },
}


def run_once(base: Path, name: str, **settings) -> None:
    train_run(base, base / name, **(SETTINGS | settings))


def run_in_two_parts(base: Path, name: str, **settings) -> None:
    run_once(base, name, train__steps=2, **settings)
    run_once(base, name, **settings)


def copied(base: Path, run: str, to: str) -> None:
    """Copies a run on the main rank. Collective."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        shutil.copytree(base / run, base / to)
    if dist.is_initialized():
        dist.barrier()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The folder of the data and of run "whole": four steps without a break on one rank."""
    base = tmp_path_factory.mktemp("resume")
    make_data(base)
    prompts = (base / "train.jsonl").read_text().splitlines(keepends=True)[:16]
    (base / "two steps.jsonl").write_text("".join(prompts))
    run_once(base, "whole")
    return base


def log(base: Path, run: str) -> list[dict]:
    return rows(base / run / "logs/metrics.jsonl")


def same_bits(base: Path, ours: str, theirs: str, first: int = 1, **settings) -> None:
    config = config_of(base, base / ours, **(VARIED | settings))
    whole_runs.same_bits(base / ours, base / theirs, config, 4, first)


def final_weights(base: Path, run: str) -> dict[str, torch.Tensor]:
    config = config_of(base, base / run, **VARIED)
    return weights(config, base / run / "checkpoints/iter_0000004")


@pytest.mark.parametrize("kind", KINDS)
def test_two_parts_equal_the_whole(base, kind):
    whole, settings = "whole", dict(KINDS[kind])
    if "data__train" in settings:
        settings["data__train"] = base / settings["data__train"]
    if kind != "fp32":
        whole = f"whole {kind}"
        run_once(base, whole, **settings)
    run_in_two_parts(base, f"parts {kind}", **settings)
    same_bits(base, f"parts {kind}", whole, **settings)
    rate = "critic/learning_rate" if kind == "ppo" else "policy/learning_rate"
    changes = {name: len({row[name] for row in log(base, whole)}) for name in (rate, "kl/coef")}
    # The first step of ppo is a warm-up, which does not adapt the coefficient.
    assert changes == {rate: 4, "kl/coef": 3 if kind == "ppo" else 4}


def test_load_continues_elsewhere_and_leaves_its_source_alone(base):
    source = base / "whole/checkpoints/iter_0000002"
    before = contents(source.parent)
    run_once(base, "loaded", checkpoint__load=source)
    assert [row["step"] for row in log(base, "loaded")] == [3, 4]
    same_bits(base, "loaded", "whole", first=3)
    assert contents(source.parent) == before


def test_load_does_not_override_newer_checkpoints(base):
    """The same command is submitted again after the run stopped at step 3."""
    source = {"checkpoint__load": base / "whole/checkpoints/iter_0000002"}
    run_once(base, "again", train__steps=3, **source)
    run_once(base, "again", **source)
    assert [row["step"] for row in log(base, "again")] == [3, 4]
    same_bits(base, "again", "whole", first=4)


def test_load_takes_the_newest_of_a_directory(base):
    copied(base, "whole", "short")
    go_back(base / "short", 2)
    run_once(base, "loaded newest", checkpoint__load=base / "short/checkpoints")
    same_bits(base, "loaded newest", "whole", first=3)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and bytes of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_finished_run_is_left_alone(base, capsys):
    before = contents(base / "whole")
    run_program(train.main, arguments(base, base / "whole", **(VARIED | SETTINGS)))
    assert "finished before, at step 4" in capsys.readouterr().out
    assert contents(base / "whole") == before


def right(prompts, responses, labels, metadata) -> list[float]:
    return [1.0] * len(responses)


def test_a_run_that_reached_its_accuracy_is_left_alone(base, capsys):
    """The accuracy of the last evaluation is in the checkpoint."""
    settings = {"reward__functions": "[tests.runs.test_resume:right]"}
    run_once(base, "right", train__steps=1, **settings)
    before = contents(base / "right")
    run_once(base, "right", train__stop_accuracy=0.9, **settings)
    assert "finished before, at step 1" in capsys.readouterr().out
    assert contents(base / "right") == before


def test_a_changed_learning_rate_is_used(base):
    """The new recipe gives the schedule; the checkpoint gives the position in it."""
    copied(base, "whole", "changed")
    run_once(
        base, "changed", train__steps=5, optimizer__lr=0.01, optimizer__warmup_steps=0,
        optimizer__decay_steps=100, optimizer__decay_style="linear",
    )  # fmt: skip
    # Five steps of two mini-batches are 10 optimizer steps.
    assert log(base, "changed")[-1]["policy/learning_rate"] == pytest.approx(0.01 * (1 - 10 / 100))


def go_back(run: Path, step: int) -> None:
    """Sets the pointer to an older step, as the message of a damaged checkpoint recommends."""
    (run / "checkpoints" / POINTER).write_text(f"{step}\n")


def test_every_step_is_logged_once_after_going_back(base):
    run = base / "back"
    copied(base, "whole", "back")
    go_back(run, 2)
    with open(run / "logs/metrics.jsonl", "a") as file:
        file.write('{"step": 5, "reward/mea')  # torn by a kill
    run_once(base, "back")
    same_bits(base, "back", "whole")
    assert [row["step"] for row in rows(run / "logs/evaluations.jsonl")] == [0, 2, 4]
    events = EventAccumulator(str(run / "logs")).Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("eval/accuracy")] == [0, 2, 4]


def test_a_run_killed_before_its_first_checkpoint_starts_over(base):
    run = base / "anew"
    copied(base, "whole", "anew")
    shutil.rmtree(run / "checkpoints")
    run_once(base, "anew")
    same_bits(base, "anew", "whole")
    assert [row["step"] for row in rows(run / "logs/evaluations.jsonl")] == [0, 2, 4]


def on_two_ranks(rank: int, base: Path) -> list[str]:
    """Runs on other layouts; returns the errors of two checkpoints that do not fit."""
    run_once(base, "tp2 then pp2", train__steps=2, **TP2)
    run_once(base, "tp2 then pp2", **PP2)
    run_once(base, "dp2")
    run_in_two_parts(base, "dp2 parts")
    copied(base, "dp2", "dp2 then tp2")
    if rank == 0:
        go_back(base / "dp2 then tp2", 2)
    dist.barrier()
    run_once(base, "dp2 then tp2", **TP2)
    run_once(base, "one then dp2", checkpoint__load=base / "whole/checkpoints/iter_0000002")
    messages = []
    source = {"checkpoint__load": base / "whole/checkpoints"}
    for shape in (TP2 | {"model__hidden": 48}, PP2 | {"model__layers": 2}):
        with pytest.raises(ValueError) as raised:
            run_once(base, "other shape", **(source | shape))
        messages.append(str(raised.value))
    return messages


@pytest.fixture(scope="module")
def messages(base, tmp_path_factory) -> list[list[str]]:
    """Each rank's errors of two checkpoints that do not fit; the runs are in `base`."""
    return run_ranks(on_two_ranks, 2, tmp_path_factory.mktemp("ranks"), base)


@pytest.mark.parametrize("run", ["tp2 then pp2", "dp2 then tp2", "one then dp2"])
def test_another_layout_resumes(base, messages, run):
    own = log(base, run)
    assert own[-1]["step"] == 4
    assert compare_rows(own, log(base, "whole")[-len(own) :]).size <= TOLERANCE
    deviation = compare_weights(final_weights(base, run), final_weights(base, "whole"))
    assert deviation.size <= TOLERANCE, deviation


def test_sharded_moments_resume_bit_for_bit(base, messages):
    same_bits(base, "dp2 parts", "dp2")


def test_a_checkpoint_without_a_critic_is_refused(base):
    source = base / "whole/checkpoints"
    with pytest.raises(ConfigError, match=r"has no critic, because algorithm.name was not ppo"):
        run_once(base, "no critic", checkpoint__load=source, **KINDS["ppo"])


def test_every_rank_refuses_a_checkpoint_of_another_shape(messages):
    for hidden, layers in messages:
        assert "linear_qkv" in hidden and "there" in hidden and "model section" in hidden
        assert "[4, 32] there, [2, 32] here" in layers
    assert messages[0] == messages[1]
