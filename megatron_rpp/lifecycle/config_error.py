"""The user's mistake: `ConfigError`, one message, exit code 2 (exit_codes.py), no traceback.

`reading` is the net around everything that reads what the user gave. If a library fails in there,
it has met a mistake of the user's, whatever it raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_rpp.lifecycle.exit_codes import RunFailure


class ConfigError(ValueError):
    """A setting, a file or a row that cannot be used. The message names it, its value and the
    remedy; it is the same on every rank."""


def reason(error: BaseException) -> str:
    """What a library raised, in one line; where it names a cause, that tells more."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def reading(what: str, remedy: str, verb: str = "read") -> Iterator[None]:
    """Turns whatever is raised while `what` is read into a refusal that names it.

    A refusal raised inside has named its place already and passes through unchanged.

    Args:
        what: a file, a row of one, or a setting, as the message names it.
        remedy: what the user can do about it.
        verb: what could not be done with it.

    Raises:
        ConfigError: "`what` cannot be `verb` (...): `remedy`".
    """
    try:
        yield
    except (ConfigError, RunFailure, MemoryError):
        raise
    except Exception as error:
        raise ConfigError(f"{what} cannot be {verb} ({reason(error)}): {remedy}") from error
