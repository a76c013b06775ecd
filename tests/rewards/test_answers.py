"""Which part of a label or a response is its final answer."""

from __future__ import annotations

import pytest

from megatron_rpp.rewards.answers import final_answer, is_blank, marked_answer

GSM8K = (
    "In April she sold 48 clips.\nIn May she sold 48/2 = <<48/2=24>>24 clips.\n"
    "Altogether that is 48+24 = <<48+24=72>>72 clips.\n#### 72"
)


@pytest.mark.parametrize(
    "text, answer",
    [
        (GSM8K, "72"),
        ("... \n#### $1,080 ", "$1,080"),
        ("...\n#### 110\nThe answer is: 110", "110"),  # MetaMathQA
        ("#### Step 1\nWe add, so the sum is $12$.", "$12$"),  # a heading of Markdown
        ("compute \\boxed{3} first\n#### 72", "72"),
        ("#### \\boxed{72}", "72"),
    ],
)
def test_what_follows_four_hashes(text, answer):
    assert final_answer(text) == answer
    assert final_answer(f"So \\boxed{{{text}}}.") == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Since $x-1=7$, we have $x=8$. The answer is $\\boxed{8}$.", "8"),
        ("\\boxed{5} \\boxed{6}", "6"),
        ("First \\boxed{3}, then we subtract, so \\boxed{2}.", "2"),
        ("\\boxed{840}., but \\boxed{840}", "840"),
        ("\\boxed{5} or wait, \\boxed{", "5"),
        ("\\boxed{5} or wait, \\boxed{6", "5"),
        ("\\boxed{5}, which is put in \\boxed{}", "5"),
        ("$x = \\boxed{3}$ or $x = \\boxed{-3}$", "3, -3"),
        ("\\boxed{3}, \\boxed{4} and \\boxed{5}", "3, 4, 5"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{x = \\boxed{5}}", "5"),
        ("\\boxed {5} and nothing else, \\fbox{6}", "6"),
        ("\\boxed{\\frac{1}{2}", "\\frac{1}{2}"),
        ("cut off: \\boxed{12", "12"),
    ],
)
def test_boxes(text, answer):
    assert final_answer(text) == marked_answer(text) == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        ("The answer is 7.", "7"),
        ("The answer is 7. This is because $3+4=7$ and 7 is odd.", "7"),
        ("**Final Answer**: **73**", "73"),
        ("Answer: (B)", "(B)"),
        ("The answer is not obvious. We add, so the sum is $12$.", "$12$"),
        ("We need $x-1=7$ or $x-1=-7$, so $x=8$ or $x=-6$, whose sum is $8+(-6)=2$.", "$8+(-6)=2$"),
        ("We need $x-1=7$ or $x-1=-7$, so $x=8$ or $x=-6$, whose sum is $8+(-6)=2$", "$8+(-6)=2$"),
        ("We have \\[x=3\\] and \\(y=4\\), so the product is \\(12\\).", "12"),
        ("The solutions are $3$ and $-3$.", "$3$, $-3$"),
        ("She has 5 apples and buys 7.\nAltogether she has 1,012.", "1,012"),
        ("She paid $5 and got $3 back, so the price was $2.", "$2"),
    ],
)
def test_sentences(text, answer):
    assert final_answer(text) == answer
    assert marked_answer(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "between 5 and 7",
        "from 5 to 7 hours of work",
        "3 apples and 4 pears",
        "All integers greater than 5",
        "$3$ for even $n$, $4$ for odd $n$",
        "5 \\text{ or } 6",
        "Paris",
    ],
)
def test_what_is_one_answer_stays_whole(text):
    assert final_answer(text) == final_answer(f"{text}.") == text


@pytest.mark.parametrize(
    "text, answer",
    [
        (" 7. ", "7"),
        ("7 \\\\", "7"),
        ("\\(7\\)", "7"),
        ("\\[7\\]", "7"),
        ("**42**", "42"),
        ("7}", "7"),
        ("{7", "{7}"),
        ("５", "5"),
        ("−5\u200b", "-5"),
        ("\u00a05\u3000", "5"),
        ("1 000 000", "1000000"),
        ("1\\,000", "1000"),
        ("2 1/2", "2\\frac{1}{2}"),
        ("0.333...", "0.333..."),
        ("5!", "5!"),
        ("1 2", "1 2"),
        ("(1, 2)", "(1, 2)"),
    ],
)
def test_what_surrounds_an_answer_is_left_out(text, answer):
    assert final_answer(text) == answer


def test_blank_texts():
    blank = ["", " \n", "\u200b", "\u00a0", "$$", "$ $", "\\boxed{}", "\\text{ }", "\\(\\)", "."]
    assert [text for text in blank if not is_blank(text)] == []
    for text in ("0", "-", "\\{\\}", "()", "?", "nan"):
        assert not is_blank(text)
