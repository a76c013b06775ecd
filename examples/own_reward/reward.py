"""A reward function of one's own: how close is the estimate?

A reward function takes four lists of equal length and returns one finite number per response:

    prompts     the prompts as text; for a conversation, its last user message
    responses   what the policy wrote, without the token that ended it
    labels      the rows' labels as text, or None
    metadata    the rows' metadata, plus "response_tokens", the length of the response in tokens

It runs in worker processes on one sample at a time. With `reward.workers 0` it runs in the training
process on the whole batch, so a function must work for lists of any length.
"""

from __future__ import annotations

import re
from typing import Any


def score(
    prompts: list[str],
    responses: list[str],
    labels: list[str],
    metadata: list[dict[str, Any]],
) -> list[float]:
    """1.0 for a number within the row's tolerance of the label, 0.5 for any other number, and up to
    0.4 for the share of digits in a response that is not a number.

    Partial credit lets an untrained model learn: with 0 for every response there is no gradient.
    """
    rows = zip(responses, labels, metadata)
    return [_score(response, float(label), row["tolerance"]) for response, label, row in rows]


def _score(response: str, label: float, tolerance: float) -> float:
    text = response.strip()
    if re.fullmatch(r"[0-9]+", text):
        return 1.0 if abs(float(text) - label) <= tolerance * label else 0.5
    return 0.4 * len(re.findall("[0-9]", text)) / max(1, len(text))
