"""Stage 2, reward: reward models score their samples on all ranks, then one rank of each replica runs the
reward functions and broadcasts the scores.

If a reward function raises, the run ends on every rank with a message that shows the sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_rpp.data.prompts import Example, Prompt
from megatron_rpp.data.response import ResponseFormat
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.parallel import groups, progress_wait
from megatron_rpp.rewards import RewardError, RewardSet, Scores
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.stages.model_reward import Encoded, RewardModel


@dataclass(frozen=True)
class Scorer:
    """What scores the responses of a run: its functions and models."""

    rewards: RewardSet
    form: ResponseFormat
    """How responses become text."""
    models: Sequence[RewardModel] = ()
    max_tokens: int = 8192
    """The token budget of a micro-batch of a model."""

    def score(self, prompts: list[Prompt], responses: list[list[int]]) -> Scores:
        """The scores of this replica's responses, on each of its ranks. Collective.

        Raises:
            RewardError: on every rank of the run, if a function or model failed on any.
        """
        texts = [self.form.text(response) for response in responses]
        of_models, cut = self._of_models(prompts, texts)
        scores, failure = None, None
        if groups.is_replica_leader():
            try:
                scores = self._of_all(prompts, texts, responses, of_models=of_models)
            except RewardError as error:
                failure = str(error)
        progress_wait.wait_for_all()
        scores, failure = groups.broadcast_object((scores, failure), groups.replica_group())
        _raise_any(failure)
        return replace(scores, cut=cut)

    def _of_models(
        self, prompts: list[Prompt], texts: list[str]
    ) -> tuple[dict[str, list[float]], int]:
        """The scores of each model, and how many of its inputs were cut, all models together."""
        encoded: list[Encoded] = []
        failure = None
        try:
            encoded = [model.encode(prompts, texts) for model in self.models]
        except ConfigError as error:
            failure = f"a reward model cannot read a response: {error}"
        if self.models:
            _raise_any(failure)
        scores = {
            model.name: model.score(prompts, found.sequences, max_tokens=self.max_tokens)
            for model, found in zip(self.models, encoded)
        }
        return scores, sum(found.cut for found in encoded)

    def _of_all(
        self,
        prompts: list[Prompt],
        texts: list[str],
        responses: list[list[int]],
        *,
        of_models: Mapping[str, list[float]],
    ) -> Scores:
        heartbeat.enter("a reward function")
        examples = [prompt.example for prompt in prompts]
        return self.rewards.score(
            [example.prompt for example in examples],
            texts,
            [example.label for example in examples],
            [_metadata(*pair) for pair in zip(examples, responses)],
            of_models=of_models,
            alive=heartbeat.current.beat,
        )


def _raise_any(failure: str | None) -> None:
    """Raises RewardError on every rank if there is a `failure` on any. Collective."""
    for message in groups.gather_objects(failure, groups.data_group()):
        if message is not None:
            raise RewardError(message)


def _metadata(example: Example, response: list[int]) -> dict[str, Any]:
    """The row's metadata, the length of the response and, if there is one, the conversation."""
    messages = {"messages": list(example.messages)} if example.messages else {}
    return example.metadata | messages | {"response_tokens": len(response)}


def score(buffer: RolloutBuffer, scorer: Scorer) -> Scores:
    """Fills `buffer.scores` [n]; returns them with the scores of each reward function."""
    responses = [buffer.response(index) for index in range(len(buffer))]
    scores = scorer.score(buffer.prompts, responses)
    buffer.scores = torch.tensor(scores.total, dtype=torch.float32)
    return scores
