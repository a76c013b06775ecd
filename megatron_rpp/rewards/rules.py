"""Built-in reward functions: text equality, and the scorers of reasoning-gym.

Those with options are in terms.py.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from megatron_rpp.data.tasks import create_task, restore_entry
from megatron_rpp.rewards.terms import require_labels
from megatron_rpp.rewards.validation import SampleError


def exact_match(
    prompts: list[str],
    responses: list[str],
    labels: list[str | None],
    metadata: list[dict[str, Any]],
) -> list[float]:
    """1.0 where response and label are the same text but for space around them, else 0.0.

    Raises:
        SampleError: a row has no label.
    """
    require_labels(labels)
    return [float(response.strip() == label.strip()) for response, label in zip(responses, labels)]


def reasoning_gym(
    prompts: list[str],
    responses: list[str],
    labels: list[str | None],
    metadata: list[dict[str, Any]],
) -> list[float]:
    """Score of the row's own reasoning-gym task, 0 .. 1, on the response without outer space.

    Some tasks give part marks: 1.0 means correct. Mind that a few scorers evaluate the response as
    an expression (n_queens, binary_matrix, spiral_matrix and string_insertion with ``eval``; some
    algebra and games with sympy): train on those in a sandbox.

    Raises:
        SampleError: a row does not come from tools/make_task.py, or its task cannot score it.
    """
    rows = zip(prompts, responses, metadata)
    return [_score(index, *row) for index, row in enumerate(rows)]


def _score(index: int, prompt: str, response: str, metadata: dict[str, Any]) -> float:
    require_entry(index, metadata)
    task = _task(metadata["task"], json.dumps(metadata["params"]))
    entry = restore_entry(prompt, metadata)
    try:
        return task.score_answer(response.strip(), entry)
    except Exception as error:
        # Some scorers raise on text they cannot parse (prime_factorization on "x", boxnet on a
        # list): a wrong answer. A row whose own answer cannot be scored either is broken data.
        _check_scorable(index, task, entry, error)
        return 0.0


def require_entry(index: int, metadata: dict[str, Any]) -> None:
    """Raises SampleError for a row that does not come from tools/make_task.py."""
    missing = sorted({"task", "params", "answer", "entry"} - metadata.keys())
    if missing:
        raise SampleError(
            index,
            f"needs {missing} in the row's metadata: make the data with tools/make_task.py, or "
            "choose another function in reward.functions",
        )


def _check_scorable(index: int, task: Any, entry: dict[str, Any], first: Exception) -> None:
    try:
        task.score_answer(entry["answer"], entry)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise SampleError(
            index, f"cannot score this row ({reason}): its metadata is damaged"
        ) from first


@lru_cache(maxsize=None)
def _task(name: str, params: str) -> Any:
    # Scorers read the entry, not the data set's own entries: any size and seed will do.
    return create_task(name, json.loads(params), size=10, seed=0)
