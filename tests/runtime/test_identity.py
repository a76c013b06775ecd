"""A resume compares its inputs with the checkpoint's: other prompts start from the beginning, all
other changes are logged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.runtime.identity import PROMPTS, carry_over, identities, recorded
from megatron_rpp.runtime.inputs import load_inputs
from tests.small_run import config_of, make_data
from tests.whole_runs import rows, same_bits, train_run

SAVED = Path("/runs/a/checkpoints/iter_0000003")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    make_data(folder)
    content = rows(folder / "train.jsonl")

    def write(name: str, changed: list[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in changed))

    write("copy.jsonl", content)
    write("relabelled.jsonl", [content[0] | {"label": "0"}, *content[1:]])
    write("shorter.jsonl", content[:-1])
    write("turned.jsonl", content[::-1])
    (folder / "reward.py").write_text(
        "def score(prompts, *rest):\n    return [0.0] * len(prompts)\n"
    )
    (folder / "template.jinja").write_text("{{ messages[0]['content'] }}")
    return folder


def recorded_identities(base: Path, **settings):
    config = config_of(base, base / "run", **settings)
    return identities(config, load_inputs(config))


def resumed_with(base: Path, before: dict, after: dict) -> tuple[int, list[str]]:
    """Resumes after 24 prompts; returns the position in the data and the names of the changes."""
    state = RunState(
        step=3, prompts_seen=24, identity=recorded(recorded_identities(base, **before))
    )
    logged: list[str] = []
    now = recorded_identities(base, **after)
    after_all = carry_over(state, now, SAVED, log=logged.append)
    assert after_all.step == 3 and after_all.identity == recorded(now)
    start = f"changed since {SAVED}: "
    assert all(text.startswith(start) and " (then " in text for text in logged)
    return after_all.prompts_seen, [text[len(start) :].partition(" (")[0] for text in logged]


SAME = [
    ({}, {}),
    ({}, {"data__train": "copy.jsonl"}),
    (
        {},
        {"reward__workers": 2, "reward__timeout": 3, "optimizer__lr": 1e-5, "parallel__tensor": 2},
    ),
    ({"data__eval": "eval.jsonl"}, {"evaluation__prompts": 16}),
]
OTHER = [
    ({}, {"data__train": "shorter.jsonl"}, 0, {PROMPTS, "the labels of the training data"}),
    ({}, {"data__train": "turned.jsonl"}, 0, {PROMPTS, "the labels of the training data"}),
    ({}, {"data__train": "relabelled.jsonl"}, 24, {"the labels of the training data"}),
    ({}, {"data__eval": "copy.jsonl"}, 24, {"the held-out data"}),
    ({}, {"data__chat_template": "template.jinja"}, 24, {"the form of prompts"}),
    ({}, {"reward__scale": 2.0}, 24, {"reward.scale"}),
    ({}, {"reward__functions": "[math_verify]"}, 24, {"reward.functions"}),
    (
        {"data__train": "[train.jsonl,copy.jsonl]", "data__weights": "[1,1]"},
        {"data__train": "[train.jsonl,copy.jsonl]", "data__weights": "[1,3]"},
        0,
        {PROMPTS},
    ),
]


@pytest.mark.parametrize(("before", "after"), SAME)
def test_equal_inputs_are_not_reported(base, monkeypatch, before, after):
    monkeypatch.chdir(base)
    assert resumed_with(base, before, after) == (24, [])


@pytest.mark.parametrize(("before", "after", "seen", "names"), OTHER)
def test_changes_are_reported_and_other_prompts_start_from_the_beginning(
    base, monkeypatch, before, after, seen, names
):
    monkeypatch.chdir(base)
    place, logged = resumed_with(base, before, after)
    assert place == seen and set(logged) == names


def test_code_of_a_reward_and_files_of_a_tokenizer_count_by_content(base, tmp_path):
    given = {"reward__functions": f"[{base}/reward.py:score]"}
    before = recorded(recorded_identities(base, **given))
    (base / "reward.py").write_text("def score(prompts, *rest):\n    return [1.0] * len(prompts)\n")
    other = tmp_path / "other.model"
    other.write_bytes((base / "tokenizer.model").read_bytes())
    now = recorded_identities(base, **given, data__tokenizer=other)
    logged: list[str] = []
    carry_over(RunState(step=1, identity=before), now, SAVED, log=logged.append)
    assert len(logged) == 1 and ": reward.functions (then " in logged[0]


def test_a_checkpoint_without_identities_keeps_its_position(base):
    logged: list[str] = []
    state = carry_over(
        RunState(step=3, prompts_seen=24), recorded_identities(base), SAVED, log=logged.append
    )
    assert state.prompts_seen == 24
    assert logged == [f"{SAVED} records no inputs: the run continues at its position in the data"]


def test_a_resume_with_other_data_trains_on_its_first_prompts(base, tmp_path, capsys):
    """Step 3 on the other data has the prompts of step 1 of a new run on it. The change is logged
    once, before the steps."""
    seen = (
        "from pathlib import Path\n"
        "def score(prompts, responses, labels, metadata):\n"
        "    with open(Path(__file__).with_name('seen.txt'), 'a') as file:\n"
        "        file.write('|'.join(dict.fromkeys(prompts)) + '\\n')\n"
        "    return [0.0] * len(prompts)\n"
    )
    (tmp_path / "reward.py").write_text(seen)
    asked = tmp_path / "seen.txt"

    def run(name: str, data: str, steps: int) -> str:
        """Returns the prompts of the last step, without those of the evaluations around it."""
        train_run(
            base, tmp_path / name, data__train=base / data, train__steps=steps, reward__workers=0,
            reward__functions=f"[{tmp_path}/reward.py:score]", train__epochs=1, train__minibatches=1,
        )  # fmt: skip
        return asked.read_text().splitlines()[-2]

    first = run("fresh", "turned.jsonl", 1)
    run("resumed", "train.jsonl", 2)
    assert run("resumed", "turned.jsonl", 3) == first
    output = capsys.readouterr().out
    assert output.count(": the training data (then ") == 1
    assert "resumed at step 2 of 3, 0 prompts seen" in output
    state = rows(tmp_path / "resumed/logs/metrics.jsonl")
    assert [row["step"] for row in state] == [1, 2, 3]


def test_resuming_with_a_copy_elsewhere_is_exact(base, tmp_path):
    train_run(base, tmp_path / "whole", train__steps=2)
    train_run(base, tmp_path / "moved", train__steps=1)
    config = train_run(base, tmp_path / "moved", train__steps=2, data__train=base / "copy.jsonl")
    same_bits(tmp_path / "moved", tmp_path / "whole", config, step=2, first=2)


def test_inputs_that_only_one_version_records_are_left_out(base):
    now = recorded_identities(base)
    earlier = {name: value for name, value in recorded(now).items() if name != "reward.clip"}
    earlier["reward.gone"] = ["0", "of an earlier version"]
    logged: list[str] = []
    carry_over(RunState(step=1, identity=earlier), now, SAVED, log=logged.append)
    assert logged == []
