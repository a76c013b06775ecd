"""Labels as golds of math_verify: which are refused, and which are compared as texts.

Left out: reading the data (data/), and when to ask.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from megatron_rpp.rewards.answers import final_answer, is_blank
from megatron_rpp.rewards.validation import short

EXAMINED = 5000
"""Labels that are parsed at the start of a run: numbers in no time, LaTeX in seconds."""
SHOWN = 3


def gold_problem(label: str) -> str | None:
    """Why no answer could ever equal a label, and what to do; None if one can.

    It goes on after the name of the reward function.
    """
    if not is_blank(final_answer(label)):
        return None
    what = "is blank" if is_blank(label) else "ends without one"
    return (
        f"needs an answer in the label, but this row's label {what} ({short(label)}): correct or "
        "remove the row, or check data.label_key"
    )


def unread(labels: Iterable[str]) -> str | None:
    """Which of the first `EXAMINED` labels are compared as texts, in words; None if all are read as
    mathematics."""
    first = list(islice(labels, EXAMINED))
    different = dict.fromkeys(first)
    found = [label for label in different if not is_parsed(label)]
    if not found:
        return None
    shown = ", ".join(map(short, found[:SHOWN])) + ", ..." * (len(found) > SHOWN)
    return (
        f"math_verify reads {len(found)} of the {len(different)} different labels in the first "
        f"{len(first)} rows as words and not as mathematics; only the same words equal them: {shown}"
    )


def is_parsed(label: str) -> bool:
    """Whether math-verify reads a label as mathematics.

    If not, only the same words equal it: "Paris", but also "72 clips", which 72 does not equal.
    By the grammar alone: nothing is evaluated, so it ends, whatever the label. It takes some
    milliseconds, at worst seconds; a number takes microseconds.
    """
    from megatron_rpp.rewards import equality  # here: imports math-verify, which takes a second

    return equality.is_parsed(label)
