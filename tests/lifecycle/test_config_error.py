"""An error that a library raises while the user's input is read becomes a ConfigError; no other
error does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_rpp.lifecycle.config_error import ConfigError, reading
from megatron_rpp.lifecycle.exit_codes import RunFailure


def caught(raising) -> ValueError:
    with pytest.raises(ValueError) as found, reading("file x", "correct it"):
        raising()
    return found.value


@pytest.mark.parametrize(
    ("raising", "reason"),
    [
        (lambda: json.loads("{"), "JSONDecodeError: Expecting property name"),
        (lambda: {}["key"], "KeyError: 'key'"),
        (lambda: Path("/gone/file").read_text(), r"FileNotFoundError: .*'/gone/file'"),
        (lambda: b"\xff".decode(), "UnicodeDecodeError: 'utf-8' codec"),
        (lambda: int("1" * 5000), "ValueError: Exceeds the limit"),
    ],
)
def test_an_error_of_a_library_becomes_one_that_names_the_input(raising, reason):
    error = caught(raising)
    assert type(error) is ConfigError
    assert str(error).startswith("file x cannot be read (") and str(error).endswith("): correct it")
    assert re.search(reason, str(error))


def test_the_innermost_name_stays():
    def inner():
        with reading("row 3", "correct the row"):
            json.loads("{")

    assert str(caught(inner)).startswith("row 3 cannot be read (")


@pytest.mark.parametrize("failure", [RunFailure("a rank failed"), MemoryError()])
def test_errors_that_are_not_about_the_input_pass(failure):
    with pytest.raises(type(failure)), reading("file x", "correct it"):
        raise failure


def test_an_error_outside_reading_is_unchanged():
    with pytest.raises(ValueError) as found:
        json.loads("{")
    assert not isinstance(found.value, ConfigError)
