"""Which answers math_verify considers equal. Every expected value follows from the mathematics."""

from __future__ import annotations

import pytest

from megatron_rpp.rewards import load_reward

CASES = [
    # label, answers that equal it, answers that do not; each stands in a box
    # numbers
    ("42", ["42.0", "042", "x = 42", "42 \\text{ cm}", "+42"], ["43", "-42", "4 2", "42, 43"]),
    ("7.", ["7"], ["-7"]),
    ("7 \\\\", ["7"], ["8"]),
    ("７", ["7"], ["8"]),
    ("−7", ["-7"], ["7"]),
    ("7\u200b", ["7"], ["8"]),
    ("1 000", ["1000", "1,000", "10^3"], ["1", "0"]),
    ("1,234", ["1234", "1{,}234", "1\\,234"], ["(1,234)", "1"]),
    ("2\\frac{1}{2}", ["\\frac{5}{2}", "2.5", "2 1/2"], ["1", "\\frac{1}{2}"]),
    ("-2 1/2", ["-\\frac52", "-2.5"], ["-1.5"]),
    ("3/4", ["0.75", "\\frac{6}{8}", "75\\%"], ["0.7", "\\frac{4}{3}"]),
    ("-\\frac{1}{3}", ["\\frac{-1}{3}", "-\\dfrac13"], ["\\frac13"]),
    ("1/3", ["0.33333333", "\\tfrac{1}{3}"], ["0.33"]),
    ("0.\\overline{3}", ["0.\\overline{3}"], ["0.\\overline{4}", "0"]),
    ("0.333...", ["0.333..."], ["0.333"]),
    ("7\\%", ["7%", "0.07", "7"], ["8\\%"]),
    ("1.5 \\times 10^{3}", ["1500", "1.5e3"], ["1.5 \\times 10^{4}"]),
    ("1e-3", ["0.001"], ["1", "-3"]),
    ("1011_2", ["1011_{2}"], ["1011_3", "1010_2"]),
    ("\\sqrt{2}", ["1.414213562", "\\frac{2}{\\sqrt2}"], ["1.41"]),
    ("3+4i", ["4i + 3"], ["3-4i"]),
    ("8+(-6)=2", ["2", "8-6=2"], ["8", "-6"]),
    # units, money, times
    ("5 \\text{ cm}", ["5", "5 cm", "5cm"], ["6 \\text{ cm}"]),
    ("90^\\circ", ["90", "90°", "90 \\text{ degrees}"], ["45^\\circ"]),
    ("\\$1,234.50", ["1234.5", "€1234.50"], ["1"]),
    ("72 clips", ["72 \\text{ clips}"], ["71 clips"]),
    ("12:30", ["12:30", "12\\text{:}30"], ["2:05", "12:31"]),
    ("3:00", ["3:00"], ["3:30", "0"]),
    ("3:2", ["\\frac{3}{2}"], ["2:3"]),
    # a last letter is a unit only of a number
    ("5c", ["5c"], ["5"]),
    ("2x + 3t", ["3t + 2x"], ["2x + 3"]),
    ("2 \\pi r h", ["2 \\pi h r"], ["2 \\pi r"]),
    ("3 \\text{ if } x > 0, 4 \\text{ otherwise}", [], ["3", "4"]),
    # algebra
    ("x^2 + 3x + 2", ["2 + 3x + x^2", "(x+1)(x+2)"], ["x^2 + 3x", "x^2 + 3x + 1"]),
    ("\\frac{n(n+1)}{2}", ["\\frac{n^2+n}{2}"], ["n(n+1)"]),
    ("y = 2x + 3", ["2x + 3", "y = 3 + 2x"], ["2x"]),
    ("x = 4", ["4"], ["5"]),
    ("f(2) = 5", ["5"], ["2"]),
    ("\\frac{x^2}{4} + \\frac{y^2}{3} = 1", ["3x^2 + 4y^2 = 12"], ["1"]),
    # ranges
    ("[1, 2)", ["\\left[1, 2\\right)"], ["[1, 2]", "(1, 2)", "1"]),
    ("(-∞, 3]", ["(-\\infty, 3]"], ["(-\\infty, 3)"]),
    ("x \\leqslant 3", ["x \\le 3", "3 \\ge x", "(-\\infty, 3]"], ["x < 3", "3"]),
    ("(-\\infty,2)\\cup(3,+\\infty)", ["(3,\\infty)\\cup(-\\infty,2)"], ["(-\\infty,2)"]),
    # several values
    ("5 or 6", ["6 or 5", "5, 6", "\\{6, 5\\}", "6 \\text{ and } 5"], ["5", "6", "5, 6, 7"]),
    ("1331 and 1728", ["1728, 1331"], ["1728"]),
    ("\\pm 2", ["2, -2", "x = \\pm 2"], ["2", "-2"]),
    ("\\{1, 2\\}", ["\\{2, 1\\}"], ["1"]),
    ("x=1, y=2", ["y=2, x=1"], ["x=1", "x=2, y=1"]),
    ("(3, 4)", ["\\left( 3, 4 \\right)"], ["(4, 3)", "3", "[3, 4]"]),
    ("(1,2), (3,4)", ["(3,4), (1,2)"], ["(1,2)"]),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", ["\\begin{bmatrix}1\\\\2\\end{bmatrix}"], ["1"]),
    ("\\emptyset", ["\\{\\}", "\\varnothing"], ["0"]),
    # words
    ("Paris", ["paris", "\\text{Paris}", "\\textbf{Paris}."], ["London", "spiraP", "P"]),
    ("\\text{CAB}", ["CAB"], ["ABC"]),
    ("abc", ["a \\cdot b \\cdot c"], ["ab"]),
    ("no solution", ["\\text{No solution}"], ["\\text{no}", "0"]),
    ("infinitely many", ["\\text{infinitely many}"], ["\\infty"]),
    ("None", ["none"], ["0"]),
    ("(A)", ["A", "\\text{(A)}", "\\mathrm{A}", "A."], ["B", "(B)"]),
    ("(B) 12", ["\\textbf{(B)}\\ 12"], ["12", "(C) 12"]),
    ("A and C", ["C, A"], ["A"]),
    ("Alice and Bob", ["Bob and Alice"], ["Alice"]),
    ("between 5 and 7", [], ["5", "7"]),
    # solutions
    ("Natalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72", ["72"], ["48", "24"]),
    ("So $x=8$ or $x=-6$, whose sum is $8+(-6)=2$.", ["2"], ["8", "-6", "8, -6"]),
    ("Since $x-1=7$, we have $\\boxed{8}$.", ["8"], ["7", "1"]),
    ("The roots are \\boxed{3} and \\boxed{-3}.", ["\\pm 3"], ["3", "-3"]),
    ("So she has 12 apples left.", ["12"], ["11"]),
    ("All integers greater than 5.", [], ["5"]),
    # damaged LaTeX
    ("\\frac{1}{2", ["0.5"], ["1", "2"]),
    ("{7", ["7"], ["8"]),
    ("$7", ["7"], ["8"]),
    ("\\left(1, 2\\right", [], ["2", "1"]),
]  # fmt: skip


def scores(label: str, responses: list[str]) -> list[float]:
    count = len(responses)
    return load_reward("math_verify")([""] * count, responses, [label] * count, [{}] * count)


@pytest.mark.parametrize("label, right, wrong", CASES, ids=[case[0][:20] for case in CASES])
def test_answers_in_a_box(label, right, wrong):
    responses = [f"So the answer is \\boxed{{{answer}}}." for answer in [label, *right, *wrong]]
    assert scores(label, responses) == [1.0] * (1 + len(right)) + [0.0] * len(wrong)


@pytest.mark.parametrize(
    "label, right, wrong",
    [
        ("6", ["\\boxed{5} \\boxed{6}", "5, no, \\boxed{6}"], ["\\boxed{6} \\boxed{5}"]),
        ("5", ["\\boxed{5} or wait, \\boxed{"], ["\\boxed{5} and \\boxed{6}", "5, no, \\boxed{6}"]),
        ("5, 6", ["\\boxed{5} and \\boxed{6}"], ["\\boxed{5} \\boxed{6}", "\\boxed{5}"]),
        ("42", ["It is 42.", "$6 \\cdot 7 = 42$", "**Answer:** 42", "#### 42"], ["42, or 41", ""]),
        ("Paris", ["Paris.", "The answer is Paris.", "$\\text{Paris}$"], ["I like London", ""]),
        ("(B)", ["Answer: B", "The correct answer is (B)."], ["Answer: C", "(A) or (B)"]),
        ("72", ["I think 71.\n#### 72"], ["I think 72.\n#### 71"]),
    ],
)
def test_other_responses(label, right, wrong):
    assert scores(label, right) == [1.0] * len(right)
    assert scores(label, wrong) == [0.0] * len(wrong)


def test_the_score_depends_on_label_and_response_alone():
    labels, answers = ["\\begin{pmatrix}1\\\\2\\end{pmatrix}", "5 or 6", "x > 3"], ["5, 6", "x > 3"]
    pairs = [(label, f"\\boxed{{{answer}}}") for label in labels for answer in [*labels, *answers]]
    once = {pair: scores(pair[0], [pair[1]]) for pair in pairs}
    assert {pair: scores(pair[0], [pair[1]]) for pair in reversed(pairs)} == once
