"""Procedural tasks as rows."""

from __future__ import annotations

import json

import pytest

from megatron_rpp.data.examples import open_examples
from megatron_rpp.data.tasks import create_task, jsonl, make_task, restore_entry

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
"""Two digits and an operator: 200 different problems."""


def prompts(rows) -> list[str]:
    return [row["prompt"] for row in rows]


def test_the_same_arguments_give_the_same_rows():
    first = make_task("chain_sum", SUMS, train_size=50, eval_size=10, train_seed=1, eval_seed=2)
    assert first == make_task(
        "chain_sum", SUMS, train_size=50, eval_size=10, train_seed=1, eval_seed=2
    )
    assert first != make_task(
        "chain_sum", SUMS, train_size=50, eval_size=10, train_seed=3, eval_seed=4
    )


def test_labels_are_the_sums():
    for row in make_task("chain_sum", SUMS, train_size=50, eval_size=10, train_seed=1, eval_seed=2)[
        0
    ]:
        left, operator, right = row["prompt"].removesuffix(" =").split()[-3:]
        sign = {"+": 1, "-": -1}[operator]
        assert row["label"] == str(int(left) + sign * int(right))


def test_held_out_prompts_are_distinct_and_never_trained_on():
    train, held_out = make_task(
        "chain_sum", SUMS, train_size=2500, eval_size=120, train_seed=1, eval_seed=2
    )
    assert len(train) == 2500 and len(held_out) == 120
    assert len(set(prompts(held_out))) == 120
    assert not set(prompts(train)) & set(prompts(held_out))
    # 80 problems are left and each draw hits a given one with 1/200: all of them are seen.
    assert len(set(prompts(train))) == 80


def test_neighbouring_seeds_share_entries_and_only_the_filter_keeps_them_apart():
    # The reason why seeds alone do not suffice: entry 1 of seed 1 is entry 0 of seed 2.
    assert (
        create_task("chain_sum", SUMS, size=2, seed=1)[1]["question"]
        == create_task("chain_sum", SUMS, size=2, seed=2)[0]["question"]
    )
    train, held_out = make_task(
        "chain_sum", {"max_digits": 6}, train_size=100, eval_size=50, train_seed=1, eval_seed=2
    )
    assert not set(prompts(train)) & set(prompts(held_out))


@pytest.mark.parametrize(
    "name, params",
    [
        ("chain_sum", SUMS),
        ("arc_1d", {}),
        ("rearc", {}),  # compares tuples
        ("acre", {}),  # its entries depend on the size of the data set
        ("graph_color", {}),  # integer keys, no single answer
        ("knights_knaves", {}),
        (
            "composite",
            {
                "datasets": [
                    {"name": "gcd", "weight": 1, "config": {}},
                    {"name": "leg_counting", "weight": 1, "config": {}},
                ]
            },
        ),
    ],
)
def test_rows_score_as_the_entries_after_a_file(tmp_path, name, params):
    train, held_out = make_task(name, params, train_size=5, eval_size=3, train_seed=1, eval_seed=2)
    (tmp_path / "rows.jsonl").write_bytes(jsonl(train + held_out))
    examples = open_examples(tmp_path / "rows.jsonl", "prompt", "label")
    assert len(examples) == 8
    for example, row in zip(examples, train + held_out):
        assert example.prompt == row["prompt"] and example.label == row["label"]
        task = create_task(example.metadata["task"], example.metadata["params"], size=10, seed=0)
        entry = restore_entry(example.prompt, example.metadata)
        if entry["answer"] is not None:
            assert task.score_answer(entry["answer"], entry) == 1.0
        assert task.score_answer("no such answer", entry) < 1.0


def test_equal_seeds_are_errors():
    with pytest.raises(ValueError, match="task.eval_seed are both 5"):
        make_task("chain_sum", SUMS, train_size=5, eval_size=5, train_seed=5, eval_seed=5)


def test_unknown_task_names_the_nearest_and_the_list():
    with pytest.raises(ValueError, match="unknown task 'chian_sum': did you mean chain_sum.*List"):
        make_task("chian_sum", {}, train_size=5, eval_size=5, train_seed=1, eval_seed=2)


@pytest.mark.parametrize(
    "name, params, problem",
    [
        ("chain_sum", {"digits": 2}, r"no params \['digits'\], only .*'max_digits'"),
        ("chain_sum", {"size": 2}, r"no params \['size'\]"),
        ("chain_sum", {"min_terms": 3, "max_terms": 2}, "max_terms must be >= min_terms"),
        ("chain_sum", {"min_terms": "a"}, "refuses its params.*TypeError"),
        ("chain_sum", {"min_terms": {1}}, "must be JSON values"),
        ("composite", {}, "at least one dataset"),
        ("composite", {"datasets": [{"nmae": "gcd"}]}, "refuses its params.*nmae"),
    ],
)
def test_bad_params_are_named(name, params, problem):
    with pytest.raises(ValueError, match=f"(?s)task {name}.*{problem}"):
        make_task(name, params, train_size=5, eval_size=5, train_seed=1, eval_seed=2)


def test_too_few_different_problems():
    with pytest.raises(ValueError, match="only 200 different problems: lower task.eval_size 201"):
        make_task("chain_sum", SUMS, train_size=10, eval_size=201, train_seed=1, eval_seed=2)
    with pytest.raises(ValueError, match="besides the 200 held out"):
        make_task("chain_sum", SUMS, train_size=10, eval_size=200, train_seed=1, eval_seed=2)
    with pytest.raises(ValueError, match="must be at least 1"):
        make_task("chain_sum", SUMS, train_size=0, eval_size=5, train_seed=1, eval_seed=2)


def test_rows_are_one_json_object_a_line():
    rows = [{"prompt": "a\nb\u2028", "label": None, "metadata": {"é": [1.5]}}, {"prompt": "c"}]
    lines = jsonl(rows).decode().removesuffix("\n").split("\n")
    assert [json.loads(line) for line in lines] == rows
