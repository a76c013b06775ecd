"""JSON files of the user, with values that are checked one by one.

A value of the wrong type is an error that names file and key. Nothing is converted or guessed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_rpp.lifecycle.config_error import ConfigError, reading

_LARGEST = 2**31 - 1  # No size and no context length is larger.


REQUIRED = object()
"""Stands for the default of a key that must be present."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError if it holds anything else."""
    with reading(f"{path}", "fetch or write it again"):
        content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} must hold a JSON object {{...}}, got {type(content).__name__}: fetch or "
            f"write it again"
        )
    return content


def is_file(path: Path) -> bool:
    """Whether there is such a file. Raises ConfigError if the file system does not tell."""
    with reading(f"{path}", "correct the path, or its permissions"):
        return path.is_file()


@dataclass(frozen=True)
class JsonObject:
    """A JSON object in a file: the whole content, or an object nested in it."""

    path: Path
    content: dict[str, Any]
    prefix: str = ""
    """Prefix of the keys in messages, such as "rope_scaling." for the object under that key."""

    @classmethod
    def read(cls, path: Path) -> JsonObject:
        return cls(path, read_json(path))

    def __contains__(self, key: str) -> bool:
        return key in self.content

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.content.get(key, default)

    def refuse(self, key: str, problem: str) -> NoReturn:
        raise ConfigError(f"{self.path}: {self.prefix}{key} {problem}")

    def integer(self, key: str, default: Any = REQUIRED, *, at_most: int = _LARGEST) -> int:
        """A whole number from 1 to `at_most`."""
        value = self._value(key, default)
        if type(value) is not int or not 1 <= value <= at_most:  # True is an int too
            self.refuse(key, f"must be a whole number from 1 to {at_most}, got {shown(value)}")
        return value

    def number(self, key: str, default: Any = REQUIRED) -> float:
        """A finite number above 0."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not 0 < value <= 1e300:  # and no NaN
            self.refuse(key, f"must be a finite number above 0, got {shown(value)}")
        return value

    def truth(self, key: str, default: Any = REQUIRED) -> bool:
        value = self._value(key, default)
        if type(value) is not bool:
            self.refuse(key, f"must be true or false, got {shown(value)}")
        return value

    def section(self, key: str) -> JsonObject | None:
        """The object under `key`; None if it is absent, null or empty."""
        value = self.content.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, f"must be an object {{...}} or null, got {shown(value)}")
        return JsonObject(self.path, value, f"{self.prefix}{key}.") if value else None

    def _value(self, key: str, default: Any) -> Any:
        value = self.content.get(key, default)
        if value is REQUIRED:
            raise ConfigError(f"{self.path} has no key '{self.prefix}{key}': add it")
        return value


def shown(value: Any) -> str:
    """A JSON value as messages show it, cut if it is long."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
