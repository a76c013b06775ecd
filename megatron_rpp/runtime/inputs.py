"""Opens and checks the data, tokenizer and rewards of a run, before torch is imported.

Every rank reads the same files and finds the same mistakes, before any rank waits for another.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rpp.config import Config, DataConfig, RewardConfig, RolloutConfig
from megatron_rpp.data.chat import PromptFormat
from megatron_rpp.data.loading import (
    ANY_ROW,
    RowCheck,
    cache_dir,
    check_sources,
    given,
    open_data,
    pass_key,
)
from megatron_rpp.data.prompts import Prompt, PromptSet
from megatron_rpp.data.response import ResponseFormat
from megatron_rpp.data.row_cache import Pass, cached
from megatron_rpp.data.supervised import fitting_sft_rows
from megatron_rpp.data.tokenizer import Tokenizer, load_tokenizer
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.records import Sampling
from megatron_rpp.reporting.console import Console
from megatron_rpp.rewards import RewardSet
from megatron_rpp.rollout.stopping import split_stops

if TYPE_CHECKING:  # it loads torch
    from megatron_rpp.hf.source import Source
    from megatron_rpp.runtime.reward_models import RewardModelSource


@dataclass(frozen=True)
class Inputs:
    tokenizer: Tokenizer
    form: PromptFormat
    train: PromptSet
    held_out: Sequence[Prompt]
    rewards: RewardSet
    vocab_size: int
    """Vocabulary of the model: model.vocab_size, or else that of the tokenizer."""
    response_form: ResponseFormat
    sampling: Sampling
    """How rollouts are sampled."""
    greedy: Sampling
    """How evaluations are decoded."""
    dropped: int = 0
    """Number of prompts left out because they are too long."""
    reward_models: tuple[RewardModelSource, ...] = ()
    """The reward models that were found and checked."""
    source: Source | None = None
    """What the check of model.hf_path found; None: there is none, or it was not checked yet."""

    @property
    def counts(self) -> str:
        """The numbers of prompts, for the log."""
        return (
            f"{len(self.train)} prompts, {len(self.held_out)} held out, {self.dropped} dropped as "
            f"too long"
        )

    def note_on_labels(self) -> str | None:
        """Says which labels the rewards read differently than expected; None: there are none."""
        held_out = (prompt.example.label for prompt in self.held_out)
        return self.rewards.note_on(chain(held_out, self.train.labels()))


def check_writable(setting: str, directory: str) -> None:
    """Raises ConfigError if `directory` cannot be made or written to."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(
            f"{setting} {Path(directory).absolute()} cannot be written ({error.strerror}): choose "
            f"another directory or change its permissions"
        ) from error


def load_inputs(config: Config, train_is_scored: bool = True) -> Inputs:
    """Opens tokenizer, data sets and rewards; checks the reward models.

    train_is_scored: the rewards score the training prompts too, not only the held-out ones.

    Raises:
        ConfigError: a mistake of the user's: a missing or malformed file, a prompt
            that leaves no room for the response, a tokenizer larger than the model's vocabulary,
            a reward that cannot be imported.
    """
    check_sources(config.data)  # a Hugging Face tokenizer takes seconds to load
    rewards = open_rewards(config.reward)
    tokenizer, form = open_tokenizer(config.data)
    vocab_size = model_vocabulary(config, tokenizer)
    limit = config.model.max_length - config.rollout.max_new_tokens
    scorable = RowCheck(
        json.dumps([config.reward.functions, config.reward.options], sort_keys=True, default=str),
        lambda example: rewards.row_problem(example.label, example.metadata),
    )
    data = open_data(
        config.data, form, limit=limit, seed=config.seed, bar=Console(main=True).stage,
        held_out_check=scorable, train_check=scorable if train_is_scored else ANY_ROW,
        log=once_a_node(),
    )  # fmt: skip
    count = min(config.evaluation.prompts or len(data.held_out), len(data.held_out))
    held_out = [data.held_out[index] for index in range(count)]
    sampling, greedy = samplings(config.rollout, tokenizer)
    inputs = Inputs(
        tokenizer=tokenizer,
        form=form,
        train=data.train,
        held_out=held_out,
        rewards=rewards,
        vocab_size=vocab_size,
        response_form=response_format(config, tokenizer, sampling),
        sampling=sampling,
        greedy=greedy,
        dropped=data.dropped,
    )
    if config.reward.model_names:
        from megatron_rpp.runtime.reward_models import open_reward_models  # loads torch

        inputs = replace(inputs, reward_models=open_reward_models(config, inputs))
    return inputs


def with_fitting_rows(config: Config, inputs: Inputs) -> Inputs:
    """Checks all training rows; drops those too long with their labels, if data.overlong_prompts
    says so.

    The first start on a source reads all of it, on one rank of each node.

    Raises ConfigError if a row has no label, or is too long and may not be dropped.
    """
    context, parts = config.model.max_length, []
    drop = config.data.overlong_prompts == "drop"
    for part in inputs.train.parts:

        def find() -> Pass:
            return Pass(fitting_sft_rows(part, inputs.form, context, drop=drop), *part.digests)

        used = hashlib.sha256(part.rows.tobytes()).hexdigest()
        key = pass_key(config.data, part.examples.rows.identity, used, "lessons", context)
        found = cached(cache_dir(config.data), key, find, log=once_a_node())
        parts.append(replace(part, rows=found.rows))
        if not len(parts[-1]):
            raise ConfigError(
                f"from {part.where(0)} on, no row fits model.max_length {context} with its label: "
                "raise it"
            )
    train = inputs.train.with_parts(parts)
    dropped = inputs.dropped + len(inputs.train) - len(train)
    return replace(inputs, train=train, dropped=dropped)


def model_vocabulary(config: Config, tokenizer: Tokenizer) -> int:
    """Vocabulary of the model: model.vocab_size, or else that of the tokenizer.

    Raises ConfigError if the tokenizer has more ids.
    """
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} tokens, more than "
            f"model.vocab_size {vocab_size}: raise model.vocab_size, or leave it out to take the "
            f"tokenizer's"
        )
    return vocab_size


def once_a_node() -> Callable[[str], None]:
    """Returns a function that prints each text once per node, because its ranks read the same files.

    It prints to stderr, because other programs read the stdout of some tools.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return lambda text: None
    return cache(partial(print, file=sys.stderr, flush=True))


def response_format(config: Config, tokenizer: Tokenizer, sampling: Sampling) -> ResponseFormat:
    """How responses become text for rewards and logs."""
    return ResponseFormat(tokenizer, config.reward.keep_special_tokens, sampling.stop_token_ids)


def open_tokenizer(data: DataConfig) -> tuple[Tokenizer, PromptFormat]:
    """Opens the tokenizer; returns it, and how prompts become its tokens."""
    tokenizer = load_tokenizer(
        given("data.tokenizer", data.tokenizer), data.chat_template, data.trust_remote_code
    )
    return tokenizer, PromptFormat(tokenizer, data.apply_chat_template, data.system_prompt)


def open_rewards(reward: RewardConfig) -> RewardSet:
    """Loads the reward functions; their worker processes start with the first sample."""
    return RewardSet(
        reward.functions,
        weights=reward.weights,
        options=reward.options,
        workers=reward.workers,
        timeout=reward.timeout,
        timeout_score=reward.timeout_score,
    )


def samplings(rollout: RolloutConfig, tokenizer: Tokenizer) -> tuple[Sampling, Sampling]:
    """Returns how rollouts are sampled, and the greedy decoding of evaluations.

    Raises:
        ConfigError: rollout.stop or rollout.stop_token_ids do not fit the tokenizer.
    """
    stop, stop_token_ids = split_stops(tokenizer, rollout.stop, rollout.stop_token_ids)
    sampling = Sampling(
        max_new_tokens=rollout.max_new_tokens,
        min_new_tokens=rollout.min_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop=stop,
        stop_token_ids=stop_token_ids,
    )
    return sampling, replace(sampling, temperature=0.0)
