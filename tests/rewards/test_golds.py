"""Labels that are errors, and labels that are compared as text."""

from __future__ import annotations

import time

import pytest

from megatron_rpp.rewards import RewardError, RewardSet
from megatron_rpp.rewards.golds import gold_problem, is_parsed, unread

BLANK = ["", " ", "\t\n", "\u200b", "\u00a0", "$$", "\\boxed{}", "\\text{}", "\\[ \\]", "####", "."]


@pytest.mark.parametrize("label", BLANK)
def test_a_blank_gold_is_an_error(label):
    assert gold_problem(label) == (
        f"needs an answer in the label, but this row's label is blank ({label!r}): correct or "
        "remove the row, or check data.label_key"
    )


def test_a_solution_without_its_answer_is_an_error():
    for label in ("She has 5.\n#### ", "So \\text{it} is\n####\n"):
        assert "this row's label ends without one ('S" in gold_problem(label)


def test_what_can_be_answered_is_no_error():
    for label in ("0", "None", "nan", "-", "\\{\\}", "\\emptyset", "[]", "#### 0", "\\boxed{5} {}"):
        assert gold_problem(label) is None


def test_a_blank_gold_ends_the_scoring():
    rewards = RewardSet(["math_verify"])
    with pytest.raises(RewardError, match="'math_verify' needs an answer in the label.*\nsample 1"):
        rewards.score(["p"] * 2, ["5"] * 2, ["5", "$$"], [{}] * 2)


def test_golds_that_are_read_as_mathematics():
    for label in (
        "72", "-1,234.5", "\\frac{1}{2}", "$x = 4$", "[1, 2)", "3 \\text{ or } -3", "10\\%", "(A)",
        "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "12 \\text{ cm}", "72 apples", "#### 72", "７",
        "9^{9^{9^9}}", "\\binom{10^9}{5}", "a=b=c", "Since $a=1$, the sum is $a+b=3$.", "$8+2=10$",
    ):  # fmt: skip
        assert is_parsed(label), label


def test_golds_that_only_the_same_words_equal():
    for label in (
        "Paris", "Yes", "None", "72 clips", "3 million", "Alice and Bob", "between 5 and 7", "是",
        "\\text{No solution}", "0.\\overline{3}", "AB \\perp CD", "x \\equiv 1 \\pmod 3", "?",
        "\\{x \\mid x > 2\\}", "\\left(1, 2\\right", "(" * 30 + "1" + ")" * 30, "1+" * 400,
    ):  # fmt: skip
        assert not is_parsed(label), label


def test_hostile_golds_end():
    start = time.monotonic()
    for label in (
        "9^{9^{9^9}}", "\\gcd(9^{9^{9}}, 6)", "\\binom{10000000}{5000000}", "\\boxed{" * 10_000,
        "\\boxed{" * 10_000 + "}" * 10_000, "(" * 100_000, "\\(" * 50_000, "$" * 100_000,
        "a" + " " * 100_000 + "b", "####a" * 20_000, "\\" * 100_000, "answer * " * 10_000,
        "The value is 5, " * 6_000 + "so 7.", "(" * 10 + "1" + ")" * 10, "x" * 500, "\ud800",
    ):  # fmt: skip
        gold_problem(label)
        is_parsed(label)
    assert time.monotonic() - start < 60  # each takes less than a second


def test_labels_that_are_no_mathematics_are_counted_and_shown():
    assert unread(["7", "\\frac{1}{2}", "7"]) is None
    assert unread(["7", "Paris", "1/2", "Rome", "Paris", "72 clips", "Oslo"]) == (
        "math_verify reads 4 of the 6 different labels in the first 7 rows as words and not as "
        "mathematics; only the same words equal them: 'Paris', 'Rome', '72 clips', ..."
    )
    assert RewardSet(["exact_match"]).note_on(["Paris"]) is None
    assert "1 of the 1 different" in RewardSet(["math_verify"], workers=1).note_on([None, "Paris"])


def test_a_large_data_set_is_examined_in_part():
    asked = []
    assert unread(asked.append(number) or str(number) for number in range(10_000)) is None
    assert len(asked) == 5000
