"""Stage 2, reward: one rank of each replica scores its samples, then broadcasts the scores.

If a reward function raises, the run ends on every rank with a message that shows the sample.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_rpp.data.prompts import Example, Prompt
from megatron_rpp.data.response import ResponseFormat
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.parallel import groups, progress_wait
from megatron_rpp.rewards import RewardError, RewardSet, Scores
from megatron_rpp.rollout.buffer import RolloutBuffer


def score_responses(
    rewards: RewardSet, form: ResponseFormat, *, prompts: list[Prompt], responses: list[list[int]]
) -> Scores:
    """The scores of this replica's responses, on each of its ranks.

    Raises:
        RewardError: on every rank of the run, if a reward function failed on any.
    """
    scores, failure = None, None
    if groups.is_replica_leader():
        examples = [prompt.example for prompt in prompts]
        heartbeat.enter("a reward function")
        try:
            scores = rewards.score(
                [example.prompt for example in examples],
                [form.text(response) for response in responses],
                [example.label for example in examples],
                [_metadata(*pair) for pair in zip(examples, responses)],
                alive=heartbeat.current.beat,
            )
        except RewardError as error:
            failure = str(error)
    progress_wait.wait_for_all()
    scores, failure = groups.broadcast_object((scores, failure), groups.replica_group())
    for message in groups.gather_objects(failure, groups.data_group()):
        if message is not None:
            raise RewardError(message)
    return scores


def _metadata(example: Example, response: list[int]) -> dict[str, Any]:
    """The row's metadata, the length of the response and, if there is one, the conversation."""
    messages = {"messages": list(example.messages)} if example.messages else {}
    return example.metadata | messages | {"response_tokens": len(response)}


def score(buffer: RolloutBuffer, rewards: RewardSet, form: ResponseFormat) -> Scores:
    """Fills `buffer.scores` [n]; returns them with the scores of each reward function."""
    responses = [buffer.response(index) for index in range(len(buffer))]
    scores = score_responses(rewards, form, prompts=buffer.prompts, responses=responses)
    buffer.scores = torch.tensor(scores.total, dtype=torch.float32)
    return scores
