"""Procedural tasks of reasoning-gym as data sets: training and held-out rows that can be scored.

A row carries its task, the parameters, and the answer and metadata of the entry. So after a trip
through a JSONL file, ``restore_entry`` and ``create_task`` can still score a response with the
scorer of reasoning-gym. Left out: curricula, images, tasks that are not in reasoning-gym.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import count, islice
from typing import Any

from megatron_rpp.data.json_lines import json_line
from megatron_rpp.data.typed_json import from_typed_json, to_typed_json
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.lifecycle.extras import require_extra

Row = dict[str, Any]

_CHUNK = 1000
"""Entries per reasoning-gym data set; further entries come from data sets with later seeds."""
_LIST_TASKS = "python -c 'import reasoning_gym.factory as f; print(*sorted(f.DATASETS))'"


def make_task(
    name: str,
    params: dict[str, Any],
    *,
    train_size: int,
    eval_size: int,
    train_seed: int,
    eval_seed: int,
) -> tuple[list[Row], list[Row]]:
    """Draws the rows ``(train, eval)`` of a task. The same arguments give the same rows.

    The held-out prompts are all different, and none of them is a training prompt. If a task has few
    different problems, training rows repeat. Different seeds alone do not ensure that:
    reasoning-gym seeds entry i with seed + i, so two seeds draw the same entries in shifted order.

    Returns:
        Rows ``{"prompt": question, "label": answer or None, "metadata": {...}}``.

    Raises:
        ConfigError: the task is unknown or rejects its parameters, the seeds are equal, or there
            are too few different problems.
    """
    if train_size < 1 or eval_size < 1:
        raise ConfigError(f"train_size {train_size} and eval_size {eval_size} must be at least 1")
    if train_seed == eval_seed:
        raise ConfigError(f"task.train_seed and task.eval_seed are both {eval_seed}: change one")
    params = _json_params(name, params)
    held_out: dict[str, Row] = {}
    for row in _draws(name, params, wanted=eval_size, seed=eval_seed):
        held_out.setdefault(row["prompt"], row)
        if len(held_out) == eval_size:
            break
    else:
        raise ConfigError(
            f"task {name} with {params} gives only {len(held_out)} different problems: lower "
            f"task.eval_size {eval_size} or widen task.params"
        )
    draws = _draws(name, params, wanted=train_size, seed=train_seed)
    train = list(islice((row for row in draws if row["prompt"] not in held_out), train_size))
    if len(train) < train_size:
        raise ConfigError(
            f"task {name} with {params} gives hardly a problem besides the {eval_size} held out "
            f"({len(train)} of {train_size} found): lower task.eval_size or widen task.params"
        )
    return train, list(held_out.values())


def create_task(name: str, params: dict[str, Any], *, size: int, seed: int) -> Any:
    """The reasoning-gym data set of a task.

    Raises ConfigError if the name is unknown or the parameters are invalid.
    """
    require_extra("tasks", f"task {name!r}")
    import reasoning_gym  # imported here: runs on other data do not need it
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(f"unknown task {name!r}: {hint}List all with: {_LIST_TASKS}")
    allowed = {field.name for field in fields(DATASETS[name][1])} - {"seed", "size"}
    unknown = sorted(params.keys() - allowed)
    if unknown:
        raise ConfigError(f"task {name} has no params {unknown}, only {sorted(allowed)}")
    try:
        if name == "composite":
            specs = [DatasetSpec(**spec) for spec in params.get("datasets", [])]
            params = {**params, "datasets": specs}
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **params)
    except Exception as error:  # the checks of over a hundred tasks may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"task {name} refuses its params {params}: {reason}") from error


def restore_entry(prompt: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """The reasoning-gym entry of a row, from the row's prompt and metadata."""
    return {
        "question": prompt,
        "answer": metadata["answer"],
        "metadata": from_typed_json(metadata["entry"]),
    }


def jsonl(rows: Iterable[Row]) -> bytes:
    """One JSON object per line, in UTF-8."""
    return "".join(json_line(row) + "\n" for row in rows).encode()


def _draws(name: str, params: dict[str, Any], *, wanted: int, seed: int) -> Iterator[Row]:
    """Rows of seed, seed + 1, ...; gives up after many more than the ``wanted`` rows."""
    limit = 20 * wanted + _CHUNK
    return islice(_endless_draws(name, params, seed), limit)


def _endless_draws(name: str, params: dict[str, Any], seed: int) -> Iterator[Row]:
    for start in count(seed, _CHUNK):
        task = create_task(name, params, size=_CHUNK, seed=start)
        for index in range(_CHUNK):
            yield _row(name, params, task[index])


def _row(name: str, params: dict[str, Any], entry: dict[str, Any]) -> Row:
    prompt, answer = entry["question"], entry["answer"]
    metadata = {
        "task": name,
        "params": params,
        "answer": answer,
        "entry": to_typed_json(entry["metadata"]),
    }
    restored = restore_entry(prompt, json.loads(json.dumps(metadata)))
    assert restored == entry, f"{name}: an entry changes in JSON: {entry}"
    return {"prompt": prompt, "label": answer, "metadata": metadata}


def _json_params(name: str, params: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(params))
    except TypeError as error:
        raise ConfigError(f"params of task {name} must be JSON values: {error}") from error
