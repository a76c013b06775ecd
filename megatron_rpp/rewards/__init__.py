"""Rewards: named functions over a batch of responses, weighted and summed.

A reward function is ``f(prompts, responses, labels, metadata) -> one score per response`` on lists
of equal length: texts, texts, texts or None, dictionaries. Evaluation counts a response as correct
when the first function gives it 1.0 or more. Left out: reward models, scoring over HTTP, and
normalisation, scale and clip of the total (algorithms/).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NoReturn

import numpy as np

from megatron_rpp.failures import RunFailure
from megatron_rpp.rewards.rules import SampleError
from megatron_rpp.rewards.user import RewardFunction, load_reward

__all__ = ["RewardError", "RewardFunction", "RewardSet", "SampleError", "Scores", "load_reward"]

_SHOWN = 500
"""Characters of a text in an error message."""


class RewardError(RunFailure):
    """A reward function failed: names the function and shows the sample."""


@dataclass(frozen=True)
class Scores:
    """Scores of a batch of B responses."""

    total: list[float]
    """[B] weighted sums."""
    parts: dict[str, list[float]]
    """[B] scores before weighting, by function name, in the order of reward.functions."""


class RewardSet:
    """The reward functions of a run and their weights."""

    def __init__(self, names: Sequence[str], weights: Sequence[float] = ()) -> None:
        """Loads the functions; no weights = 1 each.

        Raises:
            ValueError: none, doubled or unknown names, another number of weights, or one that is
                not finite.
        """
        weights = list(weights) or [1.0] * len(names)
        if not names or len(set(names)) != len(names):
            raise ValueError(f"reward.functions must be different names, got {list(names)}")
        if len(weights) != len(names) or not all(map(math.isfinite, weights)):
            raise ValueError(
                f"reward.weights must be one finite number for each of the {len(names)} "
                f"reward.functions, or empty for 1 each, got {weights}"
            )
        self._functions = {name: load_reward(name) for name in names}
        self._weights = weights

    def score(
        self,
        prompts: list[str],
        responses: list[str],
        labels: list[str | None],
        metadata: list[dict[str, Any]],
    ) -> Scores:
        """Scores B responses. An empty batch is not shown to the functions.

        Raises:
            RewardError: a function raised, gave another number of scores than B, or a score that
                is not a finite number.
        """
        batch = _Batch(prompts, responses, labels, metadata)
        parts = {name: batch.score(name, function) for name, function in self._functions.items()}
        total = [
            math.fsum(weight * score for weight, score in zip(self._weights, scores))
            for scores in zip(*parts.values())
        ]
        return Scores(total, parts)


@dataclass(frozen=True)
class _Batch:
    prompts: list[str]
    responses: list[str]
    labels: list[str | None]
    metadata: list[dict[str, Any]]

    def __post_init__(self) -> None:
        columns = (self.prompts, self.responses, self.labels, self.metadata)
        assert len({len(column) for column in columns}) == 1, "columns of different lengths"

    def score(self, name: str, function: RewardFunction) -> list[float]:
        if not self.responses:
            return []
        try:
            scores = function(self.prompts, self.responses, self.labels, self.metadata)
        except SampleError as error:
            self._fail(name, str(error), error.index, error)
        except Exception as error:  # a user's code raises whatever it likes
            self._fail(name, f"raised {type(error).__name__}: {error}", None, error)
        if not isinstance(scores, (list, tuple, np.ndarray)):
            self._fail(name, f"returned {type(scores).__name__}, not a list of numbers")
        if len(scores) != len(self.responses):
            self._fail(name, f"returned {len(scores)} scores for {len(self.responses)} responses")
        return [self._number(name, index, score) for index, score in enumerate(scores)]

    def _number(self, name: str, index: int, score: Any) -> float:
        try:
            number = float(score) if isinstance(score, (Real, np.bool_)) else math.nan
        except OverflowError:  # an int beyond the largest float
            number = math.inf
        if not math.isfinite(number):
            self._fail(name, f"gave the score {_short(score)}, not a finite number", index)
        return number

    def _fail(
        self, name: str, problem: str, index: int | None = None, cause: Exception | None = None
    ) -> NoReturn:
        size = len(self.responses)
        shown = 0 if index is None else index
        which = f"first of {size} samples" if index is None else f"sample {index} of {size}"
        raise RewardError(
            f"reward function {name!r} {problem}\n{which}:\n"
            f"  prompt:   {_short(self.prompts[shown])}\n"
            f"  response: {_short(self.responses[shown])}\n"
            f"  label:    {_short(self.labels[shown])}"
        ) from cause


def _short(value: Any) -> str:
    text = repr(value)
    if len(text) <= _SHOWN:
        return text
    half = _SHOWN // 2
    return f"{text[:half]} ... {len(text) - 2 * half} characters ... {text[-half:]}"
