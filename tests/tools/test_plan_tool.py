"""tools/plan.py on shipped recipes, with nothing but the model's config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.config.published import PUBLISHED
from tests.config.test_recipes import words
from tests.whole_runs import run_program
from tools import plan


def argv(folder: Path, recipe: str, *more: str) -> list[str]:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model/config.json").write_text(json.dumps(PUBLISHED[recipe][0]))
    return [*words(recipe, folder), *more]


def test_tables(tmp_path, capsys):
    """The recipe's own layout is among the best three of its machines."""
    plan.main(argv(tmp_path, "qwen2.5-7b-math", "--gpus", "1", "8", "--gpu", "h100"))
    printed = capsys.readouterr().out
    assert "1 x h100: no layout on 1 GPUs fits" in printed
    assert "TP2 DP4" in printed and "GPU-h/run" in printed
    assert "critic" not in printed, "the run has none"
    assert "efficiency = 0.64" in printed and "No layout can beat:" in printed


def test_a_table_has_room_for_all_its_columns(tmp_path, capsys):
    plan.main(argv(tmp_path, "qwen2.5-7b-math-ppo", "--gpus", "8"))
    printed = capsys.readouterr().out
    assert "critic" in printed and "GPU-h/run" in printed and "…" not in printed


def test_json(tmp_path, capsys):
    """Both 70B on 8 x 8 GPUs and 7B on one GPU have a layout that fits."""
    for recipe, gpus in (("llama3.1-70b-math", 64), ("qwen2.5-7b-one-gpu", 1)):
        words = argv(tmp_path, recipe, "--gpus", str(gpus), "--json", "--efficiency", "0.5")
        plan.main(words)
        found = json.loads(capsys.readouterr().out)
        assert found["assumptions"]["efficiency"] == 0.5 and not found["problems"]
        best = found["plans"][str(gpus)][0]
        sizes = best["layout"]
        ranks = sizes["tensor"] * sizes["pipeline"] * sizes["context"] * sizes["data"]
        assert ranks == sizes["gpus"] == gpus and best["memory"]["total"] < 72e9
        assert best["gpu_hours_per_step"] == pytest.approx(gpus * best["seconds"]["total"] / 3600)


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_every_recipe_has_a_plan_or_a_reason(tmp_path, recipe, capsys):
    """From a node to a cluster; more GPUs never make a step slower, since a plan may leave some out."""
    numbers = (8, 16, 64, 1024)
    plan.main(argv(tmp_path, recipe, "--json", "--gpus", *map(str, numbers)))
    found = json.loads(capsys.readouterr().out)
    plans, problems = found["plans"], found["problems"]
    assert plans.keys() | problems.keys() == {str(number) for number in numbers}
    assert not plans.keys() & problems.keys()
    assert all(f"no layout on {number} GPUs fits" in why for number, why in problems.items())
    assert set(map(int, plans)) >= {n for n in numbers if n >= max(8, PUBLISHED[recipe][2])}
    best = [plans[str(number)][0] for number in numbers if str(number) in plans]
    for number, entry in zip(map(int, plans), best, strict=True):
        assert entry["layout"]["gpus"] <= number and entry["memory"]["total"] <= 72e9
    times = [entry["seconds"]["total"] for entry in best]
    assert times == sorted(times, reverse=True) and times[-1] > 0


def test_too_few_gpus_end_with_code_2(tmp_path, capsys):
    from megatron_rpp.lifecycle import entrypoint

    words = argv(tmp_path, "llama3.1-70b-math", "--gpus", "8", "16")
    with pytest.raises(SystemExit) as end:
        entrypoint.run(lambda: run_program(plan.main, words))
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert "no layout on 16 GPUs fits: the leanest needs" in printed
    assert "fill 16 such GPU(s) by themselves" in printed


@pytest.mark.parametrize("wrong", [["--gpus", "0"], ["--efficiency", "2", "--gpus", "8"]])
def test_mistakes_are_refused(tmp_path, wrong):
    from megatron_rpp.lifecycle.config_error import ConfigError

    with pytest.raises((SystemExit, ConfigError)):
        plan.main(argv(tmp_path, "qwen2.5-7b-math", *wrong))
