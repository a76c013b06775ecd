"""The sections that say what is learned: prompts with their tokenizer, and the task they come from.

Part of config.py, which names every section and describes the rules; import from there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_rpp.config.validation import (
    check_characters,
    check_choices,
    check_filled,
    check_range,
)
from megatron_rpp.lifecycle.config_error import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts and tokenizer."""

    train: list[str] | str = ""
    """Training prompts: a JSONL, .parquet or .csv file, a directory of the datasets library (with
    @split), hub:owner/name[:configuration][@split], or a list of them."""
    weights: list[float] = field(default_factory=list)
    """Share of each of several training sources; empty = by their numbers of rows."""
    eval: str = ""
    """Held-out prompts, a source like those of train."""
    eval_split: float = 0.0
    """Where eval is empty: rows of train to hold out, drawn from the seed: a share below 1, a
    number from 1 on; 0 = none."""
    max_prompt_tokens: int | None = None
    """Longest prompt in tokens; null = model.max_length - rollout.max_new_tokens, the most it can
    be."""
    overlong_prompts: Literal["refuse", "drop"] = "refuse"
    """What happens to longer prompts; in sft also to rows that exceed model.max_length with their
    label."""
    cache_dir: str | None = None
    """Directory of what is known of the data files between runs; null = megatron_rpp in Hugging
    Face's cache."""
    tokenizer: str = ""
    """SentencePiece .model file, or directory of a Hugging Face tokenizer; empty = the one that came
    with the weights of model.hf_path or model.init_path."""
    trust_remote_code: bool = False
    """Run the Python code that a tokenizer's directory brings along."""
    chat_template: str | None = None
    """File of a chat template (Jinja); null = the tokenizer's own."""
    apply_chat_template: bool = False
    """Ask prompts that are texts as one user message; lists of messages always go through the
    template."""
    system_prompt: str = ""
    """System message in front of conversations that have none; empty = none."""
    prompt_key: str = "prompt"
    """Field of the prompt, a text or a list of messages {role, content}; may be a path a.b."""
    label_key: str = "label"
    """Field of the label handed to the reward; may be a path a.b."""

    def __post_init__(self) -> None:
        check_choices("data", self)
        check_filled("data", self, "prompt_key label_key")
        check_characters("data.system_prompt", self.system_prompt)
        check_range("data", self, "eval_split", at_least=0)
        check_range("data", self, "max_prompt_tokens", at_least=1)
        if self.eval_split > 1 and self.eval_split % 1:
            raise ConfigError(
                f"data.eval_split must be a share below 1 or a whole number of rows, got "
                f"{self.eval_split}"
            )
        if self.weights and (
            len(self.weights) != len(self.sources) or not all(w > 0 for w in self.weights)
        ):
            raise ConfigError(
                f"data.weights must be empty or one number above 0 for each source of data.train "
                f"({len(self.sources)}), got {self.weights}"
            )

    @property
    def sources(self) -> list[str]:
        """The sources of training prompts, a single one too."""
        return [self.train] if isinstance(self.train, str) else self.train


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A procedural reasoning-gym task that prompts are generated from."""

    name: str = "chain_sum"
    """Name of the reasoning-gym task."""
    params: dict[str, Any] = field(default_factory=dict)
    """Parameters of the task, by reasoning-gym's names; one of them: --task.params.NAME VALUE."""
    train_size: int = 20000
    """Training prompts."""
    eval_size: int = 256
    """Held-out prompts."""
    train_seed: int = 1
    """Seed of the training prompts."""
    eval_seed: int = 2
    """Seed of the held-out prompts, another than train_seed."""
    vocab_size: int = 64
    """Pieces of the SentencePiece tokenizer trained on the task."""

    def __post_init__(self) -> None:
        check_filled("task", self, "name")
        check_range("task", self, "train_size eval_size vocab_size", at_least=1)
        check_range("task", self, "train_seed eval_seed", at_least=0)
        if self.train_seed == self.eval_seed:
            raise ConfigError(
                f"task.eval_seed must differ from task.train_seed, got {self.eval_seed} for both: "
                "the held-out prompts would be training prompts"
            )
