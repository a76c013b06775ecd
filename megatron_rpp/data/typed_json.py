"""JSON that preserves tuples, and dictionary keys that are not strings.

Plain JSON turns tuples into lists and the key 1 into "1". Some scorers of reasoning-gym compare
tuples (arc_agi, rearc) or look up integers (graph_color), and would score every answer as wrong.
Left out: sets, bytes and objects, which no task uses. json.dumps raises on them.
"""

from __future__ import annotations

from typing import Any

_TUPLE = "__tuple__"
_ITEMS = "__items__"


def to_typed_json(value: Any) -> Any:
    """Encodes nested dicts, lists, tuples, strings, numbers and None in types that JSON
    preserves."""
    if isinstance(value, tuple):
        return {_TUPLE: [to_typed_json(item) for item in value]}
    if isinstance(value, list):
        return [to_typed_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if all(isinstance(key, str) for key in value) and not value.keys() & {_TUPLE, _ITEMS}:
        return {key: to_typed_json(item) for key, item in value.items()}
    return {_ITEMS: [[to_typed_json(key), to_typed_json(item)] for key, item in value.items()]}


def from_typed_json(value: Any) -> Any:
    """The inverse of ``to_typed_json``."""
    if isinstance(value, list):
        return [from_typed_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TUPLE}:
        return tuple(from_typed_json(item) for item in value[_TUPLE])
    if value.keys() == {_ITEMS}:
        return {from_typed_json(key): from_typed_json(item) for key, item in value[_ITEMS]}
    return {key: from_typed_json(item) for key, item in value.items()}
