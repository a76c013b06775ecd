"""Sections about how the policy learns: rollout, reward, algorithm, reference, evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_rpp.config.validation import check_characters, check_choices, check_range
from megatron_rpp.config.vllm import VllmConfig
from megatron_rpp.lifecycle.config_error import ConfigError

_MODEL = "model:"
LOWEST_TEMPERATURE = 1e-3
"""Logits are divided by the temperature in fp32. At 100 / 0.001 the spacing of fp32 is 2^-7, so
rounding changes a log-prob, and with it the ratio of two policies, by up to 1%: well within the
clip range of 20%. At a tenth of this temperature, rounding alone would exceed that range; at 1e-36,
logits of 1,000 overflow."""


def model_directory(name: str) -> Path | None:
    """The directory of a reward function that is a model on Megatron, "model:DIR"; None if it is
    another function."""
    return Path(name.removeprefix(_MODEL)).absolute() if name.startswith(_MODEL) else None


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Sampling of the responses of one step."""

    prompts_per_step: int = 32
    """Prompts per step, over all data-parallel replicas. All samples of a prompt stay on one
    replica."""
    samples_per_prompt: int = 8
    """Responses sampled for each prompt."""
    max_new_tokens: int = 64
    """Longest response in tokens, including end-of-sequence."""
    min_new_tokens: int = 0
    """Shortest response in tokens: end-of-sequence is not sampled earlier."""
    temperature: float = 1.0
    """Sampling temperature, at least 0.001: logits are divided by it. Evaluations are always
    greedy."""
    top_p: float = 1.0
    """Sample from the smallest set of likeliest tokens with at least this total probability; 1 =
    all tokens."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0 = all tokens."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a response. A text that is a special token of the tokenizer stands for that
    token."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Token ids that end a response, in addition to the end-of-sequence tokens of tokenizer and
    model."""
    max_batch: int = 256
    """Largest number of sequences that a data-parallel replica decodes at once; with engine vllm,
    each server."""
    max_cache_tokens: int | None = None
    """Largest number of tokens whose keys and values are held for them, at least model.max_length. If they do not suffice for max_batch sequences, fewer are decoded at
    once. null = what a rank's memory leaves beside the model, by estimate."""
    engine: Literal["megatron", "vllm"] = "megatron"
    """What samples the responses and answers the evaluations of train. megatron = the training
    processes themselves, on the layout of the policy; vllm = vLLM servers, which get the new weights
    after every update."""
    ahead: int = 0
    """1 = engine vllm samples the responses of a step while the step before it is scored and updates
    the policy: with the weights before that update. 0 = with the weights of the step itself."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """vLLM servers, which rollout.engine vllm uses."""

    @property
    def samples_per_step(self) -> int:
        """Responses per step, over all replicas."""
        return self.prompts_per_step * self.samples_per_prompt

    def __post_init__(self) -> None:
        counts = "prompts_per_step samples_per_prompt max_new_tokens max_batch"
        check_choices("rollout", self)
        check_range("rollout", self, counts, at_least=1)
        check_range("rollout", self, "max_cache_tokens", at_least=1)
        check_range("rollout", self, "min_new_tokens top_k", at_least=0)
        check_range("rollout", self, "ahead", at_least=0, at_most=1)
        check_range("rollout", self, "temperature", above=0)
        check_range("rollout", self, "temperature", at_least=LOWEST_TEMPERATURE)
        check_range("rollout", self, "top_p", above=0, at_most=1)
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"rollout.min_new_tokens must be at most rollout.max_new_tokens = "
                f"{self.max_new_tokens}, got {self.min_new_tokens}"
            )
        check_characters("rollout.stop", *self.stop)
        if "" in self.stop:
            raise ConfigError(
                f"rollout.stop must hold no empty text, got {self.stop}: it would end every "
                "response at its start; remove it"
            )


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Score of a response: the weighted sum of reward functions, then normalised, scaled and
    clipped."""

    functions: list[str] = field(default_factory=lambda: ["exact_match"])
    """Reward functions. Each is exact_match, math_verify, regex, length, reasoning_gym,
    path/to/file.py:function, package.module:function, the URL of a reward model, or model:DIR: a
    reward model in DIR, a Megatron checkpoint or a Hugging Face classifier with one label, on the
    layout of the run."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the functions, by function name: regex {pattern, equals_label}, length
    {max_tokens, buffer_tokens}, URLs {shape, batch, concurrency, timeout, retries,
    token_variable}, model:DIR {max_length}."""
    model_placement: Literal["resident", "offload"] = "resident"
    """Where the weights of reward models lie between two uses: resident = on the device; offload = in
    host memory."""
    workers: int = 4
    """Worker processes per replica that run math_verify, regex, reasoning_gym and your own
    functions, one sample at a time; 0 = run them in the training process, on the whole batch and
    without a time limit."""
    timeout: float = 10.0
    """Time limit in seconds for one sample in a worker process."""
    timeout_score: float = 0.0
    """Score of a sample if the function exceeds the time limit or its worker process dies."""
    weights: list[float] = field(default_factory=list)
    """Weight of each function in the sum; empty = 1 for each."""
    normalize: bool = False
    """Whiten the scores over the global batch: subtract the mean, divide by the standard
    deviation."""
    scale: float = 1.0
    """Factor that multiplies the score."""
    clip: float | None = None
    """Clip the score to [-clip, clip]; null = no clipping."""
    keep_special_tokens: bool = True
    """Keep special tokens of a response, such as <think> or <tool_call>, in the text that rewards
    and logs see. Begin-of-sequence, padding and the token that ends the response are never part of
    it. false = leave out all special tokens, as most other trainers do."""

    def __post_init__(self) -> None:
        check_choices("reward", self)
        check_range("reward", self, "scale clip timeout", above=0)
        check_range("reward", self, "workers", at_least=0)
        check_range("reward", self, "timeout_score", at_least=-1e6, at_most=1e6)
        for name, options in self.options.items():
            if not isinstance(options, dict):
                raise ConfigError(
                    f"reward.options.{name} must be a mapping {{option: value}}, got {options!r}"
                )
        if self.model_placement != "resident" and not self.model_names:
            raise ConfigError(
                f"reward.model_placement is {self.model_placement}, but reward.functions "
                f"{self.functions} has no model:DIR: leave it out"
            )
        if not self.functions:
            raise ConfigError("reward.functions must name at least one function, got []")
        if self.weights and len(self.weights) != len(self.functions):
            raise ConfigError(
                f"reward.weights must be empty or as long as reward.functions "
                f"({len(self.functions)}), got {self.weights}"
            )

    @property
    def model_names(self) -> list[str]:
        """The functions that are reward models on Megatron."""
        return [name for name in self.functions if model_directory(name) is not None]


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """Advantages, KL terms and loss of REINFORCE++ (arXiv 2501.03262), PPO, GRPO and RLOO."""

    name: Literal["reinforce++", "ppo", "reinforce++_baseline", "grpo", "rloo"] = "reinforce++"
    """Advantage estimator. reinforce++: returns with a KL penalty in the reward, normalised over
    the global batch. ppo: generalised advantage estimates of a critic (section critic) with the same
    penalty and normalisation. reinforce++_baseline: reward minus the mean over the samples of its
    prompt, normalised over the global batch. grpo: reward minus that mean, divided by the standard
    deviation of the samples of the prompt. rloo: reward minus the mean of the other samples of the
    prompt, not normalised. In the last three, the KL is a term of the loss (kl_loss_coef)."""
    kl_coef: float = 0.01
    """Weight beta of the KL penalty in the token rewards of reinforce++ and ppo; 0 = no penalty."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """KL estimator of that penalty and of the adaptive controller."""
    gamma: float = 1.0
    """Discount of the return per token."""
    gae_lambda: float = 1.0
    """Lambda of ppo's advantage estimates (arXiv 1506.02438): 1 = the return minus the value, 0 = the
    error of one step."""
    clip_low: float = 0.2
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The probability ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = None
    """Upper bound of the ratio for tokens with a negative advantage, above 1; null = no dual
    clip."""
    kl_loss_coef: float = 0.0
    """Weight lambda of the k2 KL term in the loss; 0 = no term."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """fixed = the KL coefficients are constant; adaptive = after every step, kl_coef and
    kl_loss_coef are multiplied by a factor that moves the KL towards kl_target (arXiv
    1909.08593)."""
    kl_target: float = 0.1
    """Target of the adaptive controller, in nats per token like the metrics kl/*."""
    kl_horizon: int = 10000
    """Number of responses over which the adaptive controller corrects an error; at least the
    responses of one step."""
    old_logprobs: Literal["recompute", "rollout"] = "recompute"
    """Log-probs of the policy before its update. recompute = by a forward pass over the samples;
    rollout = those of the rollout engine, which saves that pass but ignores that the engine rounds
    differently."""
    rollout_correction: Literal["none", "cap", "mask"] = "none"
    """Importance weights w that correct for the difference between policy and rollout engine, per
    token, with C = rollout_correction_max. cap = min(w, C); mask = w if it lies in [1/C, C], else
    0; none = no weights."""
    rollout_correction_max: float = 2.0
    """Bound C of these weights, at least 1."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; 0 = no bonus."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """How the loss of a mini-batch is averaged: over all its tokens, or over the means of its
    sequences."""

    def __post_init__(self) -> None:
        check_choices("algorithm", self)
        check_range("algorithm", self, "kl_coef kl_loss_coef entropy_coef clip_high", at_least=0)
        check_range("algorithm", self, "gamma gae_lambda clip_low", at_least=0, at_most=1)
        check_range("algorithm", self, "dual_clip", above=1)
        check_range("algorithm", self, "kl_target", above=0)
        check_range("algorithm", self, "kl_horizon rollout_correction_max", at_least=1)
        if self.rollout_correction != "none" and self.old_logprobs == "rollout":
            raise ConfigError(
                "algorithm.rollout_correction compares the rollout's log-probs with the policy's: "
                "set algorithm.old_logprobs to recompute"
            )
        if self.kl_controller == "adaptive" and not self.kl_in_reward and not self.kl_loss_coef:
            raise ConfigError(
                "algorithm.kl_controller adaptive needs a KL to control, got none: set "
                "algorithm.kl_loss_coef, or for reinforce++ and ppo algorithm.kl_coef"
            )

    @property
    def kl_summary(self) -> str:
        """How the KL is used, in words, for the start-up log."""
        terms = [f"{self.kl_coef} × {self.kl_estimator} in the reward"] * self.kl_in_reward
        terms += [f"{self.kl_loss_coef} × k2 in the loss"] * (self.kl_loss_coef > 0)
        if not terms:
            return "no KL"
        target = f", towards {self.kl_target} nats per token" * (self.kl_controller == "adaptive")
        return f"KL: {' and '.join(terms)}, {self.kl_controller}{target}"

    @property
    def kl_in_reward(self) -> bool:
        """Whether the token rewards contain a KL penalty."""
        return self.name in ("reinforce++", "ppo") and self.kl_coef > 0

    @property
    def has_critic(self) -> bool:
        """Whether a critic is trained beside the policy."""
        return self.name == "ppo"


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The frozen model against which the KL terms are measured."""

    placement: Literal["resident", "offload"] = "resident"
    """Where the reference lives. resident = a second model next to the policy; offload = a copy of
    the weights in host memory, swapped into the policy to compute log-probs."""

    def __post_init__(self) -> None:
        check_choices("reference", self)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Accuracy on held-out prompts."""

    interval: int = 10
    """Steps between evaluations; 0 = evaluate only before the first and after the last step."""
    prompts: int = 256
    """Number of held-out prompts per evaluation; 0 = all."""
    samples: int = 4
    """Number of answers that the log shows per evaluation."""

    def __post_init__(self) -> None:
        check_range("evaluation", self, "interval prompts samples", at_least=0)
