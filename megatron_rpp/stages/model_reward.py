"""Part of stage 2: scores by reward models on Megatron, on the layout of the run.

A model reads prompt and response as texts, in its own tokens and chat template, as it did in its training
(data/pair_files.py), and scores them at the last token. The forward passes are pipelined over
micro-batches, and each replica scores its own samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rpp.data.chat import PromptFormat
from megatron_rpp.data.pair_files import encode_sides
from megatron_rpp.data.pairs import Side
from megatron_rpp.data.prompts import Prompt
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.model.frozen_model import FrozenModel
from megatron_rpp.stages.rating import rewards_of, sequence_buffer


@dataclass(frozen=True)
class RewardModel:
    """A reward model of a run."""

    name: str
    """In reward.functions."""
    model: FrozenModel
    form: PromptFormat
    """Its tokenizer and chat template."""
    max_length: int
    """Most tokens that it reads: the last ones."""

    def encode(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Encoded:
        """What the model reads of each sample.

        Raises ConfigError if it has no chat template, or the template refuses a conversation.
        """
        sides = [
            Side(prompt.example.messages or prompt.example.prompt, response)
            for prompt, response in zip(prompts, responses)
        ]
        whole = encode_sides(sides, self.form)
        cut = sum(len(sequence) > self.max_length for sequence in whole)
        return Encoded([sequence[-self.max_length :] for sequence in whole], cut)

    def score(
        self, prompts: list[Prompt], sequences: list[tuple[int, ...]], *, max_tokens: int
    ) -> list[float]:
        """The scores of this replica's samples. Collective over the world.

        max_tokens: the token budget of a micro-batch.
        """
        heartbeat.enter("a reward model")
        with self.model.active() as stage:
            return rewards_of(stage, sequence_buffer(prompts, sequences), max_tokens).tolist()


@dataclass(frozen=True)
class Encoded:
    """The tokens of samples."""

    sequences: list[tuple[int, ...]]
    cut: int
    """How many of them lack their beginning."""
