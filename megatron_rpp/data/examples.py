"""Examples: what the trainer reads in the rows of a data set.

A row is ``{"prompt": ..., "label": ..., "metadata": {...}}``. The prompt is a text or a list of
messages; keys may be dotted paths (``reward_model.ground_truth``), so the layouts of verl and
OpenRLHF load as they are. A turn of the assistant that closes a conversation is no part of the
prompt; it is the label where the row has no other. Without a field ``metadata``, the row's other
fields are the metadata.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_rpp.data.chat import Message, last_user_text
from megatron_rpp.data.sources import Row, Rows, kind, open_rows

_ABSENT = object()


@dataclass(frozen=True)
class Example:
    """One row of a data set: ``label`` and ``metadata`` are for the reward functions."""

    prompt: str
    """Of a conversation: its last user message."""
    label: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()
    """The conversation; empty where the prompt is a text."""


class Examples(Sequence[Example]):
    """The rows of a source as examples, each read and checked when it is asked for."""

    def __init__(self, rows: Rows, prompt_key: str, label_key: str) -> None:
        self.rows = rows
        self.prompt_key = prompt_key
        self.label_key = label_key

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Raises ValueError, naming the place, where the row is not one."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return _example(self.rows[index], self.rows.where(index), self.prompt_key, self.label_key)


def open_examples(
    source: str, prompt_key: str, label_key: str, cache_dir: str | None = None
) -> Examples:
    """The examples of a data set; see `sources.open_rows` for what ``source`` may be.

    Raises:
        ValueError: no such source, or it has no rows.
    """
    return Examples(open_rows(str(source), cache_dir), prompt_key, label_key)


def _example(row: Row, where: str, prompt_key: str, label_key: str) -> Example:
    prompt = _field(row, prompt_key)
    if prompt is _ABSENT:
        raise ValueError(
            f"{where} has no field {prompt_key!r}, only {sorted(row)}: set data.prompt_key to the "
            "field that holds the prompt"
        )
    messages = _messages(prompt, f"{where}: {prompt_key!r}")
    label = _label(_field(row, label_key), where, label_key)
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        closing = messages[-1].get("content")
        label = closing if label is None and isinstance(closing, str) else label
        messages = messages[:-1]
    text = last_user_text(messages) if messages else prompt
    return Example(
        text,
        label,
        _metadata(row, where, {prompt_key, label_key}),
        messages,
    )


def _field(row: Row, key: str) -> Any:
    """The value at a key or at a dotted path of keys; _ABSENT where there is none."""
    if key in row:
        return row[key]
    first, dot, rest = key.partition(".")
    return _field(row[first], rest) if dot and isinstance(row.get(first), dict) else _ABSENT


def _metadata(row: Row, where: str, used: set[str]) -> dict[str, Any]:
    metadata = row.get("metadata")
    if metadata is None:
        return {key: value for key, value in row.items() if key not in {"metadata", *used}}
    if not isinstance(metadata, dict):
        raise ValueError(f"{where}: 'metadata' is {kind(metadata)}, it must be a JSON object")
    return metadata


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
    if value is None or value is _ABSENT:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise ValueError(
        f"{where}: {label_key!r} is {kind(value)}, it must be a string, a number or null: put "
        "anything else into 'metadata'"
    )
