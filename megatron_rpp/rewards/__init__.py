"""Rewards: named functions over a batch of responses, weighted and summed.

A reward function is ``f(prompts, responses, labels, metadata) -> one score per response``. Its
arguments are lists of equal length: texts, texts, texts or None, dictionaries. Evaluation counts a
response as correct if the first function gives it 1.0 or more. Functions that may hang or crash run
in worker processes, one sample at a time (pool.py). The scores of reward models on Megatron
("model:DIR") come from outside (stages/model_reward.py) and are weighted here. Left out: normalisation,
scaling and clipping of the total (algorithms/).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

from megatron_rpp.config.learning import model_directory
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.lifecycle.exit_codes import RunFailure
from megatron_rpp.rewards.golds import unread
from megatron_rpp.rewards.loading import (
    RewardFunction,
    load_reward,
    needs_worker,
    row_problem,
)
from megatron_rpp.rewards.pool import WorkerPool
from megatron_rpp.rewards.validation import SampleError, numbers, short

__all__ = ["RewardError", "RewardFunction", "RewardSet", "SampleError", "Scores", "load_reward"]


class RewardError(RunFailure):
    """A reward function failed. The message names the function and shows the sample."""


@dataclass(frozen=True)
class Scores:
    """Scores of a batch of B responses."""

    total: list[float]
    """[B] weighted sums."""
    parts: dict[str, list[float]]
    """[B] scores before weighting, by function name, in the order of reward.functions."""
    timeouts: int = 0
    """Number of scores that are the default, because the function hung or its process died."""
    cut: int = 0
    """Number of responses whose beginning a reward model did not read, because they are too long."""


class RewardSet:
    """The reward functions of a run and their weights."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        weights: Sequence[float] = (),
        options: Mapping[str, dict[str, Any]] = MappingProxyType({}),
        workers: int = 0,
        timeout: float = 10.0,
        timeout_score: float = 0.0,
    ) -> None:
        """Loads the functions. Without weights, each counts 1.

        Args:
            options: options of the functions, by function name.
            workers: number of processes for functions that may hang or crash; 0 = they run in this
                process, on the whole batch and without a time limit.
            timeout: time limit in seconds for a sample in a worker.
            timeout_score: score of a sample that exceeds the limit or whose worker dies.

        Raises:
            ConfigError: there is no name, or one is given twice or unknown; the weights are too
                few, too many or not finite; or a function does not have such options.
        """
        weights = list(weights) or [1.0] * len(names)
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"reward.functions must be different names, got {list(names)}")
        if len(weights) != len(names) or not all(map(math.isfinite, weights)):
            raise ConfigError(
                f"reward.weights must be one finite number for each of the {len(names)} "
                f"reward.functions, or empty for 1 each, got {weights}"
            )
        if unknown := sorted(options.keys() - set(names)):
            raise ConfigError(
                f"reward.options has {unknown}, but reward.functions has only {list(names)}"
            )
        self._functions = {
            name: load_reward(name, options.get(name))
            for name in names
            if model_directory(name) is None
        }
        self._names = names
        self._weights = weights
        outside = [name for name in self._functions if workers and needs_worker(name)]
        self._pool = WorkerPool(
            [(name, options.get(name, {})) for name in outside],
            workers,
            timeout=timeout,
            default=timeout_score,
        )
        self._outside = frozenset(outside)

    def row_problem(self, label: str | None, metadata: dict[str, Any]) -> str | None:
        """Why a row of the data could never be scored, to be told before the run; None if no
        function knows a reason."""
        problems = (
            row_problem(*named, label=label, metadata=metadata) for named in self._functions.items()
        )
        return next(filter(None, problems), None)

    def note_on(self, labels: Iterable[str | None]) -> str | None:
        """What the user should know about the labels before the run; None = nothing."""
        if "math_verify" not in self._functions:
            return None
        return unread(label for label in labels if label is not None)

    def score(  # noqa: PLR0917 (as a reward function)
        self,
        prompts: list[str],
        responses: list[str],
        labels: list[str | None],
        metadata: list[dict[str, Any]],
        *,
        of_models: Mapping[str, list[float]] = MappingProxyType({}),
        alive: Callable[[], None] = lambda: None,
    ) -> Scores:
        """Scores B responses. The functions are not called for an empty batch.

        Args:
            of_models: the scores [B] of each reward model, by its name in reward.functions.
            alive: called after each function and, for those in workers, after each sample.

        Raises:
            RewardError: a function raised, did not return B scores, or returned a score that is not
                a finite number.
        """
        batch = _Batch(prompts, responses, labels, metadata)
        parts, timeouts = {}, 0
        for name in self._names:
            function = self._functions.get(name) or _constant(of_models[name])
            pool = self._pool if name in self._outside else None
            parts[name], lost = batch.score(name, function, pool=pool, alive=alive)
            timeouts += lost
            alive()
        total = [
            math.fsum(weight * score for weight, score in zip(self._weights, scores))
            for scores in zip(*parts.values())
        ]
        return Scores(total, parts, timeouts)


def _constant(scores: list[float]) -> RewardFunction:
    """A function that returns what is known already."""
    return lambda prompts, responses, labels, metadata: scores


@dataclass(frozen=True)
class _Batch:
    prompts: list[str]
    responses: list[str]
    labels: list[str | None]
    metadata: list[dict[str, Any]]

    def __post_init__(self) -> None:
        columns = (self.prompts, self.responses, self.labels, self.metadata)
        assert len({len(column) for column in columns}) == 1, "columns of different lengths"

    def score(
        self,
        name: str,
        function: RewardFunction,
        *,
        pool: WorkerPool | None,
        alive: Callable[[], None],
    ) -> tuple[list[float], int]:
        """The scores of one function, and how many of them are the default."""
        if not self.responses:
            return [], 0
        columns = (self.prompts, self.responses, self.labels, self.metadata)
        try:
            if pool is not None:
                return pool.score(name, list(zip(*columns)), alive)
            return numbers(function(*columns), len(self.responses)), 0
        except SampleError as error:
            self._fail(name, str(error), index=error.index, cause=error)
        except Exception as error:  # a user's code raises whatever it likes
            self._fail(name, f"raised {type(error).__name__}: {error}", cause=error)

    def _fail(
        self,
        name: str,
        problem: str,
        *,
        index: int | None = None,
        cause: Exception | None = None,
    ) -> NoReturn:
        size = len(self.responses)
        shown = 0 if index is None else index
        which = f"first of {size} samples" if index is None else f"sample {index} of {size}"
        raise RewardError(
            f"reward function {name!r} {problem}\n{which}:\n"
            f"  prompt:   {short(self.prompts[shown])}\n"
            f"  response: {short(self.responses[shown])}\n"
            f"  label:    {short(self.labels[shown])}"
        ) from cause
