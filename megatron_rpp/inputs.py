"""Everything a run reads, opened and checked before any expensive work and before any rank waits
for another: every rank reads the same files and refuses the same mistakes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rpp.config import Config, DataConfig, RewardConfig, RolloutConfig
from megatron_rpp.console import Console
from megatron_rpp.data.chat import PromptFormat
from megatron_rpp.data.opening import given, open_data
from megatron_rpp.data.prompts import Prompt, PromptSet
from megatron_rpp.data.tokenizer import Tokenizer, load_tokenizer
from megatron_rpp.records import Sampling
from megatron_rpp.rewards import RewardSet


@dataclass(frozen=True)
class Inputs:
    tokenizer: Tokenizer
    form: PromptFormat
    train: PromptSet
    held_out: Sequence[Prompt]
    rewards: RewardSet
    vocab_size: int
    """Of the model: the configured size, else the tokenizer's."""
    sampling: Sampling
    """Of the rollouts."""
    greedy: Sampling
    """Of the evaluations."""
    dropped: int = 0
    """Prompts left out because they are too long."""

    @property
    def counts(self) -> str:
        """In words."""
        return (
            f"{len(self.train)} prompts, {len(self.held_out)} held out, {self.dropped} dropped as "
            f"too long"
        )


def check_writable(setting: str, directory: str) -> None:
    """Raises ValueError where `directory` cannot be made or written to."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(
            f"{setting} {directory} cannot be written ({error.strerror}): choose another directory "
            f"or change its permissions"
        ) from error


def load_inputs(config: Config) -> Inputs:
    """Opens tokenizer, data sets and rewards.

    Raises:
        ValueError: the user's mistake, with the remedy: a missing or malformed file, a prompt
            that leaves no room for the response, a tokenizer larger than the model's vocabulary,
            a reward that cannot be imported.
    """
    tokenizer, form = open_tokenizer(config.data)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} tokens, more than "
            f"model.vocab_size {vocab_size}: raise model.vocab_size, or leave it out to take the "
            f"tokenizer's"
        )
    limit = config.model.max_length - config.rollout.max_new_tokens
    data = open_data(config.data, form, limit, config.seed, Console(main=True).stage)
    count = min(config.evaluation.prompts or len(data.held_out), len(data.held_out))
    held_out = [data.held_out[index] for index in range(count)]
    sampling, greedy = samplings(config.rollout)
    return Inputs(
        tokenizer=tokenizer,
        form=form,
        train=data.train,
        held_out=held_out,
        rewards=open_rewards(config.reward),
        vocab_size=vocab_size,
        sampling=sampling,
        greedy=greedy,
        dropped=data.dropped,
    )


def open_tokenizer(data: DataConfig) -> tuple[Tokenizer, PromptFormat]:
    """The tokenizer, and how prompts become its tokens."""
    tokenizer = load_tokenizer(
        given("data.tokenizer", data.tokenizer), data.chat_template, data.trust_remote_code
    )
    return tokenizer, PromptFormat(tokenizer, data.apply_chat_template, data.system_prompt)


def open_rewards(reward: RewardConfig) -> RewardSet:
    """The reward functions; their worker processes start with the first sample."""
    return RewardSet(
        reward.functions,
        reward.weights,
        reward.options,
        reward.workers,
        reward.timeout,
        reward.timeout_score,
    )


def samplings(rollout: RolloutConfig) -> tuple[Sampling, Sampling]:
    """How rollouts are sampled, and the greedy decoding of evaluations."""
    sampling = Sampling(
        max_new_tokens=rollout.max_new_tokens,
        min_new_tokens=rollout.min_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop=tuple(rollout.stop),
    )
    return sampling, replace(sampling, temperature=0.0)
