"""The user's mistake: `ConfigError`, one message, exit code 2 (exit_codes.py), no traceback.

`reading` wraps all code that reads the user's files and settings. Whatever a library raises in
there is treated as a mistake in the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_rpp.lifecycle.exit_codes import RunFailure


class ConfigError(ValueError):
    """A setting, a file or a row cannot be used.

    The message names it, its value and the remedy. It is the same on every rank.
    """


def reason(error: BaseException) -> str:
    """Describes a library's error in one line. If it has a cause, the cause is shown instead: it
    is more specific."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def first_line(error: BaseException) -> str:
    """The first line of its message that is not empty; the name of its type if there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def reading(what: str, remedy: str, verb: str = "read") -> Iterator[None]:
    """Turns any error that is raised while `what` is read into a ConfigError that names it.

    A ConfigError raised inside already names its place and passes through unchanged.

    Args:
        what: a file, a row of a file, or a setting, as the message names it.
        remedy: what the user can do about it.
        verb: what failed, as a participle.

    Raises:
        ConfigError: "`what` cannot be `verb` (...): `remedy`".
    """
    try:
        yield
    except (ConfigError, RunFailure, MemoryError):
        raise
    except Exception as error:
        raise ConfigError(f"{what} cannot be {verb} ({reason(error)}): {remedy}") from error
