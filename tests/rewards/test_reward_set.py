"""The weighted sum of reward functions and its errors."""

from __future__ import annotations

import pytest

from megatron_rpp.rewards import RewardError, RewardSet, Scores

PROMPTS, LABELS, METADATA = ["1+1=", "2+2=", "3+3="], ["2", "4", "6"], [{}, {}, {}]
RESPONSES = ["2", "5", " 6"]


@pytest.fixture
def user(tmp_path):
    """Makes the name of a user function with the given body, of arguments p, r, l, m."""

    def make(body: str) -> str:
        path = tmp_path / f"user{len(list(tmp_path.iterdir()))}.py"
        path.write_text(f"import numpy as np\ndef f(p, r, l, m):\n    {body}\n")
        return f"{path}:f"

    return make


def score(name: str, responses: list[str] = RESPONSES) -> Scores:
    return RewardSet([name]).score(PROMPTS, responses, LABELS, METADATA)


def test_weighted_sum_and_parts(user):
    short = user("return [-0.25 * len(x) for x in r]")
    scores = RewardSet(["exact_match", short], weights=[2.0, 1.0]).score(
        PROMPTS, RESPONSES, LABELS, METADATA
    )
    assert scores.parts == {"exact_match": [1.0, 0.0, 1.0], short: [-0.25, -0.25, -0.5]}
    assert scores.total == [1.75, -0.25, 1.5]


def test_no_weights_means_one_each(user):
    half = user("return [0.5] * len(r)")
    total = RewardSet(["exact_match", half]).score(PROMPTS, RESPONSES, LABELS, METADATA).total
    assert total == [1.5, 0.5, 1.5]


def test_functions_see_all_columns(user):
    name = user(
        "return [len(a) + 10 * len(b) + 100 * len(c) + 1000 * d['x']"
        " for a, b, c, d in zip(p, r, l, m)]"
    )
    scores = RewardSet([name]).score(["aa", "a"], ["b", "bbb"], ["c", ""], [{"x": 1}, {"x": 2}])
    assert scores.total == [1112.0, 2031.0]


@pytest.mark.parametrize(
    "body",
    [
        "return [True, False, True]",
        "return (1, 0, 1)",
        "return np.array([1, 0, 1])",
        "return np.array([True, False, True])",
        "return list(np.array([1, 0, 1], dtype=np.float32))",
    ],
)
def test_scores_become_floats(user, body):
    total = score(user(body)).total
    assert total == [1.0, 0.0, 1.0]
    assert all(type(value) is float for value in total)


def test_an_empty_batch_is_not_shown_to_the_functions(user):
    name = user("return [1 / len(r)]")
    assert RewardSet([name, "exact_match"]).score([], [], [], []) == Scores(
        [], {name: [], "exact_match": []}
    )


def test_an_exception_names_function_error_and_first_sample(user):
    name = user("raise KeyError('answer')")
    with pytest.raises(RewardError) as error:
        score(name)
    assert str(error.value) == (
        f"reward function {name!r} raised KeyError: 'answer'\n"
        "first of 3 samples:\n  prompt:   '1+1='\n  response: '2'\n  label:    '2'"
    )
    assert isinstance(error.value.__cause__, KeyError)


@pytest.mark.parametrize(
    "bad", ["float('nan')", "float('-inf')", "10**400", "None", "'1'", "1j", "[1.0]"]
)
def test_a_score_that_is_no_finite_number_shows_its_sample(user, bad):
    name = user(f"return [1.0, {bad}, 0.0]")
    with pytest.raises(RewardError) as error:
        score(name)
    assert name in str(error.value) and "not a finite number" in str(error.value)
    assert "sample 1 of 3" in str(error.value) and "prompt:   '2+2='" in str(error.value)


@pytest.mark.parametrize(
    "body, problem",
    [
        ("return [1.0]", "returned 1 scores for 3 responses"),
        ("return [1.0] * 4", "returned 4 scores for 3 responses"),
        ("return None", "returned NoneType, not a list"),
        ("return 1.0", "returned float, not a list"),
        ("return (1.0 for x in r)", "returned generator, not a list"),
        ("return {0: 1, 1: 1, 2: 1}", "returned dict, not a list"),
        ("return '111'", "returned str, not a list"),
    ],
)
def test_wrong_returns(user, body, problem):
    name = user(body)
    with pytest.raises(RewardError) as error:
        score(name)
    assert name in str(error.value) and problem in str(error.value)


def test_a_missing_label_shows_its_sample():
    with pytest.raises(RewardError) as error:
        RewardSet(["exact_match"]).score(PROMPTS, RESPONSES, ["2", "4", None], METADATA)
    assert "'exact_match' needs a label" in str(error.value)
    assert "sample 2 of 3" in str(error.value) and "label:    None" in str(error.value)


def test_long_texts_are_shortened(user):
    with pytest.raises(RewardError) as error:
        score(user("raise RuntimeError('no')"), ["a" * 3000 + "end", "", ""])
    message = str(error.value)
    assert len(message) < 1200 and "end'" in message and "2505 characters" in message


@pytest.mark.parametrize(
    "names, weights, problem",
    [
        ([], [], "reward.functions"),
        (["exact_match", "exact_match"], [], "different names"),
        (["exact_match"], [1.0, 2.0], "reward.weights"),
        (["exact_match"], [float("nan")], "reward.weights"),
        (["exact"], [], "unknown reward function 'exact'"),
    ],
)
def test_invalid_settings_are_errors(names, weights, problem):
    with pytest.raises(ValueError, match=problem):
        RewardSet(names, weights=weights)
