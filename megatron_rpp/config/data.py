"""Sections about what is learned: the prompts, their tokenizer, and the task they come from."""

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
    """Training prompts: a JSONL, .parquet or .csv file; a directory of such files or one saved by
    the datasets library, with @split if needed; hub:owner/name[:configuration][@split]; or a list
    of these."""
    weights: list[float] = field(default_factory=list)
    """Share of the training prompts that each source provides; empty = in proportion to its
    rows."""
    eval: str = ""
    """Held-out prompts for evaluation: one source, written as in train."""
    eval_split: float = 0.0
    """Rows of train to hold out if eval is empty, drawn at random from the seed. A value below 1 is
    a share of the rows, a value of 1 or more is a number of rows; 0 = none."""
    max_prompt_tokens: int | None = None
    """Longest allowed prompt in tokens; null = model.max_length - rollout.max_new_tokens, which is
    also the upper limit."""
    overlong_prompts: Literal["refuse", "drop"] = "refuse"
    """What to do with longer prompts: refuse = stop with an error, drop = leave them out. In sft
    this also applies to rows whose prompt and label together exceed model.max_length."""
    cache_dir: str | None = None
    """Directory that caches what was found in the data files, so that later runs start faster; null
    = megatron_rpp in the Hugging Face cache."""
    tokenizer: str = ""
    """SentencePiece .model file or directory of a Hugging Face tokenizer; empty = the tokenizer
    that comes with the weights in model.hf_path or model.init_path."""
    trust_remote_code: bool = False
    """Run Python code from the directory of the tokenizer, if it contains any."""
    chat_template: str | None = None
    """File with a chat template (Jinja); null = the template of the tokenizer."""
    apply_chat_template: bool = False
    """Turn a prompt that is plain text into one user message and apply the chat template. Lists of
    messages always go through the template."""
    system_prompt: str = ""
    """System message to put in front of conversations that have none; empty = none."""
    prompt_key: str = "prompt"
    """Field of a row that holds the prompt, a text or a list of messages {role, content}. A path
    such as a.b reaches into nested objects."""
    label_key: str = "label"
    """Field of a row that holds the label, which is passed to the reward functions. May be a path
    such as a.b."""

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
        """The sources of training prompts as a list, even if there is only one."""
        return [self.train] if isinstance(self.train, str) else self.train


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A procedural reasoning-gym task that prompts are generated from."""

    name: str = "chain_sum"
    """Name of the reasoning-gym task."""
    params: dict[str, Any] = field(default_factory=dict)
    """Parameters of the task, as reasoning-gym names them. On the command line:
    --task.params.NAME VALUE."""
    train_size: int = 20000
    """Number of training prompts to generate."""
    eval_size: int = 256
    """Number of held-out prompts to generate."""
    train_seed: int = 1
    """Seed of the training prompts."""
    eval_seed: int = 2
    """Seed of the held-out prompts. It must differ from train_seed."""
    vocab_size: int = 64
    """Number of pieces of the SentencePiece tokenizer that is trained on the task."""

    def __post_init__(self) -> None:
        check_filled("task", self, "name")
        check_range("task", self, "train_size eval_size vocab_size", at_least=1)
        check_range("task", self, "train_seed eval_seed", at_least=0)
        if self.train_seed == self.eval_seed:
            raise ConfigError(
                f"task.eval_seed must differ from task.train_seed, got {self.eval_seed} for both: "
                "the held-out prompts would be training prompts"
            )
