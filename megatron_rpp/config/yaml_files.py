"""YAML of configuration files, read more strictly than PyYAML does by default.

1e-4 is a number, as in YAML 1.2 (PyYAML follows YAML 1.1 and reads a string). A key that appears
twice in one mapping is an error (PyYAML keeps the last). ``read_yaml`` reads back what
``dump_yaml`` writes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_rpp.lifecycle.config_error import ConfigError

_EXPONENT_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """Checks the keys as written, before ``<<`` merges other mappings in."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            # A key may be a mapping or a list, which cannot be hashed: compare their texts.
            text = str(key.value)
            if text in seen:
                line = key.start_mark.line + 1
                raise ConfigError(f"key '{text}' is given again in line {line}: join the two")
            seen.add(text)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes strings that the loader would take for numbers."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FLOAT, list("-+.0123456789"))


def read_yaml(file: str) -> dict[str, Any]:
    """The mapping in ``file``; an empty file gives {}. Raises a ConfigError that names the file."""
    path = Path(file).absolute()
    try:
        content = yaml.load(path.read_bytes(), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"cannot read config file '{path}': {error.strerror}") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"config file '{path}': {error}") from error
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"config file '{file}' must hold 'section:' lines, got {content!r}")
    return content or {}


def dump_yaml(content: dict[str, Any]) -> str:
    """``content`` as YAML, in its order. Only ASCII: PyYAML would fold Unicode line breaks."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)
