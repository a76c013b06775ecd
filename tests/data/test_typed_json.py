"""Python values through JSON text and back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.data.typed_json import from_typed_json, to_typed_json

KEYS = st.one_of(
    st.integers(), st.text(), st.sampled_from(["__tuple__", "__items__"]), st.tuples(st.integers())
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
    max_leaves=8,
)


def same(a, b) -> bool:
    """Equality that distinguishes 1 from True and a tuple from a list, at any depth."""
    return repr(a) == repr(b)


@given(VALUES)
def test_values_come_back_with_their_types(value):
    assert same(from_typed_json(json.loads(json.dumps(to_typed_json(value)))), value)


def test_plain_json_stays_as_it_is():
    value = {"expression": "1 + 2", "terms": [1, 2.5, None, True], "nested": {"a": {}}}
    assert to_typed_json(value) == value


@pytest.mark.parametrize(
    "value, text",
    [
        ((1, 2), '{"__tuple__": [1, 2]}'),
        ({0: "a"}, '{"__items__": [[0, "a"]]}'),
        ({"__tuple__": [1]}, '{"__items__": [["__tuple__", [1]]]}'),
    ],
)
def test_form_in_the_file(value, text):
    assert json.dumps(to_typed_json(value)) == text
