"""What the checks of tools/gpu_acceptance.py find. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

PASSED, FAILED, SKIPPED, MEASURED = "passed", "failed", "skipped", "measured"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measured value and what it is held to. If that is nothing, its status is `measured`."""

    name: str
    value: float | str | None = None
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    verdict: bool | None = None
    """For a value that is not a number: whether it is right."""
    skipped: str | None = None
    """Why there is no value."""

    @property
    def status(self) -> str:
        if self.skipped is not None:
            return SKIPPED
        if self.at_least is None and self.at_most is None and self.verdict is None:
            return MEASURED
        # Written so that NaN fails.
        low = self.at_least is None or self.value >= self.at_least
        high = self.at_most is None or self.value <= self.at_most
        return PASSED if low and high and self.verdict is not False else FAILED

    @property
    def threshold(self) -> str:
        bounds = ((">=", self.at_least), ("<=", self.at_most))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)

    def as_json(self) -> dict[str, Any]:
        value = self.value
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)  # JSON has no NaN and no infinity
        return asdict(self) | {"value": value, "status": self.status}

    def __str__(self) -> str:
        if self.skipped is not None:
            return f"{self.name}: {self.skipped}"
        value = f"{self.value:.4g}" if isinstance(self.value, float) else str(self.value)
        held = f" ({self.threshold})" if self.threshold else ""
        return f"{self.name}: {value}{' ' if self.unit else ''}{self.unit}{held}"


def status_of(figures: Iterable[Figure], error: str | None) -> str:
    """failed if any figure failed or the check raised; skipped if all its figures were."""
    found = {figure.status for figure in figures}
    if error is not None or FAILED in found:
        return FAILED
    return PASSED if found - {SKIPPED} else SKIPPED
