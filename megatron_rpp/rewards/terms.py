"""Built-in reward functions with options: mathematical answers, patterns, lengths.

Each is an object that is called like any reward function; its fields are its options in
``reward.options``, checked when it is made. Left out: parsers of program code.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.rewards.golds import gold_problem
from megatron_rpp.rewards.validation import SampleError


@dataclass(frozen=True, kw_only=True)
class MathVerify:
    """1.0 where the response's answer is mathematically equal to the label's, else 0.0.

    By the library math-verify: LaTeX, fractions, decimals, sets, intervals; what it cannot read is
    compared as a text. answers.py says which part of a label or a response is its answer. It may
    run for long on hostile input, and the time limit is that of the worker.
    """

    def __post_init__(self) -> None:
        # Here: slow, and no part of the first sample's time.
        import math_verify

        import megatron_rpp.rewards.equality  # noqa: F401

        # Its own time limit is an alarm signal; switched off, it warns once per call.
        logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)

    def __call__(
        self,
        prompts: list[str],
        responses: list[str],
        labels: list[str | None],
        metadata: list[dict[str, Any]],
    ) -> list[float]:
        from megatron_rpp.rewards.equality import is_equal

        require_golds(labels)
        return [float(is_equal(*pair)) for pair in zip(labels, responses)]


@dataclass(frozen=True, kw_only=True)
class Regex:
    """1.0 where the pattern is found in the response, else 0.0."""

    pattern: str
    """Python regular expression; "." matches line ends too."""
    equals_label: bool = False
    """Its last match must also have the label as its first group, but for space around it."""

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.pattern, re.DOTALL).groups
        except re.error as error:
            raise ConfigError(
                f"reward.options of 'regex': pattern {self.pattern!r} is not a regular expression "
                f"({error})"
            ) from error
        if self.equals_label and not groups:
            raise ConfigError(
                f"reward.options of 'regex': pattern {self.pattern!r} has no group (...) that "
                "could equal the label"
            )

    def __call__(
        self,
        prompts: list[str],
        responses: list[str],
        labels: list[str | None],
        metadata: list[dict[str, Any]],
    ) -> list[float]:
        if self.equals_label:
            require_labels(labels)
        return [float(self._found(*pair)) for pair in zip(responses, labels)]

    def _found(self, response: str, label: str | None) -> bool:
        matches = list(re.finditer(self.pattern, response, re.DOTALL))
        if not matches or not self.equals_label:
            return bool(matches)
        return (matches[-1][1] or "").strip() == label.strip()


@dataclass(frozen=True, kw_only=True)
class Length:
    """The soft overlong punishment of DAPO (arXiv 2503.14476, equation 13), from -1 to 0.

    0 up to ``max_tokens - buffer_tokens`` response tokens, -1 from ``max_tokens`` on, linear in
    between.
    """

    max_tokens: int
    buffer_tokens: int

    def __post_init__(self) -> None:
        if not 0 < self.buffer_tokens <= self.max_tokens:
            raise ConfigError(
                f"reward.options of 'length': buffer_tokens must be above 0 and at most max_tokens "
                f"= {self.max_tokens}, got {self.buffer_tokens}"
            )

    def __call__(
        self,
        prompts: list[str],
        responses: list[str],
        labels: list[str | None],
        metadata: list[dict[str, Any]],
    ) -> list[float]:
        free = self.max_tokens - self.buffer_tokens
        lengths = [row["response_tokens"] for row in metadata]
        return [min(0.0, max(-1.0, (free - length) / self.buffer_tokens)) for length in lengths]


def require_labels(labels: list[str | None]) -> None:
    """Raises SampleError for a row without a label."""
    for index, label in enumerate(labels):
        if label is None:
            raise SampleError(
                index,
                "needs a label, but this row has none: check data.label_key and the data file, or "
                "choose another function in reward.functions",
            )


def require_golds(labels: list[str | None]) -> None:
    """Raises SampleError for a row without a label, or with one that no answer could equal."""
    require_labels(labels)
    for index, label in enumerate(labels):
        if problem := gold_problem(label):
            raise SampleError(index, problem)
