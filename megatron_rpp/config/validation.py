"""The checks that the sections run when they are created, and those across sections.

Every failure is a ConfigError with one message: ``section.field``, what it must be, what it is, and
the remedy if the range does not imply it. The command line (cli.py) checks types.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Literal, get_args, get_origin, get_type_hints

from megatron_rpp.lifecycle.config_error import ConfigError

if TYPE_CHECKING:
    from megatron_rpp.config import Config, ModelConfig, OptimizerConfig, ParallelConfig

_BOUNDS = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


def check_range(section: str, config: object, names: str, **bounds: float) -> None:
    """Checks that each number of ``names`` (separated by blanks) is finite and within ``bounds``.

    ``bounds``: at_least, above, at_most, below. None means that a setting is off, and passes.
    """
    must = " and ".join(f"{word.replace('_', ' ')} {bound}" for word, bound in bounds.items())
    for name in names.split():
        value = getattr(config, name)
        if value is None:
            continue
        within = all(_BOUNDS[word](value, bound) for word, bound in bounds.items())
        if not within or not math.isfinite(value):
            finite = "" if math.isfinite(value) else "finite and "
            raise ConfigError(f"{section}.{name} must be {finite}{must}, got {value}")


def check_choices(section: str, config: object) -> None:
    """Checks that every field annotated with a Literal holds one of its values."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            choices = ", ".join(get_args(hint))
            raise ConfigError(f"{section}.{name} must be one of {choices}, got {value!r}")


def check_filled(section: str, config: object, names: str) -> None:
    """Checks that no text of ``names`` (separated by blanks) is empty."""
    for name in names.split():
        if not getattr(config, name):
            raise ConfigError(f"{section}.{name} must not be empty, got {getattr(config, name)!r}")


def check_characters(setting: str, *texts: str) -> None:
    """Checks that every text can be encoded.

    Half of a surrogate pair cannot; a command line that is not in UTF-8 contains such halves.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{setting} holds {ascii(error.object[error.start])}, which is not a character: "
                "write the text in UTF-8"
            ) from error


def check_divides(
    whole: str, count: int, part: str, *, divisor: int, remedy: str = "change one of them"
) -> None:
    """Checks that ``count`` (setting ``whole``) is a multiple of ``divisor`` (setting ``part``)."""
    if count % divisor:
        raise ConfigError(f"{whole} must be divisible by {part} = {divisor}, got {count}: {remedy}")


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Checks that every rank gets the same number of heads, feed-forward channels and layers."""
    tensor = parallel.tensor
    check_divides("model.heads", model.heads, "parallel.tensor", divisor=tensor)
    if model.kv_heads is not None:
        check_divides("model.kv_heads", model.kv_heads, "parallel.tensor", divisor=tensor)
    check_divides("model.ffn_hidden", model.ffn_hidden, "parallel.tensor", divisor=tensor)
    parts = parallel.pipeline * parallel.virtual_pipeline
    setting = "parallel.pipeline" + " x parallel.virtual_pipeline" * (parts > parallel.pipeline)
    check_divides("model.layers", model.layers, setting, divisor=parts)


def _optimizers(config: Config) -> list[tuple[str, OptimizerConfig]]:
    """Each section of an optimizer, with the part of its name before "optimizer"."""
    return [
        ("", config.optimizer),
        ("critic.", config.critic.optimizer),
        ("sft.", config.sft.optimizer),
        ("reward_model.", config.reward_model.optimizer),
    ]


def check_offload(config: Config) -> None:
    """Checks that the optimizer that is offloaded has fp32 weights of its own."""
    for section, optimizer in _optimizers(config):
        if optimizer.offload and config.model.dtype != "bf16":
            raise ConfigError(
                f"{section}optimizer.offload needs model.dtype bf16, got {config.model.dtype}: with "
                "fp32 the weights themselves are the optimizer's"
            )


def check_overlap(config: Config) -> None:
    """Checks that there are shards of weights, if their gather is to overlap."""
    for section, optimizer in _optimizers(config):
        if config.parallel.overlap_param_gather and not optimizer.distributed:
            raise ConfigError(
                f"parallel.overlap_param_gather needs {section}optimizer.distributed, got false: "
                "without it every rank updates all weights; leave one of them out"
            )


def check_recompute(config: Config) -> None:
    """Checks that the layers to recompute fit into a model chunk, as Megatron needs it."""
    train, parallel = config.train, config.parallel
    parts = parallel.pipeline * parallel.virtual_pipeline
    layers = config.model.layers // parts
    if train.recompute != "full":
        return
    if train.recompute_method == "uniform":
        check_divides(
            f"the layers of a model chunk ({config.model.layers} / {parts})",
            layers,
            "train.recompute_layers",
            divisor=train.recompute_layers,
            remedy="change train.recompute_layers or the layout",
        )
    check_range("train", train, "recompute_layers", at_most=layers)


def check_rollout(config: Config) -> None:
    """Checks that the responses of a step suit the context, the mini-batches and the algorithm."""
    rollout, max_length = config.rollout, config.model.max_length
    if rollout.max_new_tokens >= max_length:
        raise ConfigError(
            f"rollout.max_new_tokens must be below model.max_length = {max_length}, which holds "
            f"the prompt too, got {rollout.max_new_tokens}"
        )
    if rollout.max_cache_tokens is not None and rollout.max_cache_tokens < max_length:
        raise ConfigError(
            f"rollout.max_cache_tokens must hold one sequence of model.max_length = {max_length} "
            f"tokens, got {rollout.max_cache_tokens}: raise it"
        )
    samples = rollout.samples_per_step
    check_divides(
        "rollout.prompts_per_step x rollout.samples_per_prompt",
        samples,
        "train.minibatches",
        divisor=config.train.minibatches,
    )
    horizon = config.algorithm.kl_horizon
    if config.algorithm.kl_controller == "adaptive" and horizon < samples:
        raise ConfigError(
            f"algorithm.kl_horizon must be at least the {samples} responses of a step, got "
            f"{horizon}"
        )
    name = config.algorithm.name
    if name not in ("reinforce++", "ppo") and rollout.samples_per_prompt < 2:
        raise ConfigError(
            f"rollout.samples_per_prompt must be at least 2 for algorithm.name = {name}, got "
            f"{rollout.samples_per_prompt}: it compares the samples of a prompt with each other"
        )
