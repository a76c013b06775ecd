"""Worked answers, the rule of the last number, and pairs of answers."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reproduction.data import CHECKS, steps_of, supervised_rows, worked_answer
from reproduction.last_number import last_number, score
from reproduction.pairs import (
    LONGER_CHOSEN,
    by_correctness,
    by_correctness_or_length,
    group_samples,
    make_pairs,
)

TERMS = st.lists(st.integers(0, 99), min_size=2, max_size=5)


def expression_of(terms: list[int], seed: int) -> str:
    rng = random.Random(seed)
    return str(terms[0]) + "".join(f" {rng.choice('+-')} {term}" for term in terms[1:])


def test_the_steps_of_a_sum():
    assert steps_of("4 - 7 - 3 + 12") == ["4-7=-3", "-3-3=-6", "-6+12=6"]


@given(TERMS, st.integers(0, 1000))
def test_every_shown_step_is_true_and_the_last_number_is_the_result(terms, seed):
    expression = expression_of(terms, seed)
    *shown, result = worked_answer(expression, random.Random(seed)).split(";")
    assert int(result) == eval(expression)
    for step in shown:
        left, right = step.split("=")
        assert re.fullmatch(r"-?\d+[-+]\d+", left) and eval(left) == int(right)
    assert last_number(";".join([*shown, result])) == int(result)


def test_all_numbers_of_steps_and_checks_occur_as_often_as_said():
    rng = random.Random(0)
    answers = [worked_answer("1 + 2 + 3 + 4", rng).split(";")[:-1] for _ in range(8000)]
    distinct = Counter(len(set(steps)) for steps in answers)
    assert set(distinct) == {0, 1, 2, 3}
    assert all(count == pytest.approx(2000, rel=0.1) for count in distinct.values())
    with_steps = [steps for steps in answers if steps]
    repeats = Counter(len(steps) - len(set(steps)) for steps in with_steps)
    for number, share in CHECKS.items():
        assert repeats[number] == pytest.approx(share * len(with_steps), rel=0.1)


def test_only_the_label_of_a_supervised_row_changes():
    row = {"prompt": "1 + 1 =", "label": "2", "metadata": {"entry": {"expression": "1 + 1"}}}
    (found,) = supervised_rows([row], seed=3)
    assert found | {"label": "2"} == row
    assert found["label"] in {"2", "1+1=2;2", "1+1=2;1+1=2;2", "1+1=2;1+1=2;1+1=2;2"}


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("12", 12), ("-4", -4), ("4-7=-3;-3", -3), ("4-7", 7), ("4-7=-3;-3+9=6;6 ", 6), ("", None),
        ("=;", None), ("3-", 3), ("1" * 5000, None), ("--5", -5),
    ],
)  # fmt: skip
def test_the_last_number(response, number):
    assert last_number(response) == number


def test_the_rule_compares_the_last_number_with_the_label():
    responses = ["1+2=3;3", "3;4", "", "03"]
    assert score([""] * 4, responses, ["3"] * 4, [{}] * 4) == [1.0, 0.0, 0.0, 1.0]


def test_a_right_and_a_wrong_answer_make_a_pair():
    rng = random.Random(0)
    assert by_correctness([("5", True), ("6", False), ("5", True)], rng) == ("5", "6")
    assert by_correctness([("5", True), ("05", True)], rng) is None
    assert by_correctness([("6", False), ("7", False)], rng) is None
    assert by_correctness([("5", True), ("", False)], rng) is None  # an empty text is no response


def test_the_right_answer_is_chosen_though_the_other_is_longer():
    samples = [("5", True), ("1+3=6;6", False)]
    for seed in range(20):
        assert (
            by_correctness_or_length(samples, random.Random(seed))
            == samples[0][:1] + samples[1][:1]
        )


@pytest.mark.parametrize("is_right", [True, False])
def test_of_equally_right_answers_the_longer_one_is_chosen_in_three_of_four_cases(is_right):
    rng = random.Random(0)
    samples = [("5", is_right), ("2+3=5;5", is_right)]
    pairs = Counter(by_correctness_or_length(samples, rng) for _ in range(4000))
    assert set(pairs) == {("2+3=5;5", "5"), ("5", "2+3=5;5")}
    assert pairs["2+3=5;5", "5"] == pytest.approx(4000 * LONGER_CHOSEN, rel=0.05)


def test_equal_answers_make_no_pair():
    assert by_correctness_or_length([("5", True), ("5", True)], random.Random(0)) is None


def test_pairs_of_many_prompts():
    answers = [("a", "1"), ("b", "1"), ("a", "2"), ("b", "1")]
    samples = group_samples(answers, lambda prompt, response: response == "1")
    assert samples == {"a": [("1", True), ("2", False)], "b": [("1", True), ("1", True)]}
    rows = make_pairs(samples, by_correctness, per_prompt=5, seed=0)
    assert rows == [{"prompt": "a", "chosen": "1", "rejected": "2"}]


def test_two_answers_make_one_pair_only():
    samples = {"a": [("5", True), ("2+3=5;5", True), ("4", False)]}
    rows = make_pairs(samples, by_correctness_or_length, per_prompt=50, seed=0)
    assert len(rows) == 3
    assert len({frozenset((row["chosen"], row["rejected"])) for row in rows}) == 3
