"""A user's mistake is refused: one message, exit code 2 (failures.py), no traceback.

A refusal is a ValueError that this package raised. `reading` is the net around everything that
reads what the user gave: a library that fails in there has met a mistake of the user's, whatever
it raises.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_rpp.failures import RunFailure

_PACKAGE = str(Path(__file__).parent)


def is_refusal(error: BaseException) -> bool:
    """Whether this package raised `error` to refuse a mistake.

    A ValueError that comes out of a library elsewhere than in `reading` is a failure and keeps its
    traceback.
    """
    if not isinstance(error, ValueError):
        return False
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_PACKAGE)


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
        ValueError: "`what` cannot be `verb` (...): `remedy`".
    """
    try:
        yield
    except (RunFailure, MemoryError):
        raise
    except Exception as error:
        if is_refusal(error):
            raise
        raise ValueError(f"{what} cannot be {verb} ({reason(error)}): {remedy}") from error
