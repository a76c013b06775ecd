"""Examples: what the trainer reads from the rows of a data set.

A row is ``{"prompt": ..., "label": ..., "metadata": {...}}``. The prompt is a text or a list of
messages. Keys may be dotted paths (``reward_model.ground_truth``), so data in the layouts of verl
and OpenRLHF loads as it is. If a conversation ends with a turn of the assistant, that turn is not
part of the prompt; it is the label if the row has no other. If there is no field ``metadata``, all
other fields of the row are the metadata.

A label is a text. A number becomes the text that stands in the file: 5.0 stays "5.0", 1e3 stays
"1e3".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from megatron_rpp.data.messages import Message, conversation, last_user_text
from megatron_rpp.data.rows import Row, Rows, kind
from megatron_rpp.data.sources import open_rows
from megatron_rpp.lifecycle.config_error import ConfigError, reading


@dataclass(frozen=True)
class Example:
    """One row of a data set. ``label`` and ``metadata`` are for the reward functions."""

    prompt: str
    """The prompt if it is a text, else the last user message of the conversation."""
    label: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()
    """The conversation; empty if the prompt is a text."""


class Examples(Sequence[Example]):
    """The rows of a source as examples. Each is read and checked on access."""

    def __init__(self, rows: Rows, prompt_key: str, label_key: str) -> None:
        self.rows = rows
        self.prompt_key = prompt_key
        self.label_key = label_key

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # takes no slices
        """Raises a ConfigError that names the place if the row is malformed."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        with reading(self.rows.where(index), "correct the row"):
            return self._example(index)

    def _example(self, index: int) -> Example:
        row, where = self.rows[index], self.rows.where(index)
        path = path_of(row, self.prompt_key)
        if path is None:
            raise ConfigError(
                f"{where} has no field {self.prompt_key!r}, only {sorted(row)}: set "
                "data.prompt_key to the field that holds the prompt"
            )
        prompt = value_at(row, path)
        messages = conversation(prompt, f"{where}: {self.prompt_key!r}")
        label = self._label(index, row)
        if len(messages) > 1 and messages[-1]["role"] == "assistant":
            label = messages[-1]["content"] if label is None else label
            messages = messages[:-1]
        text = last_user_text(messages) if messages else prompt
        metadata = _metadata(row, where, {self.prompt_key, self.label_key})
        return Example(text, label, metadata, messages)

    def _label(self, index: int, row: Row) -> str | None:
        path = path_of(row, self.label_key)
        value = None if path is None else value_at(row, path)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
            assert path is not None
            return self.rows.written(index, path)
        raise ConfigError(
            f"{self.rows.where(index)}: {self.label_key!r} is {kind(value)}, it must be a string, "
            "a number or null: put anything else into 'metadata'"
        )


def open_examples(
    source: str,
    prompt_key: str,
    label_key: str,
    *,
    cache_dir: str | None = None,
    log: Callable[[str], None] = print,
) -> Examples:
    """The examples of a data set; `sources.open_rows` describes source, cache_dir and log.

    Raises:
        ConfigError: there is no such source, or it has no rows.
    """
    return Examples(open_rows(str(source), cache_dir, log), prompt_key, label_key)


def path_of(row: Row, key: str) -> tuple[str, ...] | None:
    """The keys that lead to the value of a key or dotted path; None if there is no such value."""
    if key in row:
        return (key,)
    first, dot, rest = key.partition(".")
    if not dot or not isinstance(row.get(first), dict):
        return None
    path = path_of(row[first], rest)
    return None if path is None else (first, *path)


def value_at(row: Row, path: Sequence[str]) -> Any:
    """The value at the end of a path of keys."""
    value = row
    for key in path:
        value = value[key]
    return value


def _metadata(row: Row, where: str, used: set[str]) -> dict[str, Any]:
    metadata = row.get("metadata")
    if metadata is None:
        return {key: value for key, value in row.items() if key not in {"metadata", *used}}
    if not isinstance(metadata, dict):
        raise ConfigError(f"{where}: 'metadata' is {kind(metadata)}, it must be a JSON object")
    return metadata
