"""The sections that say how a run goes: layout, optimizer, loop, checkpoints, logging, warm start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_rpp.config.validation import check_choices, check_filled, check_range
from megatron_rpp.lifecycle.config_error import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one model is cut; data-parallel size = world size / (tensor x pipeline x context)."""

    tensor: int = 1
    """Tensor-parallel size: ranks that share each layer."""
    pipeline: int = 1
    """Pipeline-parallel size: stages the layers are cut into."""
    virtual_pipeline: int = 1
    """Parts of the model that each pipeline stage holds, interleaved (1 = one part, no interleaving):
    smaller bubbles, more messages."""
    context: int = 1
    """Context-parallel size: ranks that share the tokens of each sequence."""
    sequence_parallel: bool = False
    """Split the activations between the tensor-parallel regions along the sequence."""

    def __post_init__(self) -> None:
        check_range("parallel", self, "tensor pipeline virtual_pipeline context", at_least=1)
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ConfigError(
                f"parallel.virtual_pipeline needs parallel.pipeline of at least 2, got "
                f"{self.virtual_pipeline} parts on one stage: raise parallel.pipeline, or leave it out"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ConfigError(
                "parallel.sequence_parallel needs parallel.tensor of at least 2, got 1: it splits "
                "the sequence over the tensor-parallel ranks; turn it off or raise parallel.tensor"
            )

    def sizes(self) -> dict[str, int]:
        """The sizes of the process groups, as `parallel.groups.start` takes them."""
        return {
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "context": self.context,
            "virtual_pipeline": self.virtual_pipeline,
        }


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule; a step is one optimizer step."""

    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay_steps: int | None = None
    """Step at which min_lr is reached, the warm-up included; null = constant after the warm-up."""
    decay_style: Literal["linear", "cosine"] = "cosine"
    """Shape of the decay."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    beta1: float = 0.9
    """Adam's decay of the first moment."""
    beta2: float = 0.95
    """Adam's decay of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    distributed: bool = True
    """Shard Adam's state over the data-parallel ranks."""

    def __post_init__(self) -> None:
        check_choices("optimizer", self)
        check_range("optimizer", self, "lr eps", above=0)
        check_range("optimizer", self, "min_lr warmup_steps weight_decay clip_grad", at_least=0)
        check_range("optimizer", self, "beta1 beta2", at_least=0, below=1)
        if self.min_lr > self.lr:
            raise ConfigError(
                f"optimizer.min_lr must be at most optimizer.lr = {self.lr}, got {self.min_lr}"
            )
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ConfigError(
                f"optimizer.decay_steps must be above optimizer.warmup_steps = "
                f"{self.warmup_steps}, which it includes, got {self.decay_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    steps: int = 100
    """Steps of rollout and update."""
    minibatches: int = 1
    """Mini-batches, each one optimizer step, that a rollout batch is cut into."""
    epochs: int = 1
    """Passes over each rollout batch."""
    max_tokens_per_microbatch: int = 8192
    """Token budget of one forward and backward pass per data-parallel replica."""
    max_skipped_updates: int = 10
    """The run stops when this many updates in a row were skipped because a loss or a gradient was
    NaN or infinite."""
    stop_accuracy: float | None = None
    """Stop when the held-out accuracy reaches this share; null = never."""
    exit_duration_minutes: float | None = None
    """Save and end with exit code 75 at the first safe point this long after the start, for a job
    with a time limit; null = never."""
    hang_timeout_minutes: float | None = 20.0
    """End the run with exit code 70, naming the missing rank, when a rank has gone this long
    without a sign of life (a new stage, mini-batch, part of a save, generated token, or response
    scored by a worker); null = never."""

    def __post_init__(self) -> None:
        check_range("train", self, "exit_duration_minutes", at_least=0)
        check_range("train", self, "hang_timeout_minutes", above=0)
        counts = "steps minibatches epochs max_tokens_per_microbatch max_skipped_updates"
        check_range("train", self, counts, at_least=1)
        check_range("train", self, "stop_accuracy", above=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and exact resume."""

    dir: str = "runs/default/checkpoints"
    """Directory that checkpoints are written to."""
    load: str | None = None
    """Directory (or checkpoint) to start from where dir holds no checkpoint yet; so a run that is
    submitted again with the same command goes on from its own newest one. null = start anew."""
    interval: int = 0
    """Steps between checkpoints; 0 = only at the end."""
    async_save: bool = False
    """Write checkpoints in a process of their own while the run goes on; the last one waits."""
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted."""
    keep_best: bool = False
    """Keep the checkpoint of the highest held-out accuracy too (of those saved after an evaluation)
    and name it in best_checkpointed_iteration.txt."""
    export_hf: str | None = None
    """Directory that the final policy is written to as a Hugging Face model; null = none."""
    save_rollouts: bool = False
    """Keep finished rollouts and their scores on disk until a checkpoint has their step behind it,
    so that a kill does not cost the time to generate them again."""

    def __post_init__(self) -> None:
        check_filled("checkpoint", self, "dir")
        check_range("checkpoint", self, "interval", at_least=0)
        check_range("checkpoint", self, "keep", at_least=1)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Metrics."""

    dir: str = "runs/default/logs"
    """Directory of metrics.jsonl and of the TensorBoard events."""

    def __post_init__(self) -> None:
        check_filled("logging", self, "dir")


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised warm start (megatron_rpp.sft)."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 64
    """Samples per step over all ranks."""
    dir: str = "runs/default/sft"
    """Directory of the checkpoint and the logs of the warm start."""
    eval_interval: int = 50
    """Steps between evaluations; 0 = only after the last step."""
    checkpoint_interval: int = 0
    """Steps between checkpoints; 0 = only at the end, or where the run is told to stop."""
    stop_accuracy: float | None = None
    """Stop when the held-out accuracy reaches this share; null = never."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and schedule of the warm start, apart from those of the training."""

    def __post_init__(self) -> None:
        check_filled("sft", self, "dir")
        check_range("sft", self, "steps batch_size", at_least=1)
        check_range("sft", self, "eval_interval checkpoint_interval", at_least=0)
        check_range("sft", self, "stop_accuracy", above=0, at_most=1)
