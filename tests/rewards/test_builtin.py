"""The built-in reward functions."""

from __future__ import annotations

import json

import pytest

from megatron_rpp.data.tasks import make_task
from megatron_rpp.rewards import RewardError, RewardSet, SampleError, load_reward
from megatron_rpp.rewards.builtin import exact_match, reasoning_gym


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
    sums = make_task(
        "chain_sum", {"max_digits": 2}, train_size=4, eval_size=2, train_seed=1, eval_seed=2
    )[0]
    words = make_task("spell_backward", {}, train_size=4, eval_size=2, train_seed=1, eval_seed=2)[0]
    rows = [row for pair in zip(sums, words) for row in pair]
    right = [f" {row['label']}\n" for row in rows]
    assert reasoning_gym(*columns(rows, right)) == [1.0] * 8
    swapped = [rows[i ^ 1]["label"] for i in range(8)]
    assert max(reasoning_gym(*columns(rows, swapped))) < 1.0


def test_reasoning_gym_keeps_the_librarys_leniency_and_part_marks():
    row = make_task(
        "chain_sum",
        {"min_digits": 2, "max_digits": 2},
        train_size=1,
        eval_size=1,
        train_seed=1,
        eval_seed=2,
    )[0][0]
    answer = row["label"]
    responses = [f"{answer}.0", f"{answer} !!"]
    # Equal decimals are correct; an answer inside other text gets its share of the characters.
    assert reasoning_gym(*columns([row] * 2, responses)) == [1.0, len(answer) / (len(answer) + 3)]


def test_a_response_the_scorer_cannot_parse_is_wrong():
    rows = make_task(
        "prime_factorization", {}, train_size=2, eval_size=1, train_seed=1, eval_seed=2
    )[0]
    assert reasoning_gym(*columns(rows, ["x", rows[1]["label"]])) == [0.0, 1.0]


def test_a_row_that_no_response_can_score_is_an_error():
    rows = make_task(
        "prime_factorization", {}, train_size=2, eval_size=1, train_seed=1, eval_seed=2
    )[0]
    prompts, responses, labels, metadata = columns(rows, ["2", "x"])
    metadata[1]["answer"] = "two"
    with pytest.raises(SampleError, match="ValueError.*metadata is damaged") as error:
        reasoning_gym(prompts, responses, labels, metadata)
    assert error.value.index == 1


def test_rows_from_elsewhere_are_errors():
    with pytest.raises(SampleError, match=r"needs \['answer', 'entry', 'params', 'task'\]"):
        reasoning_gym(["p"], ["r"], ["l"], [{"level": 3}])


def scores(function, label: str | None, responses: list[str], tokens: int = 0) -> list[float]:
    count = len(responses)
    return function([""] * count, responses, [label] * count, [{"response_tokens": tokens}] * count)


@pytest.mark.parametrize(
    "label, right, wrong",
    [
        ("42", ["The answer is \\boxed{42}.", "$42$", "\\boxed{42.0}"], ["43", "", "\\boxed{-42}"]),
        ("\\frac{1}{2}", ["\\boxed{0.5}", "$1/2$", "\\boxed{\\dfrac{2}{4}}"], ["$2$"]),
        ("1/3", ["\\boxed{\\frac{1}{3}}"], ["\\boxed{0.3}"]),
        ("x^2 + 2x + 1", ["$(x+1)^2$", "\\boxed{1 + 2x + x^2}"], ["$x^2 + 1$"]),
        ("\\sqrt{8}", ["$2\\sqrt{2}$"], ["$\\sqrt{2}$"]),
        ("(1,2)", ["\\boxed{(1, 2)}"], ["\\boxed{(2, 1)}"]),
        ("\\boxed{7}", ["7"], ["8"]),
    ],
)  # fmt: skip
def test_math_verify_knows_equal_answers(label, right, wrong):
    function = load_reward("math_verify")
    assert scores(function, label, right) == [1.0] * len(right)
    assert scores(function, label, wrong) == [0.0] * len(wrong)


def test_math_verify_in_workers():
    rewards = RewardSet(["math_verify"], workers=1)
    result = rewards.score(["p"] * 2, ["\\boxed{\\frac{2}{4}}", "3"], ["0.5", "0.5"], [{}] * 2)
    assert result.total == [1.0, 0.0] and result.timeouts == 0
    with pytest.raises(RewardError, match="'math_verify' needs a label, but this row has none"):
        rewards.score(["p"], ["3"], [None], [{}])


def test_regex_searches_and_may_compare_with_the_label():
    form = load_reward("regex", {"pattern": "^<think>.*</think>"})
    assert scores(form, None, ["<think>a\nb</think> c", "a <think></think>"]) == [1.0, 0.0]
    answer = load_reward("regex", {"pattern": "#### (.*?)$", "equals_label": True})
    assert scores(answer, "7", ["#### 7", "#### 8", "7", "#### 8 #### 7 "]) == [1.0, 0.0, 0.0, 0.0]
    last = load_reward("regex", {"pattern": r"#### (\d+)", "equals_label": True})
    assert scores(last, " 7", ["#### 8 then #### 7", "#### 7 then #### 8"]) == [1.0, 0.0]


def test_a_pattern_that_backtracks_for_ever_costs_one_sample():
    options = {"regex": {"pattern": "(a+)+$"}}
    rewards = RewardSet(["regex"], options=options, workers=1, timeout=2.0, timeout_score=-1.0)
    result = rewards.score(["p"] * 3, ["aa", "a" * 60 + "b", "b"], [None] * 3, [{}] * 3)
    assert result.total == [1.0, -1.0, 0.0] and result.timeouts == 1


def test_length_is_the_soft_punishment_of_dapo():
    function = load_reward("length", {"max_tokens": 100, "buffer_tokens": 20})
    expected = {0: 0.0, 80: 0.0, 85: -0.25, 90: -0.5, 100: -1.0, 500: -1.0}
    assert {tokens: scores(function, None, [""], tokens)[0] for tokens in expected} == expected


@pytest.mark.parametrize(
    "name, options, problem",
    [
        ("regex", {}, r"must be among \['equals_label', 'pattern'\] and hold \['pattern'\], got"),
        ("regex", {"pattern": "a", "flags": 1}, r"got \['flags', 'pattern'\]"),
        ("regex", {"pattern": "(a"}, "'\\(a' is not a regular expression"),
        ("regex", {"pattern": "a", "equals_label": True}, "'a' has no group"),
        ("length", {"max_tokens": 10, "buffer_tokens": 20}, "at most max_tokens = 10, got 20"),
        ("length", {"max_tokens": "a", "buffer_tokens": 2}, "reward.options of 'length'"),
        ("exact_match", {"case": 1}, "'exact_match' takes no reward.options"),
    ],
)
def test_invalid_options_are_errors(name, options, problem):
    with pytest.raises(ValueError, match=problem):
        RewardSet([name], options={name: options})


def test_options_of_no_function():
    with pytest.raises(ValueError, match=r"reward.options has \['regexp'\], but reward.functions"):
        RewardSet(["exact_match"], options={"regexp": {}})
