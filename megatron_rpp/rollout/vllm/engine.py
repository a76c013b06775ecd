"""The rollout engine on vLLM servers.

Before a rollout, servers that do not run are started and all servers get the weights of the policy,
unless they have them. Then the first rank of each replica sends the requests and passes the responses
on. If servers are lost, they are started again, get the weights, and are sent what is missing; after
several such rounds the run ends. The first round may run in a thread beside the training (`begin`).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_rpp.config import Config
from megatron_rpp.data.tokenizer import Tokenizer
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.exit_codes import RunFailure
from megatron_rpp.model.language_model import chunks
from megatron_rpp.model.trained_model import TrainedModel
from megatron_rpp.parallel import groups, progress_wait
from megatron_rpp.records import Generation, Request, Sampling
from megatron_rpp.rollout.engine import Abandoned
from megatron_rpp.rollout.vllm.broadcast import Broadcast
from megatron_rpp.rollout.vllm.client import Client, Limits
from megatron_rpp.rollout.vllm.draw import Draw, Round
from megatron_rpp.rollout.vllm.environment import write_model_config
from megatron_rpp.rollout.vllm.fleet import Fleet, raise_first
from megatron_rpp.rollout.vllm.pushing import Problems
from megatron_rpp.rollout.vllm.same_gpu import SameGpu
from megatron_rpp.rollout.vllm.samples import Sampler
from megatron_rpp.rollout.vllm.weights import SharedFiles, Transport, weights_folder

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
"""Seconds before servers that have failed are asked again; each pause is twice the one before."""
_POLL = 0.2


class VllmEngine:
    """Samples on vLLM servers with the weights of `policy`."""

    def __init__(
        self,
        config: Config,
        policy: TrainedModel,
        tokenizer: Tokenizer,
        *,
        log: Callable[[str], None],
    ):
        """Starts no server yet. Collective.

        log: called with a line about each server that is lost, on every rank.
        """
        vllm = config.rollout.vllm
        self._policy, self._tokenizer, self._log = policy, tokenizer, log
        self._run = groups.broadcast_object(uuid.uuid4().hex[:12])
        self._pushes, self._version = 0, ""
        self._pushed_at: int | None = None  # optimizer steps behind the weights of the servers
        self._retries = vllm.retries
        model = (Path(config.logging.dir) / "vllm" / "model").absolute()
        if groups.is_main():
            vocab_size = chunks(policy.model)[0].true_vocab_size
            write_model_config(config, vocab_size, model)
        weights = weights_folder(Path(vllm.dir).absolute(), self._run)
        dist.barrier()
        self.fleet = Fleet(config, model=model, weights=weights)
        self._limits = Limits(
            retries=vllm.retries, timeout=vllm.timeout, seconds_per_token=vllm.seconds_per_token,
            at_once=config.rollout.max_batch, clients=self.fleet.leaders,
        )  # fmt: skip
        self.transport = _transport(config, self.fleet, weights)

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
        """See RolloutEngine. Collective over the world.

        Raises RunFailure on every rank if servers are lost again and again.
        """
        self.prepare(stop)
        sampler = Sampler(self._tokenizer, sampling, seed, step, self._version)
        heartbeat.enter("rollout on vLLM")
        done = self._round(requests, sampler, progress, stop=_alive(stop))
        return self._complete(requests, sampler, done, progress=progress, stop=stop)

    def begin(
        self,
        requests: list[Request],
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> Draw:
        """Begins what `generate` does, with the weights of now; `finish` returns the generations.

        Until then the policy may change, and nothing else may use the engine. Collective.
        """
        self.prepare(stop)
        draw = Draw(requests, Sampler(self._tokenizer, sampling, seed, step, self._version))
        if groups.is_replica_leader():
            draw.start(
                lambda own: self._round(
                    own.requests, own.sampler, own.count, stop=own.given_up.is_set
                )
            )
        return draw

    def finish(
        self,
        draw: Draw,
        *,
        progress: Callable[[int], None] = lambda finished: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Generation]:
        """Waits for what `begin` began; see RolloutEngine.generate. Collective over the world.

        Responses that are missing because servers were lost are sampled with the weights of now.
        """
        heartbeat.enter("rollout on vLLM")
        done = draw.wait(progress, stop)
        return self._complete(draw.requests, draw.sampler, done, progress=progress, stop=stop)

    def _complete(
        self,
        requests: list[Request],
        sampler: Sampler,
        done: Round,
        *,
        progress: Callable[[int], None],
        stop: Callable[[], bool],
    ) -> list[Generation]:
        """Repeats rounds after the first, which is `done`, until all replicas have their responses."""
        found: list[Generation | None] = [None] * len(requests)
        missing = list(range(len(requests)))
        for attempt in range(self._retries + 1):
            if attempt:
                self.prepare(stop)
                asked = [requests[i] for i in missing]
                sampler = replace(sampler, version=self._version)
                heartbeat.enter("rollout on vLLM")
                done = self._round(asked, sampler, progress, stop=_alive(stop))
            progress_wait.wait_for_all(idle=stop)
            for i, generation in zip(missing, done.generations):
                found[i] = generation
            missing = [i for i, generation in enumerate(found) if generation is None]
            incomplete = groups.is_replica_leader() and bool(missing)
            if not self._agree(done, incomplete, last=attempt == self._retries):
                break
        self._rest(stop)
        whole = groups.broadcast_object(found, groups.replica_group())
        return [generation for generation in whole if generation is not None]

    def prepare(self, stop: Callable[[], bool]) -> None:
        """Makes servers run with the weights of the policy. Collective.

        Those of the run are started; of those in rollout.vllm.urls, some may be left out.

        Raises:
            RunFailure: on every rank, if a server of the run, or all of rollout.vllm.urls, fail again
                and again.
            Abandoned: on every rank, if the run was told to stop meanwhile.
        """
        for attempt in range(self._retries + 1):
            self._pause(attempt, stop)
            last = attempt == self._retries
            started = self.fleet.ensure_running(stop)
            if self._drop(started.problems, last=last):
                continue
            steps = self._policy.scheduler.num_steps
            if not started.fresh and steps == self._pushed_at:
                return
            problems = self._push(stop)
            if self.fleet.leave_out(problems):  # the others have the weights
                self._drop(problems, last=False)
            elif self._drop(problems, last=last):
                continue
            self._pushed_at = steps
            return

    def _push(self, stop: Callable[[], bool]) -> Problems:
        """Sends the weights. Raises Abandoned, on every rank, if a stop has broken that off."""
        self._pushes += 1
        self._pushed_at, self._version = None, f"{self._run}-{self._pushes}"
        heartbeat.enter("weights to vLLM")
        problems = self.transport.push(
            self._policy.model, self.fleet.cared_for, self._version, stop=stop
        )
        progress_wait.wait_for_all(idle=stop)
        if groups.on_any(bool(problems) and stop()):
            raise Abandoned
        return problems

    def _pause(self, attempt: int, stop: Callable[[], bool]) -> None:
        """Gives servers that this run cannot start time to come back. Raises Abandoned on a stop."""
        if not attempt or self.fleet.starts:
            return
        end = time.monotonic() + min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE)
        while time.monotonic() < end and not stop():
            heartbeat.current.beat()
            time.sleep(_POLL)
        if groups.on_any(stop()):
            raise Abandoned

    def _rest(self, stop: Callable[[], bool]) -> None:
        """Lets the servers rest until the next update; ends those that do not. Collective."""
        heartbeat.enter("vLLM goes to sleep")
        self._drop(self.transport.rest(self.fleet.cared_for, stop=stop), last=False)
        if not self.transport.keeps_weights:
            self._pushed_at = None

    def _round(
        self,
        requests: list[Request],
        sampler: Sampler,
        progress: Callable[[int], None],
        *,
        stop: Callable[[], bool],
    ) -> Round:
        """Not collective, so that a thread may call it."""
        if not groups.is_replica_leader():
            return Round()
        servers = self.fleet.usable
        client = Client(list(servers.values()), self._limits, self.fleet.leader % len(servers))
        try:
            outcome = client.run(requests, sampler, progress=progress, stop=stop)
        except Abandoned:
            return Round(abandoned=True)
        except RunFailure as error:
            return Round(problem=str(error))
        numbers = list(servers)
        return Round(outcome.generations, {numbers[i]: why for i, why in outcome.lost.items()})

    def _agree(self, done: Round, incomplete: bool, *, last: bool) -> bool:
        """Gives up what was lost; returns whether any replica lacks responses. Collective.

        last: raise if any does.
        """
        rounds = groups.gather_objects(
            (done.abandoned, done.problem, done.lost, incomplete), dist.group.WORLD
        )
        raise_first(problem for _, problem, _, _ in rounds)
        if any(abandoned for abandoned, _, _, _ in rounds):
            raise Abandoned
        again = any(incomplete for _, _, _, incomplete in rounds)
        lost = {number: why for _, _, lost, _ in rounds for number, why in lost.items()}
        self._drop(lost, last=last and again)
        return again

    def _drop(self, lost: dict[int, str], *, last: bool) -> bool:
        """Ends lost servers; returns whether there are any. Collective.

        last: raise RunFailure, with the log of one of them, because they have been started again
            often enough.
        """
        reasons = groups.gather_objects(self.fleet.give_up(lost), dist.group.WORLD)
        found = [reason for own in reasons for reason in own.values()]
        if found:
            self._pushed_at = None
        for reason in found:
            if last:
                raise RunFailure(reason)
            self._log(reason)
        return bool(found)


def _alive(stop: Callable[[], bool]) -> Callable[[], bool]:
    """`stop`, which also gives a sign of life of the main thread."""

    def told() -> bool:
        heartbeat.current.beat()  # the limits of the requests end a rollout that hangs
        return stop()

    return told


def _transport(config: Config, fleet: Fleet, weights: Path) -> Transport:
    vllm = config.rollout.vllm
    if vllm.transport == "nccl":
        return Broadcast(fleet.count * vllm.tensor, vllm.tensor, vllm.start_timeout)
    if vllm.transport == "ipc":
        return SameGpu(fleet.shares_gpu, vllm.start_timeout)
    return SharedFiles(weights, vllm.start_timeout)
