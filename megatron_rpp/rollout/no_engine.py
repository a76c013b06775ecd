"""The engine of a run that samples nothing."""

from __future__ import annotations

from collections.abc import Callable

from megatron_rpp.records import Generation, Request, Sampling


class NoEngine:
    """Stands for an engine where there is no policy: reward_model.py."""

    def generate(
        self,
        requests: list[Request],
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        progress: Callable[[int], None] = lambda finished: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Generation]:
        """Must not be called."""
        raise AssertionError("a run without a policy samples no responses")
