r"""Finds the final answer in a text, as text. The same rules apply to labels and responses.

    text                                   final answer
    ... \boxed{8} ...                      the last closed box that is not blank; boxes separated
                                           only by "and", "or", "," or ";" are one list
    ... #### 72                            what follows the last "####", if that is one line
    The answer is 7. / Answer: B           what follows, up to the end of the sentence
    Since $x=8$, the sum is $8+2=10$.      the last expression of the sentences
    anything else                          the whole text

Left out: what an answer means (equality.py).
"""

from __future__ import annotations

import re
from typing import NamedTuple

_SIGNS = {"−": "-", "∞": r"\infty ", "·": r"\cdot ", "⋅": r"\cdot ", "°": r"^\circ "}
_SIGNS |= {"²": "^2", "³": "^3", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"}
_SPACES = (0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000)
_INVISIBLE = (0xAD, 0x200B, 0x200C, 0x200D, 0x200E, 0x200F, 0x2060, 0xFEFF)
_CHARACTERS = (
    {full_width: full_width - 0xFEE0 for full_width in range(0xFF01, 0xFF5F)}
    | dict.fromkeys(_SPACES, " ")
    | dict.fromkeys(_INVISIBLE)
    | str.maketrans(_SIGNS)
)
"""Characters that math-verify does not know, and what stands for them."""

_FILLING = re.compile(
    r"\\(?:text|mbox|mathrm|boxed|fbox|q?quad|left|right|displaystyle)(?![a-zA-Z])"
    r"|\\[,;:!()\[\]\s\\$]|(?<!\\)[{}]|[\s$*#~.,]|\\$"
)
"""Text that is not an answer on its own."""

_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
_BOXES = 50
"""Only this many boxes are examined, from the end: thousands of nested ones would take minutes."""

_ANNOUNCEMENT = re.compile(r"\banswer[\s*]*(?:is\b|[:=])[\s:*]*(?=\S)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|\.\s")

_FORMULA = r"\$\$[^$]+\$\$|\$(?=\S)[^$\n]+(?<=\S)\$(?!\d)"
_FORMULA += r"|\\\((?:(?!\\\().)+?\\\)|\\\[(?:(?!\\\[).)+?\\\]"
_NUMBER = r"(?<![\w.])-?\$?\d[\d,]*(?<!,)(?:\.\d+)?(?:/\d+)?(?:\s*\\?%)?"
_EXPRESSION = re.compile(f"{_FORMULA}|{_NUMBER}", re.DOTALL)
_SEPARATOR = re.compile(r"(?:[,;](?:and|or)?|and|or)(?:\\?[a-zA-Z]{1,6}_?\d*=)?")
_BESIDE_SEPARATORS = re.compile(r"\\text|\\q?quad|\\[()\[\],;\s]|[\s${}*]")

_WORD = re.compile(r"(?<![\\a-zA-Z])(?!(?:and|or)\b)[a-zA-Z]{2,}")
_STATEMENT = re.compile(r"(?!(?:All|Any|Every|No|None|Only)\b)[A-Z].*(?:\.|\n.*)", re.DOTALL)
"""Sentences, except such as "All integers above 5.", whose last number is only part of the
answer."""
_LINK = re.compile(
    r"\b(?:is|are|equals?|equal to|gets?|gives?|has|have|obtain|so|thus|hence|therefore)[\s:,]*\Z",
    re.IGNORECASE,
)

_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]")
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:(?:\\[,;:!\s]|[ ~])\d{3})+(?!\d)")
_MIXED_NUMBER = re.compile(r"(?<![\d./^_}])(\d+)\s+(\d+)/(\d+)(?![\d./])")


def final_answer(text: str) -> str:
    """The final answer, without decoration around it; it may be blank."""
    text = tidy(text)
    marked = marked_answer(text)
    if marked is not None:
        return marked
    announced = _announced(text)
    return _bare(_last_expression(text)) if announced is None else announced


def marked_answer(text: str) -> str | None:
    """The final answer if the text marks it with a box or "####", else None; it may be blank."""
    text = tidy(text)
    box, hashes = _last_box(text), _after_hashes(text)
    if hashes is not None and (box is None or hashes.start > box.end):
        return _bare(hashes.content)
    return None if box is None else final_answer(box.content)


def _announced(text: str) -> str | None:
    """What follows the last "answer is" or "answer:", up to the end of the sentence."""
    announcements = list(_ANNOUNCEMENT.finditer(text))
    if not announcements:
        return None
    sentence, *more = _SENTENCE_END.split(text[announcements[-1].end() :], maxsplit=1)
    if more and not _EXPRESSION.search(sentence):
        return None  # "The answer is not obvious. We compute ..."
    return _bare(sentence)


def is_blank(text: str) -> bool:
    """Whether a text holds no answer: nothing but space, markup and punctuation."""
    return not _FILLING.sub("", tidy(text))


def tidy(text: str) -> str:
    """The text in characters that math-verify knows."""
    return text.translate(_CHARACTERS).strip()


class _Part(NamedTuple):
    start: int
    end: int
    content: str


class _Box(NamedTuple):
    start: int
    opened: int
    """Start of the content."""
    closed: int
    """End of the content."""


def _last_box(text: str) -> _Part | None:
    """The last box that is not blank, together with the boxes that form a list with it."""
    last = None
    for box in sorted(_boxes(text), reverse=True)[:_BOXES]:
        content = text[box.opened : box.closed]
        if last is not None and not _separates(text[box.closed + 1 : last.start]):
            break
        if last is not None:
            last = _Part(box.start, last.end, f"{content}, {last.content}")
        elif not is_blank(content):
            last = _Part(box.start, box.closed, content)
    return last


def _boxes(text: str) -> list[_Box]:
    """The closed boxes; if there are none, the last one that was cut off."""
    closed: list[_Box] = []
    opened: list[re.Match] = []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{" or brace["box"]:
            opened.append(brace)
        elif brace[0] == "}" and opened:
            opening = opened.pop()
            if opening["box"]:
                closed.append(_Box(opening.start(), opening.end(), brace.start()))
    cut_off = [brace for brace in opened if brace["box"]]
    if closed or not cut_off:
        return closed
    return [_Box(cut_off[-1].start(), cut_off[-1].end(), len(text))]


def _after_hashes(text: str) -> _Part | None:
    """What follows the last "####" of the last line."""
    before, hashes, after = text.rpartition("\n")[2].rpartition("####")
    if not hashes or before.endswith("#"):
        return None
    return _Part(len(text) - len(after) - len(hashes), len(text), after)


def _separates(between: str) -> bool:
    """Whether two answers with this text between them form a list, as in "$x=3$ or $x=-3$"."""
    return _SEPARATOR.fullmatch(_BESIDE_SEPARATORS.sub("", between)) is not None


def _last_expression(text: str) -> str:
    """The last expression, or list of expressions, of a text in sentences; any other text as it
    is."""
    expressions = list(_EXPRESSION.finditer(text))
    words = _WORD.findall(_EXPRESSION.sub(" ", text))
    if not expressions or len(words) < 3:
        return text
    listed = [expressions.pop()]
    while expressions and _separates(text[expressions[-1].end() : listed[0].start()]):
        listed.insert(0, expressions.pop())
    if not _STATEMENT.fullmatch(text) and not _LINK.search(text[: listed[0].start()]):
        return text
    return ", ".join(expression[0] for expression in listed)


def _bare(text: str) -> str:
    text = _trimmed(_balanced(_trimmed(_DELIMITER.sub("", text))))
    text = _THOUSANDS.sub(lambda number: re.sub(r"\D", "", number[0]), text)
    return _MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", text)


def _trimmed(text: str) -> str:
    """The text without space, bold marks and line breaks around it and punctuation after it."""
    before = None
    while text != before:
        before = text
        text = text.strip().removeprefix("**").removesuffix("**").rstrip("\\,;:。 ")
        if not text.endswith(".."):
            text = text.removesuffix(".")
    return text


def _balanced(text: str) -> str:
    """The text with braces added or removed so that they match."""
    parts, depth, end = [], 0, 0
    for brace in _BRACE.finditer(text):
        if brace[0] == "}" and depth == 0:
            parts.append(text[end : brace.start()])
            end = brace.end()
        elif not brace[0].startswith("\\") or brace["box"]:
            depth += 1 if brace[0].endswith("{") else -1
    return "".join([*parts, text[end:], "}" * depth])
