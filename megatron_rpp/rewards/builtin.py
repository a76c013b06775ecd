"""The built-in reward functions: equal texts, reasoning-gym tasks, mathematics, patterns, lengths.

`exact_match` and `reasoning_gym` are plain functions. The others have options: each is a dataclass
that is called like any reward function, and its fields are the keys of ``reward.options``, checked
when it is made. Left out: parsers of program code.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_rpp.data.tasks import create_task, restore_entry
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.rewards.golds import gold_problem
from megatron_rpp.rewards.validation import SampleError


def exact_match(  # noqa: PLR0917 (the signature of a reward function)
    prompts: list[str],
    responses: list[str],
    labels: list[str | None],
    metadata: list[dict[str, Any]],
) -> list[float]:
    """1.0 if response and label are the same text, apart from space around them, else 0.0.

    Raises:
        SampleError: a row has no label.
    """
    pairs = zip(responses, require_labels(labels))
    return [float(response.strip() == label.strip()) for response, label in pairs]


def reasoning_gym(  # noqa: PLR0917 (the signature of a reward function)
    prompts: list[str],
    responses: list[str],
    labels: list[str | None],
    metadata: list[dict[str, Any]],
) -> list[float]:
    """The score, 0 .. 1, that the row's own reasoning-gym task gives the response.

    Space around the response is removed first. Some tasks give part marks: 1.0 means correct. A few
    scorers evaluate the response as an expression (n_queens, binary_matrix, spiral_matrix and
    string_insertion with ``eval``; some algebra and games with sympy): train on those in a sandbox.

    Raises:
        SampleError: a row does not come from tools/make_task.py, or its task cannot score it.
    """
    rows = enumerate(zip(prompts, responses, metadata))
    return [
        _score(index, prompt, response, metadata=row) for index, (prompt, response, row) in rows
    ]


def _score(index: int, prompt: str, response: str, *, metadata: dict[str, Any]) -> float:
    require_entry(index, metadata)
    task = _task(metadata["task"], json.dumps(metadata["params"]))
    entry = restore_entry(prompt, metadata)
    try:
        return task.score_answer(response.strip(), entry)
    except Exception as error:
        # Some scorers raise on text they cannot parse (prime_factorization on "x", boxnet on a
        # list): a wrong answer. If a row's own answer cannot be scored either, the data is broken.
        _check_scorable(index, task, entry, first=error)
        return 0.0


def _check_scorable(index: int, task: Any, entry: dict[str, Any], *, first: Exception) -> None:
    try:
        task.score_answer(entry["answer"], entry)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise SampleError(
            index, f"cannot score this row ({reason}): its metadata is damaged"
        ) from first


@cache
def _task(name: str, params: str) -> Any:
    # Scorers read the entry, not the data set's own entries: any size and seed will do.
    return create_task(name, json.loads(params), size=10, seed=0)


@dataclass(frozen=True, kw_only=True)
class MathVerify:
    """1.0 if the answer of the response is mathematically equal to that of the label, else 0.0.

    The library math-verify compares LaTeX, fractions, decimals, sets and intervals; what it cannot
    read is compared as text. answers.py finds the answer in a label or a response. Hostile input
    can keep it busy for long; the time limit is that of the worker.
    """

    def __post_init__(self) -> None:
        # The imports are slow. Made here, they do not count in the first sample's time.
        import math_verify

        import megatron_rpp.rewards.equality  # noqa: F401

        # Its own time limit is an alarm signal; switched off, it warns once per call.
        logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)

    def __call__(  # noqa: PLR0917 (the signature of a reward function)
        self,
        prompts: list[str],
        responses: list[str],
        labels: list[str | None],
        metadata: list[dict[str, Any]],
    ) -> list[float]:
        from megatron_rpp.rewards.equality import is_equal

        return [float(is_equal(*pair)) for pair in zip(require_golds(labels), responses)]


@dataclass(frozen=True, kw_only=True)
class Regex:
    """1.0 if the pattern is found in the response, else 0.0."""

    pattern: str
    """Python regular expression; "." also matches line ends."""
    equals_label: bool = False
    """The first group of the last match must also equal the label, apart from space around it."""

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

    def __call__(  # noqa: PLR0917 (the signature of a reward function)
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
        assert label is not None
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

    def __call__(  # noqa: PLR0917 (the signature of a reward function)
        self,
        prompts: list[str],
        responses: list[str],
        labels: list[str | None],
        metadata: list[dict[str, Any]],
    ) -> list[float]:
        free = self.max_tokens - self.buffer_tokens
        lengths = [row["response_tokens"] for row in metadata]
        return [min(0.0, max(-1.0, (free - length) / self.buffer_tokens)) for length in lengths]


def require_labels(labels: list[str | None]) -> list[str]:
    """Returns the labels. Raises SampleError for a row without one."""
    present = []
    for index, label in enumerate(labels):
        if label is None:
            raise SampleError(
                index,
                "needs a label, but this row has none: check data.label_key and the data file, or "
                "choose another function in reward.functions",
            )
        present.append(label)
    return present


def require_golds(labels: list[str | None]) -> list[str]:
    """Returns the labels. Raises SampleError for a row without one, or with one that no answer
    could equal."""
    present = require_labels(labels)
    for index, label in enumerate(present):
        if problem := gold_problem(label):
            raise SampleError(index, problem)
    return present


def require_entry(index: int, metadata: dict[str, Any]) -> None:
    """Raises SampleError for a row that does not come from tools/make_task.py."""
    missing = sorted({"task", "params", "answer", "entry"} - metadata.keys())
    if missing:
        raise SampleError(
            index,
            f"needs {missing} in the row's metadata: make the data with tools/make_task.py, or "
            "choose another function in reward.functions",
        )
