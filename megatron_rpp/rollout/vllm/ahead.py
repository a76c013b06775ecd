"""Samples the responses of the next step while the run works on the current one (rollout.ahead).

A step that finds its samples drawn takes them. Whoever else wants the engine, such as an evaluation,
waits until the samples are there; they are kept for their step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_rpp.parallel import groups
from megatron_rpp.records import Generation, Request, Sampling, StepKey
from megatron_rpp.rollout.vllm.draw import Draw
from megatron_rpp.rollout.vllm.engine import VllmEngine


@dataclass
class _Ahead:
    """The samples of a step that is yet to come."""

    key: StepKey
    sampling: Sampling
    draw: Draw
    generations: list[Generation] | None = None
    """None until they have been waited for."""


class AheadEngine:
    """A rollout engine that can begin with a step before it is asked for its samples."""

    def __init__(self, engine: VllmEngine):
        self._engine = engine
        self._ahead: _Ahead | None = None

    @property
    def key(self) -> StepKey | None:
        """The step whose samples have been begun; None if there is none."""
        return self._ahead.key if self._ahead is not None else None

    def begin(
        self,
        requests: list[Request],
        sampling: Sampling,
        key: StepKey,
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Begins to sample the responses of step `key` with the weights of now. Collective.

        No other step may be begun. Raises Abandoned, on every rank, if the run was told to stop.
        """
        assert self._ahead is None, f"{self.key} was begun and not taken"
        draw = self._engine.begin(requests, sampling, seed=key.seed, step=key.step, stop=stop)
        self._ahead = _Ahead(key, sampling, draw)

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
        """See RolloutEngine. Returns what was begun if it is that, else samples with the weights of
        now, after what was begun."""
        self._finish(progress, stop)
        ahead = self._ahead
        if ahead is None or (ahead.key.seed, ahead.key.step, ahead.sampling) != (
            seed, step, sampling,
        ):  # fmt: skip
            return self._engine.generate(
                requests, sampling, seed=seed, step=step, progress=progress, stop=stop
            )
        assert ahead.generations is not None and ahead.draw.requests == requests
        self._ahead = None
        return ahead.generations

    def _finish(self, progress: Callable[[int], None], stop: Callable[[], bool]) -> None:
        """Waits for the samples that were begun, if any. Collective.

        If that is abandoned or fails, they are gone.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return
        try:
            if ahead.generations is None:
                ahead.generations = self._engine.finish(ahead.draw, progress=progress, stop=stop)
        except BaseException:
            ahead.draw.give_up()
            raise
        self._ahead = ahead

    def finished(self) -> bool:
        """Whether all samples that were begun are there, on every rank. Collective."""
        return not groups.on_any(self._ahead is None or not self._ahead.draw.done)

    def give_up(self) -> None:
        """Abandons what was begun, if anything. Not collective, but to be called on every rank."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.draw.give_up()
