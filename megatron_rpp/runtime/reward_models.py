"""The reward models of a run, `model:DIR` in reward.functions: checked at the start, then built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rpp.config import Config, ModelConfig
from megatron_rpp.config.infer_settings import tokenizer_folder
from megatron_rpp.config.learning import model_directory
from megatron_rpp.config.validation import check_layout
from megatron_rpp.conversion.content import model_digest
from megatron_rpp.conversion.settings import ModelSettings, model_settings
from megatron_rpp.data.chat import PromptFormat
from megatron_rpp.data.tokenizer import load_tokenizer
from megatron_rpp.hf.architecture import CONFIG
from megatron_rpp.hf.source import check_source
from megatron_rpp.lifecycle.config_error import ConfigError

if TYPE_CHECKING:
    from megatron_rpp.runtime.inputs import Inputs
    from megatron_rpp.stages.reward import Scorer


@dataclass(frozen=True)
class RewardModelSource:
    """A reward model that was found and checked."""

    name: str
    """In reward.functions."""
    directory: Path
    model: ModelConfig
    vocab_size: int
    form: PromptFormat
    max_length: int
    """Most tokens that it reads."""
    digest: str
    """Of its weights and tokenizer."""


@cache  # a plan asks for every layout
def _settings(directory: Path) -> ModelSettings:
    return model_settings(directory)


def reward_model_config(config: Config, name: str) -> tuple[ModelConfig, int]:
    """The section `model` of the reward model `name`, and its vocabulary.

    Raises ConfigError if its directory holds none, or its shape does not fit the layout.
    """
    directory = model_directory(name)
    assert directory is not None
    with _naming(name):
        found = _settings(directory)
        if not found.scalar:
            raise ConfigError(
                f"{directory} is a language model, it has no score: give a sequence classifier with one "
                "label, or train a reward model with megatron_rpp.reward_model"
            )
        model = found.config(
            dtype=config.model.dtype, transformer_impl=config.model.transformer_impl
        )
        check_layout(model, config.parallel)
    return model, found.settings["vocab_size"]


def open_reward_models(config: Config, inputs: Inputs) -> tuple[RewardModelSource, ...]:
    """Finds and checks the reward models.

    Raises ConfigError if one cannot be read, does not fit the layout, or cannot encode the data.
    """
    return tuple(_open(config, inputs, name) for name in config.reward.model_names)


def _open(config: Config, inputs: Inputs, name: str) -> RewardModelSource:
    model, vocab_size = reward_model_config(config, name)
    directory = model_directory(name)
    assert directory is not None
    with _naming(name):
        if (directory / CONFIG).is_file():
            check_source(directory)
        source = RewardModelSource(
            name, directory, model, vocab_size, form=_form(config, inputs, directory),
            max_length=_max_length(config, name, model.max_length), digest=model_digest(directory),
        )  # fmt: skip
        _check_tokens(source, inputs)
    return source


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Names the function in the message of a ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"reward function {name!r}: {error}") from error


def _form(config: Config, inputs: Inputs, directory: Path) -> PromptFormat:
    """Its own tokenizer and chat template, or those of the policy if it has none."""
    folder = tokenizer_folder(directory)
    if folder is None:
        return inputs.form
    tokenizer = load_tokenizer(folder)  # data.trust_remote_code is about the policy's
    return PromptFormat(tokenizer, config.data.apply_chat_template, config.data.system_prompt)


def _max_length(config: Config, name: str, context: int) -> int:
    options = config.reward.options.get(name, {})
    length = options.get("max_length", context)
    if options.keys() - {"max_length"} or type(length) is not int or not 2 <= length <= context:
        raise ConfigError(
            f"its reward.options may hold max_length, a number from 2 to the model's context of "
            f"{context} tokens, got {options}"
        )
    return length


def _check_tokens(source: RewardModelSource, inputs: Inputs) -> None:
    """Raises ConfigError unless the tokenizer fits the model and can read the first prompts."""
    tokenizer = source.form.tokenizer
    if tokenizer.vocab_size > source.vocab_size:
        raise ConfigError(
            f"its tokenizer has {tokenizer.vocab_size} tokens, more than the "
            f"{source.vocab_size} of the model: put the model's own tokenizer into "
            f"{source.directory}"
        )
    for prompt in (inputs.train[0], *inputs.held_out[:1]):
        example = prompt.example
        rendered, _ = source.form.render_answered(example.messages or example.prompt, "")
        if not source.form.encode_many([rendered])[0]:
            raise ConfigError(
                f"its tokenizer makes nothing of the prompt {example.prompt[:80]!r}: use a reward "
                "model for such texts"
            )


def build_scorer(config: Config, inputs: Inputs) -> Scorer:
    """Builds the reward models on the layout of the run; returns what scores its responses. Collective."""
    # Imported here: the checks above come before any model is built.
    from megatron_rpp.checkpoint.weights import load_weights
    from megatron_rpp.model.build import build_model
    from megatron_rpp.model.frozen_model import FrozenModel
    from megatron_rpp.model.hf_weights import load_hf
    from megatron_rpp.model.scalar_model import ScalarModel
    from megatron_rpp.stages.model_reward import RewardModel
    from megatron_rpp.stages.reward import Scorer

    models = []
    for source in inputs.reward_models:
        stage = build_model(
            source.model, config.parallel, vocab_size=source.vocab_size, seed=None, kind=ScalarModel
        )
        load = load_hf if (source.directory / CONFIG).is_file() else load_weights
        load(stage, source.directory)
        frozen = FrozenModel(stage, offload=config.reward.model_placement == "offload")
        models.append(RewardModel(source.name, frozen, source.form, source.max_length))
    return Scorer(
        inputs.rewards, inputs.response_form, models, config.train.max_tokens_per_microbatch
    )
