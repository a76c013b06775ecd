"""The sections that say how it is learned: rollout, reward, algorithm, reference, evaluation.

Part of config.py, which names every section and describes the rules; import from there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_rpp.config.validation import check_characters, check_choices, check_range
from megatron_rpp.lifecycle.config_error import ConfigError

LOWEST_TEMPERATURE = 1e-3
"""Logits are divided by the temperature in fp32, whose spacing at 100 / 0.001 is 2^-7: rounding moves
a log-prob, and with it the ratio of two policies, by up to 1%, far inside the clip range of 20%. At
a tenth of it rounding alone would leave that range; at 1e-36 logits of 1,000 overflow."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Sampling of the responses of one step."""

    prompts_per_step: int = 32
    """Prompts per step over all data-parallel replicas; each replica takes whole prompts."""
    samples_per_prompt: int = 8
    """Responses per prompt."""
    max_new_tokens: int = 64
    """Longest response in tokens, end-of-text included."""
    min_new_tokens: int = 0
    """End-of-text is not sampled before this many tokens."""
    temperature: float = 1.0
    """Divides the logits before sampling; at least 0.001. Evaluations are greedy."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this probability; 1 = all."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0 = all."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a response; one that is a special token of the tokenizer is that token."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Tokens that end a response, beside the end-of-sequence tokens of tokenizer and model."""
    max_batch: int = 256
    """Sequences decoded at once per data-parallel replica."""

    @property
    def samples_per_step(self) -> int:
        """Responses of a step over all replicas."""
        return self.prompts_per_step * self.samples_per_prompt

    def __post_init__(self) -> None:
        counts = "prompts_per_step samples_per_prompt max_new_tokens max_batch"
        check_range("rollout", self, counts, at_least=1)
        check_range("rollout", self, "min_new_tokens top_k", at_least=0)
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
    """Score of a response: weighted sum, then normalise, scale, clip, in this order."""

    functions: list[str] = field(default_factory=lambda: ["exact_match"])
    """Reward functions: exact_match, math_verify, regex, length, reasoning_gym,
    path/to/file.py:function, package.module:function, or the URL of a reward model."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of functions, by name: regex {pattern, equals_label}, length {max_tokens,
    buffer_tokens}, a URL {shape, batch, concurrency, timeout, retries, token_variable}."""
    workers: int = 4
    """Processes per replica for math_verify, regex and functions of yours, which see one sample at
    a time; 0 = in the training process, on the whole batch and without time limit."""
    timeout: float = 10.0
    """Seconds for one sample in a worker process."""
    timeout_score: float = 0.0
    """Score of a sample whose function takes longer, or kills its process."""
    weights: list[float] = field(default_factory=list)
    """Weight of each function in the sum; empty = 1 each."""
    normalize: bool = False
    """Whiten the scores over the global batch."""
    scale: float = 1.0
    """Factor on the score."""
    clip: float | None = None
    """Clip the score to [-clip, clip]; null = off."""
    keep_special_tokens: bool = True
    """Special tokens of a response (<think>, <tool_call>) are part of the text that rewards and logs
    see; begin-of-sequence, padding and the token that ends the response never are. false = all
    special tokens are left out, as most other trainers do."""

    def __post_init__(self) -> None:
        check_range("reward", self, "scale clip timeout", above=0)
        check_range("reward", self, "workers", at_least=0)
        check_range("reward", self, "timeout_score", at_least=-1e6, at_most=1e6)
        for name, options in self.options.items():
            if not isinstance(options, dict):
                raise ConfigError(
                    f"reward.options.{name} must be a mapping {{option: value}}, got {options!r}"
                )
        if not self.functions:
            raise ConfigError("reward.functions must name at least one function, got []")
        if self.weights and len(self.weights) != len(self.functions):
            raise ConfigError(
                f"reward.weights must be empty or as long as reward.functions "
                f"({len(self.functions)}), got {self.weights}"
            )


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """REINFORCE++ (arXiv 2501.03262), and two other estimators to compare it with."""

    name: Literal["reinforce++", "reinforce++_baseline", "grpo", "rloo"] = "reinforce++"
    """Advantage estimator: reinforce++ = returns with the KL in the reward, normalised over the
    global batch; reinforce++_baseline = reward minus the mean of its prompt's samples, normalised
    over the global batch; grpo = the same divided by the samples' standard deviation instead; rloo
    = reward minus the mean of the prompt's other samples, not normalised. In the last three the KL
    is a term of the loss (kl_loss_coef)."""
    kl_coef: float = 0.01
    """beta, weight of the KL penalty in the token rewards of reinforce++; 0 = off."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of that penalty, and of the KL that the adaptive controller measures."""
    gamma: float = 1.0
    """Discount per token of the return."""
    clip_low: float = 0.2
    """The probability ratio is clipped from below at 1 - clip_low."""
    clip_high: float = 0.2
    """The probability ratio is clipped from above at 1 + clip_high."""
    dual_clip: float | None = None
    """Bound of the ratio where the advantage is negative, above 1; null = off."""
    kl_loss_coef: float = 0.0
    """lambda, weight of the k2 loss term of the current policy; 0 = off."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """adaptive = after every step kl_coef and kl_loss_coef are multiplied so as to lead the KL to
    kl_target (arXiv 1909.08593)."""
    kl_target: float = 0.1
    """KL that the adaptive controller leads to, in nats a token as the log's kl/* are."""
    kl_horizon: int = 10000
    """Responses over which the adaptive controller answers an error; at least those of a step."""
    old_logprobs: Literal["recompute", "rollout"] = "recompute"
    """Log-probs of the policy before its update: recompute = by a pass over the samples; rollout =
    the rollout engine's, which saves that pass and takes the engine's rounding for the policy's."""
    rollout_correction: Literal["none", "cap", "mask"] = "none"
    """Importance weights of tokens that the rollout engine saw with another probability: cap =
    min(w, C); mask = w within [1/C, C], else 0; C = rollout_correction_max."""
    rollout_correction_max: float = 2.0
    """C, bound of these weights, at least 1."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; 0 = off."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Mean of the loss over a mini-batch: over its tokens, or over the means of its sequences."""

    def __post_init__(self) -> None:
        check_choices("algorithm", self)
        check_range("algorithm", self, "kl_coef kl_loss_coef entropy_coef clip_high", at_least=0)
        check_range("algorithm", self, "gamma clip_low", at_least=0, at_most=1)
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
                "algorithm.kl_loss_coef, or for reinforce++ algorithm.kl_coef"
            )

    @property
    def kl_summary(self) -> str:
        """What becomes of the KL, for the start-up log."""
        terms = [f"{self.kl_coef} × {self.kl_estimator} in the reward"] * self.kl_in_reward
        terms += [f"{self.kl_loss_coef} × k2 in the loss"] * (self.kl_loss_coef > 0)
        if not terms:
            return "no KL"
        target = f", towards {self.kl_target} nats a token" * (self.kl_controller == "adaptive")
        return f"KL: {' and '.join(terms)}, {self.kl_controller}{target}"

    @property
    def kl_in_reward(self) -> bool:
        """Whether the token rewards hold a KL penalty."""
        return self.name == "reinforce++" and self.kl_coef > 0


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The frozen model that the KL terms compare with."""

    placement: Literal["resident", "offload"] = "resident"
    """resident = a second model beside the policy; offload = a host copy of the weights, swapped
    in for scoring."""

    def __post_init__(self) -> None:
        check_choices("reference", self)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Accuracy on held-out prompts."""

    interval: int = 10
    """Steps between evaluations; 0 = only before the first and after the last step."""
    prompts: int = 256
    """Held-out prompts per evaluation; 0 = all."""
    samples: int = 4
    """Answers shown in the log per evaluation."""

    def __post_init__(self) -> None:
        check_range("evaluation", self, "interval prompts samples", at_least=0)
