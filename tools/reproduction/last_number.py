"""The rule of the experiment length: a response may show its steps, and its last number counts."""

from __future__ import annotations

import re
from typing import Any


def score(  # noqa: PLR0917 (the signature of a reward function)
    prompts: list[str],
    responses: list[str],
    labels: list[str],
    metadata: list[dict[str, Any]],
) -> list[float]:
    """1.0 if the last number of the response equals the label, else 0.0."""
    return [
        float(last_number(response) == int(label)) for response, label in zip(responses, labels)
    ]


def last_number(response: str) -> int | None:
    """The last number of a response such as ``4-7=-3;-3+2=-1;-1``; None if there is none.

    A minus after a digit is an operator, so the last number of ``7-2`` is 2. No number here has more
    than nine digits; longer ones are garbage.
    """
    numbers = re.findall(r"(?:(?<![0-9])-)?[0-9]+", response)
    return int(numbers[-1]) if numbers and len(numbers[-1]) < 10 else None
