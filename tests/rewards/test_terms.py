"""Mathematical answers, patterns and lengths."""

from __future__ import annotations

import pytest

from megatron_rpp.rewards import RewardError, RewardSet, load_reward


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
def test_options_that_cannot_be(name, options, problem):
    with pytest.raises(ValueError, match=problem):
        RewardSet([name], options={name: options})


def test_options_of_no_function():
    with pytest.raises(ValueError, match=r"reward.options has \['regexp'\], but reward.functions"):
        RewardSet(["exact_match"], options={"regexp": {}})
