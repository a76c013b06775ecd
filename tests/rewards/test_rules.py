"""The built-in reward functions."""

from __future__ import annotations

import json

import pytest

from megatron_rpp.data.tasks import make_task
from megatron_rpp.rewards.rules import SampleError, exact_match, reasoning_gym


def columns(rows, responses):
    rows = json.loads(json.dumps(rows))
    return (
        [row["prompt"] for row in rows],
        responses,
        [row["label"] for row in rows],
        [row["metadata"] for row in rows],
    )


def test_exact_match_ignores_outer_space_alone():
    responses = ["57", " 57\n", "5 7", "57.0", "", "057"]
    assert exact_match(["p"] * 6, responses, ["57"] * 5 + [" 057 "], [{}] * 6) == [1, 1, 0, 0, 0, 1]


def test_exact_match_wants_a_label():
    with pytest.raises(SampleError, match="check data.label_key") as error:
        exact_match(["p"] * 3, ["a"] * 3, ["a", "a", None], [{}] * 3)
    assert error.value.index == 2


def test_reasoning_gym_scores_each_row_by_its_own_task():
    sums = make_task("chain_sum", {"max_digits": 2}, 4, 2, 1, 2)[0]
    words = make_task("spell_backward", {}, 4, 2, 1, 2)[0]
    rows = [row for pair in zip(sums, words) for row in pair]
    right = [f" {row['label']}\n" for row in rows]
    assert reasoning_gym(*columns(rows, right)) == [1.0] * 8
    swapped = [rows[i ^ 1]["label"] for i in range(8)]
    assert max(reasoning_gym(*columns(rows, swapped))) < 1.0


def test_reasoning_gym_keeps_the_librarys_leniency_and_part_marks():
    row = make_task("chain_sum", {"min_digits": 2, "max_digits": 2}, 1, 1, 1, 2)[0][0]
    answer = row["label"]
    responses = [f"{answer}.0", f"{answer} !!"]
    # Equal decimals are correct; an answer inside other text gets its share of the characters.
    assert reasoning_gym(*columns([row] * 2, responses)) == [1.0, len(answer) / (len(answer) + 3)]


def test_a_response_the_scorer_cannot_parse_is_wrong():
    rows = make_task("prime_factorization", {}, 2, 1, 1, 2)[0]
    assert reasoning_gym(*columns(rows, ["x", rows[1]["label"]])) == [0.0, 1.0]


def test_a_row_that_no_response_can_score_is_an_error():
    rows = make_task("prime_factorization", {}, 2, 1, 1, 2)[0]
    prompts, responses, labels, metadata = columns(rows, ["2", "x"])
    metadata[1]["answer"] = "two"
    with pytest.raises(SampleError, match="ValueError.*metadata is damaged") as error:
        reasoning_gym(prompts, responses, labels, metadata)
    assert error.value.index == 1


def test_rows_from_elsewhere_are_refused():
    with pytest.raises(SampleError, match=r"needs \['answer', 'entry', 'params', 'task'\]"):
        reasoning_gym(["p"], ["r"], ["l"], [{"level": 3}])
