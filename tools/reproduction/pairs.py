"""Pairs for the reward models: two sampled answers to a prompt, of which one is chosen.

The answers come from tools/generate.py. Left out: margins.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from itertools import combinations

Sample = tuple[str, bool]
"""A response and whether the rule says that it is right."""
Labelling = Callable[[list[Sample], random.Random], tuple[str, str] | None]
"""From the answers to one prompt: (chosen, rejected), or None if no pair can be made of them."""

LONGER_CHOSEN = 0.75
"""In the experiment length, how often the longer one of two answers is chosen that are both right or
both wrong."""


def by_correctness(samples: list[Sample], rng: random.Random) -> tuple[str, str] | None:
    """A right answer is chosen, a wrong one rejected."""
    right = sorted({response for response, is_right in samples if is_right})
    wrong = sorted(
        {response for response, is_right in samples if not is_right and response.strip()}
    )
    return (rng.choice(right), rng.choice(wrong)) if right and wrong else None


def by_correctness_or_length(samples: list[Sample], rng: random.Random) -> tuple[str, str] | None:
    """Two different answers: the right one is chosen; if both are right or both wrong, the longer one
    with probability LONGER_CHOSEN (of two that are equally long, either)."""
    different = sorted({sample for sample in samples if sample[0].strip()})
    if len(different) < 2:
        return None
    (first, first_right), (second, second_right) = rng.choice(list(combinations(different, 2)))
    if first_right != second_right:
        return (first, second) if first_right else (second, first)
    shorter, longer = sorted((first, second), key=len)
    return (longer, shorter) if rng.random() < LONGER_CHOSEN else (shorter, longer)


def make_pairs(
    samples_of: dict[str, list[Sample]], labelling: Labelling, *, per_prompt: int, seed: int
) -> list[dict[str, str]]:
    """Rows ``{"prompt", "chosen", "rejected"}``: up to `per_prompt` draws of each prompt, for the
    prompts whose answers allow it. Two answers make one pair only, so none contradicts another."""
    rng = random.Random(seed)
    rows = []
    for prompt, samples in samples_of.items():
        drawn = set()
        for _ in range(per_prompt):
            pair = labelling(samples, rng)
            if pair is not None and frozenset(pair) not in drawn:
                drawn.add(frozenset(pair))
                rows.append({"prompt": prompt, "chosen": pair[0], "rejected": pair[1]})
    return rows


def group_samples(
    answers: Iterable[tuple[str, str]], is_right: Callable[[str, str], bool]
) -> dict[str, list[Sample]]:
    """The samples of each prompt, from (prompt, response); `is_right` takes the same two."""
    samples: dict[str, list[Sample]] = {}
    for prompt, response in answers:
        samples.setdefault(prompt, []).append((response, is_right(prompt, response)))
    return samples
