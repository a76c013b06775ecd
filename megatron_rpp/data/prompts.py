"""Prompt data sets: JSONL rows, their tokens, and the order they are trained in.

A row is ``{"prompt": ..., "label": ..., "metadata": {...}}``; label and metadata are optional and
other fields are ignored. The prompt is a text or a conversation (chat.py). The order is a function of (seed, position) alone, so a run resumed at
any step, on any number of ranks, takes the same prompts. Left out: streaming of files that do not
fit in memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rpp.data.chat import Message, PromptFormat, last_user_text
from megatron_rpp.seeds import permutation


@dataclass(frozen=True)
class Example:
    """One row of a data set: ``label`` and ``metadata`` are for the reward functions."""

    prompt: str
    """Of a conversation: its last user message."""
    label: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()
    """The conversation; empty where the prompt is a text."""


@dataclass(frozen=True)
class Prompt:
    """An example and the token ids the model sees."""

    example: Example
    tokens: tuple[int, ...]


def read_examples(path: str | Path, prompt_key: str, label_key: str) -> list[Example]:
    """Reads a JSONL file, one example a line, in order.

    Raises:
        ValueError: no such file, no rows, or a bad row; names the file, the line and the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data set {path} is not a file: correct the path, or make the file first")
    # Split at "\n" alone: JSON strings may hold other line separators, such as U+2028.
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise ValueError(f"data set {path} is empty: it needs one JSON object a line")
    return [
        _parse_row(line, f"{path}, line {number}", prompt_key, label_key)
        for number, line in enumerate(lines, start=1)
    ]


def encode_prompts(
    examples: Sequence[Example], form: PromptFormat, max_prompt_tokens: int, path: str | Path
) -> list[Prompt]:
    """Tokenizes the prompts of the data set ``path``; the limit counts begin-of-sequence.

    Raises:
        ValueError: a prompt of more than ``max_prompt_tokens`` tokens, or one that the chat
            template refuses.
    """
    prompts = []
    for line, example in enumerate(examples, start=1):
        try:
            tokens = form.tokens(example.messages or example.prompt)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
        if len(tokens) > max_prompt_tokens:
            raise ValueError(
                f"{path}, line {line}: the prompt has {len(tokens)} tokens, the limit is "
                f"{max_prompt_tokens}: raise model.max_length, lower rollout.max_new_tokens, "
                "or remove the row"
            )
        prompts.append(Prompt(example, tokens))
    return prompts


def prompt_indices(cursor: int, count: int, size: int, seed: int) -> list[int]:
    """Rows to train on at the global positions ``cursor .. cursor + count - 1``.

    Position p lies in epoch p // size; every epoch is a permutation of ``range(size)`` drawn from
    (seed, epoch). The range may cross epochs.

    Args:
        cursor: prompts consumed so far, over all steps and ranks.
        count: prompts to take.
        size: rows of the data set.
        seed: of the order; an integer of at least 0.
    """
    if cursor < 0 or count < 0 or size < 1 or seed < 0:
        raise ValueError(
            f"cursor {cursor}, count {count} and seed {seed} must be at least 0, size {size} 1"
        )
    positions = range(cursor, cursor + count)
    return [int(_epoch_order(p // size, size, seed)[p % size]) for p in positions]


@lru_cache(maxsize=2)
def _epoch_order(epoch: int, size: int, seed: int) -> np.ndarray:
    return permutation(size, seed, epoch)


def _parse_row(line: bytes, where: str, prompt_key: str, label_key: str) -> Example:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}): each line is one JSON object") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {_kind(row)}: each line must be a JSON object {{...}}")
    if prompt_key not in row:
        raise ValueError(
            f"{where} has no field {prompt_key!r}, only {sorted(row)}: set data.prompt_key to the "
            "field that holds the prompt"
        )
    messages = _messages(row[prompt_key], f"{where}: {prompt_key!r}")
    prompt = last_user_text(messages) if messages else row[prompt_key]
    metadata = row.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{where}: 'metadata' is {_kind(metadata)}, it must be a JSON object")
    return Example(prompt, _label(row.get(label_key), where, label_key), metadata, messages)


def _messages(prompt: Any, where: str) -> tuple[Message, ...]:
    """The checked conversation, empty where the prompt is a text."""
    if isinstance(prompt, str) and prompt.strip():
        return ()
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(
            f"{where} is {prompt!r}, it must be a non-empty string or a list of messages"
        )
    for number, message in enumerate(prompt):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"{where}: message {number} is {message!r}, it must be an object with the fields "
                "'role' and 'content'"
            )
    return tuple(prompt)


def _label(value: Any, where: str, label_key: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise ValueError(
        f"{where}: {label_key!r} is {_kind(value)}, it must be a string, a number or null: put "
        "anything else into 'metadata'"
    )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")
