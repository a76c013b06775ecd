r"""Decides whether two final answers are equal: with math-verify, or else by comparing their texts.

math-verify reads much that is not mathematics as a product of letters ("Paris" = P*a*r*i*s) or as
a quotient ("12:30" = 12/30). So words, times of day and numbers with a base are equal only if their
texts are. Texts are compared without spaces, ``\text`` and the like, and in lower case if there is
no other LaTeX. Left out: time limits; the workers have one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn, TypeAlias

from antlr4 import CommonTokenStream, InputStream
from antlr4.error.ErrorListener import ErrorListener
from latex2sympy2_extended import NormalizationConfig, normalize_latex
from latex2sympy2_extended.antlr_parser import PSLexer, PSParser
from math_verify import parse, verify
from math_verify.grader import is_equation, take_last_relation
from math_verify.parser import get_last_eq, parse_latex_cached
from sympy import Basic, MatrixBase, nan, zoo

from megatron_rpp.rewards.answers import final_answer, marked_answer, tidy

Value: TypeAlias = Basic | MatrixBase

_LONGEST, _DEEPEST = 500, 10
"""Most characters, and most nested brackets, of an answer that is parsed. The time of the parser
grows with both: thirty nested brackets take seconds."""

_NUMBER = re.compile(r"-?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?")
_LITERAL = {
    "words": re.compile(r"[^\W\d_]{3,}"),
    "time": re.compile(r"(?:[01]?\d|2[0-4]):[0-5]\d(?:[ap]\.?m)?"),
    "based": re.compile(r"-?[\da-z.]+_\d+"),
}
"""Answers that are equal only if their texts are."""

_WORD = re.compile(r"(?<!\\begin{)(?<!\\end{)(?<![\\a-zA-Z])[a-zA-Z]{4,}")

_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it)|operatorname)\s*{([^{}]*)}"
)
_SPACE = re.compile(r"\\[,;:!\s]|\\q?quad(?![a-zA-Z])|~")
_SIZE = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\?\$")

_UNIT = re.compile(
    r"(?:\\(?:text|mbox|math)\w*\s*{[^{}]*}(?:\^{?\d}?)?|\s(?:\s*[a-zA-Z]{2,}\s)*\s*[a-zA-Z]+"
    r"|(?<=\d)(?:[kcm]m|k?g|ft|mph|hrs?|min))\Z"
)
_ASSIGNMENT = re.compile(r"\A\\?[a-zA-Z]+(?:_{?\w+}?)?\s*=")
_LETTER = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]")
_CURRENCY = re.compile("[€£¥₹₩]")
_FLOAT = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])")
_SYNONYMS = {r"\degree": r"^\circ", r"\varnothing": r"\emptyset", "~": " "}


def is_equal(label: str, response: str) -> bool:
    """Whether the final answer of the response equals that of the label."""
    gold = _gold(label)
    marked = marked_answer(response)
    answer = _plain(final_answer(response) if marked is None else marked)
    if gold.text == answer:
        return True
    if gold.value is None or _are_literals_of_one_kind(gold.text, answer):
        return False
    if marked is None:
        value = _last_value(response)
    else:
        value = _value(marked, units=not gold.value.free_symbols)
    return value is not None and verify(gold.value, value, timeout_seconds=None)


def is_parsed(label: str) -> bool:
    """Whether the final answer of a label is read as mathematics, not as words.

    Only the grammar is checked and nothing is evaluated, so the time is bounded for any label.
    """
    text = final_answer(label)
    if _NUMBER.fullmatch(text):
        return True
    if not _is_parsable(text) or _LITERAL["words"].fullmatch(_plain(text)):
        return False
    latex = _normalized(text)
    if _WORD.search(latex):
        return False  # to the parser "72 clips" is 72*c*l*i*p*s, and not 72
    return _is_grammatical(latex) or _is_grammatical(get_last_eq(latex))


@dataclass(frozen=True)
class _Gold:
    text: str
    value: Value | None


@lru_cache(maxsize=4096)
def _gold(label: str) -> _Gold:
    text = final_answer(label)
    return _Gold(_plain(text), _value(text))


def _are_literals_of_one_kind(gold: str, answer: str) -> bool:
    return any(kind.fullmatch(gold) and kind.fullmatch(answer) for kind in _LITERAL.values())


def _plain(text: str) -> str:
    """An answer as it is compared as text."""
    text = _SPACE.sub(" ", _SIZE.sub("", _TEXT.sub(r"\1", text)))
    text = re.sub(r"_{(\d+)}", r"_\1", re.sub(r"\\[dt]frac", r"\\frac", text))
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r",? ?\b(?:and|or)\b", ",", " ".join(text.split()))
    text = re.sub(r"(?<!\d) | (?!\d)|(?<!\.)\.\Z", "", text)
    text = re.sub(r"\A\(?([a-zA-Z])\)\Z", r"\1", text)  # multiple choice: (B) is B
    text = re.sub(r"\A0(?=\d:)", "", text)
    return text if "\\" in text else text.casefold()


def _last_value(response: str) -> Value | None:
    """What math-verify finds in a response that does not mark its answer."""
    found = parse(tidy(response), parsing_timeout=None)
    return next((_result(value) for value in found if isinstance(value, Value)), None)


def _value(text: str, *, units: bool = False) -> Value | None:
    """The value of an answer. units: also drop a unit that could be a variable."""
    if not _is_parsable(text):
        return None
    try:
        value = parse_latex_cached(_normalized(text, units=units))
    except Exception:  # the library itself catches any type here, too
        return None
    return _result(value) if isinstance(value, Value) and not value.has(nan, zoo) else None


def _result(value: Value) -> Value:
    """The right side of a computation, such as 10 of "8 + 2 = 10"; any other value as it is."""
    if is_equation(value) and not value.free_symbols:
        return take_last_relation(value).rhs
    return value


def _is_parsable(text: str) -> bool:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return bool(text) and len(text) <= _LONGEST and deepest <= _DEEPEST


def _normalized(text: str, *, units: bool = False) -> str:
    units = units or _has_unit(text)
    config = NormalizationConfig(units=units, malformed_operators=True, nits=True, boxed="none")
    text = _FLOAT.sub(r"\1 \\times 10^{\2}", _CURRENCY.sub("", text))
    for synonym, known in _SYNONYMS.items():
        text = text.replace(synonym, known)
    return normalize_latex(text, config)


def _has_unit(text: str) -> bool:
    """Whether a text is a number with a unit: the h of "2 h" is a unit, that of "2 r h" is not."""
    return not _LETTER.search(_ASSIGNMENT.sub("", _UNIT.sub("", text)))


class _Strict(ErrorListener):
    def syntaxError(self, *details: object) -> NoReturn:
        raise SyntaxError(details)


def _is_grammatical(latex: str) -> bool:
    lexer = PSLexer(InputStream(latex))
    parser = PSParser(CommonTokenStream(lexer))
    for recognizer in (lexer, parser):
        recognizer.removeErrorListeners()
        recognizer.addErrorListener(_Strict())
    try:
        parser.math()
    except Exception:  # the generated parser may raise anything else as well
        return False
    return True
