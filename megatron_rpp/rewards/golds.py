"""Checks labels for math_verify: which are errors, and which are compared as plain text."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from megatron_rpp.rewards.answers import final_answer, is_blank
from megatron_rpp.rewards.validation import short

EXAMINED = 5000
"""Number of labels that are parsed at the start of a run; LaTeX takes seconds in all."""
SHOWN = 3


def gold_problem(label: str) -> str | None:
    """Why no answer could ever equal a label, and what to do about it; None if one can.

    The text continues a message that begins with the name of the reward function.
    """
    if not is_blank(final_answer(label)):
        return None
    what = "is blank" if is_blank(label) else "ends without one"
    return (
        f"needs an answer in the label, but this row's label {what} ({short(label)}): correct or "
        "remove the row, or check data.label_key"
    )


def unread(labels: Iterable[str]) -> str | None:
    """A note on those of the first `EXAMINED` labels that are compared as text; None if all of them
    are read as mathematics."""
    first = list(islice(labels, EXAMINED))
    different = dict.fromkeys(first)
    found = [label for label in different if not is_parsed(label)]
    if not found:
        return None
    shown = ", ".join(map(short, found[:SHOWN])) + ", ..." * (len(found) > SHOWN)
    return (
        f"math_verify reads {len(found)} of the {len(different)} different labels in the first "
        f"{len(first)} rows as words and not as mathematics; only the same words equal them: "
        f"{shown}"
    )


def is_parsed(label: str) -> bool:
    """Whether math-verify reads a label as mathematics.

    If not, only the same words equal it. That goes for "Paris", but also for "72 clips", which 72
    does not equal. Only the grammar is checked and nothing is evaluated, so this ends for any
    label. It takes milliseconds, at worst seconds; a number takes microseconds.
    """
    from megatron_rpp.rewards import equality  # imported here: math-verify takes a second to import

    return equality.is_parsed(label)
