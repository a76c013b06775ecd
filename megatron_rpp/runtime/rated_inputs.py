"""Opens and checks the data and the tokenizer of a reward model, before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rpp.config import Config, RewardConfig
from megatron_rpp.data.loading import check_sources
from megatron_rpp.data.pair_files import open_rated
from megatron_rpp.data.pairs import Content
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.reporting.console import Console
from megatron_rpp.runtime.inputs import (
    Inputs,
    model_vocabulary,
    once_a_node,
    open_rewards,
    open_tokenizer,
    response_format,
    samplings,
)


@dataclass(frozen=True)
class RatedInputs(Inputs):
    """The inputs of a reward model. No reward function scores anything."""

    content: Content = "pairs"
    have_prompts: bool = True
    """Whether the rows have prompts in a field of their own."""

    @property
    def counts(self) -> str:
        rows = "pairs" if self.content == "pairs" else "responses with a score"
        whole = "" if self.have_prompts else ", all of them whole conversations or texts"
        return (
            f"{len(self.train)} {rows}, {len(self.held_out)} held out, {self.dropped} dropped as too "
            f"long{whole}"
        )


def load_rated_inputs(config: Config) -> RatedInputs:
    """Opens tokenizer and data sets.

    Raises ConfigError for a mistake of the user's: a missing or malformed file or row, a row that is
    too long, a tokenizer larger than the model's vocabulary.
    """
    check_sources(config.data)  # a Hugging Face tokenizer takes seconds to load
    tokenizer, form = open_tokenizer(config.data)
    vocab_size = model_vocabulary(config, tokenizer)
    data = open_rated(
        config.data, config.reward_model, form, context=config.model.max_length, seed=config.seed,
        bar=Console(main=True).stage, log=once_a_node(),
    )  # fmt: skip
    target = config.reward_model.stop_accuracy
    if data.content == "scores" and target is not None:
        raise ConfigError(
            f"reward_model.stop_accuracy {target} needs pairs of responses, the rows have scores: leave "
            "it out"
        )
    count = min(config.evaluation.prompts or len(data.held_out), len(data.held_out))
    sampling, greedy = samplings(config.rollout, tokenizer)
    return RatedInputs(
        tokenizer=tokenizer,
        form=form,
        train=data.train,
        held_out=[data.held_out[index] for index in range(count)],
        rewards=open_rewards(RewardConfig()),
        vocab_size=vocab_size,
        response_form=response_format(config, tokenizer, sampling),
        sampling=sampling,
        greedy=greedy,
        dropped=data.dropped,
        content=data.content,
        have_prompts=data.have_prompts,
    )
