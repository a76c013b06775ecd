"""Checks what a reward function returned: one finite number for each response."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np

_SHOWN = 500
"""Characters of a text in an error message."""


class SampleError(ValueError):
    """A reward function cannot score the sample at ``index`` of its batch; None = no single one."""

    def __init__(self, index: int | None, problem: str) -> None:
        super().__init__(problem)
        self.index = index


def numbers(scores: Any, count: int) -> list[float]:
    """The scores that a function returned for ``count`` responses, as floats.

    Raises:
        SampleError: they are not a list of ``count`` finite numbers.
    """
    if not isinstance(scores, (list, tuple, np.ndarray)):
        raise SampleError(None, f"returned {type(scores).__name__}, not a list of numbers")
    if len(scores) != count:
        raise SampleError(None, f"returned {len(scores)} scores for {count} responses")
    return [_number(index, score) for index, score in enumerate(scores)]


def _number(index: int, score: Any) -> float:
    try:
        number = float(score) if isinstance(score, (Real, np.bool_)) else math.nan
    except OverflowError:  # an int beyond the largest float
        number = math.inf
    if not math.isfinite(number):
        raise SampleError(index, f"gave the score {short(score)}, not a finite number")
    return number


def short(value: Any) -> str:
    """``repr`` of a value; if it is long, its middle is left out."""
    text = repr(value)
    if len(text) <= _SHOWN:
        return text
    half = _SHOWN // 2
    return f"{text[:half]} ... {len(text) - 2 * half} characters ... {text[-half:]}"
