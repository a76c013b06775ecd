"""Sections about how a run proceeds: layout, optimizer, loop, checkpoints, logs, warm start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_rpp.config.validation import check_choices, check_filled, check_range
from megatron_rpp.lifecycle.config_error import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one model is split over ranks; data-parallel size = world size / (tensor x pipeline x
    context)."""

    tensor: int = 1
    """Tensor-parallel size: number of ranks that share each layer."""
    pipeline: int = 1
    """Pipeline-parallel size: number of stages that the layers are split into."""
    virtual_pipeline: int = 1
    """Number of model chunks per pipeline stage. More chunks interleave the stages: smaller
    pipeline bubbles, but more messages; 1 = no interleaving."""
    context: int = 1
    """Context-parallel size: number of ranks that share the tokens of each sequence."""
    sequence_parallel: bool = False
    """Split activations outside the tensor-parallel regions along the sequence, to save memory."""
    overlap_grad_reduce: bool | None = None
    """Reduce the gradients of finished layers while the backward pass computes those of the others;
    null = on GPUs only."""
    overlap_param_gather: bool | None = None
    """Gather the updated weights of later layers while the next forward pass computes the earlier
    ones. Needs overlap_grad_reduce and optimizer.distributed; null = on GPUs only, where both are
    on."""

    def __post_init__(self) -> None:
        check_range("parallel", self, "tensor pipeline virtual_pipeline context", at_least=1)
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ConfigError(
                f"parallel.virtual_pipeline needs parallel.pipeline of at least 2, got "
                f"{self.virtual_pipeline} parts on one stage: raise parallel.pipeline, or leave it "
                "out"
            )
        if self.overlap_param_gather and self.overlap_grad_reduce is False:
            raise ConfigError(
                "parallel.overlap_param_gather needs parallel.overlap_grad_reduce, got false: leave "
                "that out or turn both off"
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
    """Learning rate after the decay."""
    warmup_steps: int = 0
    """Number of steps in which the learning rate rises linearly from 0 to lr."""
    decay_steps: int | None = None
    """Step at which the learning rate reaches min_lr, counted from the start of the warm-up; null =
    constant after the warm-up."""
    decay_style: Literal["linear", "cosine"] = "cosine"
    """Shape of the decay."""
    weight_decay: float = 0.0
    """Decoupled weight decay, as in AdamW."""
    beta1: float = 0.9
    """Decay rate of Adam's first moment."""
    beta2: float = 0.95
    """Decay rate of Adam's second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Gradients are scaled down to this global norm if theirs is larger; 0 = no clipping."""
    distributed: bool = True
    """Shard the optimizer state over the data-parallel ranks."""
    offload: bool = False
    """Keep Adam's state and the fp32 weights in host memory and update there, on the CPU. Saves 12
    bytes of GPU memory for each parameter that a rank owns. Needs distributed and model.dtype bf16;
    without a GPU it changes nothing."""

    def __post_init__(self) -> None:
        check_choices("optimizer", self)
        check_range("optimizer", self, "lr eps", above=0)
        check_range("optimizer", self, "min_lr warmup_steps weight_decay clip_grad", at_least=0)
        check_range("optimizer", self, "beta1 beta2", at_least=0, below=1)
        if self.offload and not self.distributed:
            raise ConfigError(
                "optimizer.offload needs optimizer.distributed, got false: set it to true"
            )
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
    """Number of training steps; each is one rollout and its updates."""
    minibatches: int = 1
    """Number of mini-batches per rollout batch; each is one optimizer step."""
    epochs: int = 1
    """Number of passes over each rollout batch."""
    max_tokens_per_microbatch: int = 8192
    """Most tokens in one forward and backward pass of a data-parallel replica."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping them: selective = those
    of the feed-forward networks; full = those of whole layers, of which only the input is kept.
    The gradients stay the same."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """With recompute full: uniform = keep the input of every group of recompute_layers layers; block
    = recompute the first recompute_layers layers of each model chunk, one by one, and keep the
    activations of the others."""
    recompute_layers: int = 1
    """With recompute full: the number of layers that recompute_method refers to."""
    max_skipped_updates: int = 10
    """Stop the run after this many skipped updates in a row. An update is skipped if any rank finds
    NaN or infinity in its loss or gradients."""
    deterministic: bool = False
    """Choose kernels and algorithms on GPUs that give the same bits in every run on the same layout
    and machines. Slower; docs/numerics.md says what holds without it. A CPU does so anyway."""
    stop_accuracy: float | None = None
    """Stop when the held-out accuracy reaches this share; null = never."""
    exit_duration_minutes: float | None = None
    """Save and exit with code 75 at the first safe point after this many minutes, for jobs with a
    time limit; a rollout or an evaluation is abandoned. null = never."""
    hang_timeout_minutes: float | None = 20.0
    """End the run with exit code 70 and name the missing rank if a rank gives no sign of life for
    this long. Signs of life are a new stage or micro-batch, a part of a save, a generated token, a
    response scored by a worker, and a tensor or file that is read at the start. A rank that waits
    for another is alive as long as the other is; null = never."""

    def __post_init__(self) -> None:
        check_range("train", self, "exit_duration_minutes", at_least=0)
        check_range("train", self, "hang_timeout_minutes", above=0)
        counts = "steps minibatches epochs max_tokens_per_microbatch max_skipped_updates"
        check_choices("train", self)
        check_range("train", self, "recompute_layers", at_least=1)
        check_range("train", self, counts, at_least=1)
        check_range("train", self, "stop_accuracy", above=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and exact resume."""

    dir: str = "runs/default/checkpoints"
    """Directory to which checkpoints are written."""
    load: str | None = None
    """Checkpoint, or directory of checkpoints, to start from if dir holds none yet. A run that is
    submitted again with the same command resumes from its own newest checkpoint in dir. null =
    start from scratch."""
    interval: int = 0
    """Steps between checkpoints; 0 = save only at the end."""
    async_save: bool = False
    """Write checkpoints in a separate process while training continues. The end of the run waits
    for the last one."""
    keep: int = 2
    """Number of newest checkpoints to keep; older ones are deleted."""
    keep_best: bool = False
    """Also keep the checkpoint with the highest held-out accuracy, of those saved after an
    evaluation. best_checkpointed_iteration.txt names it."""
    export_hf: str | None = None
    """Directory to which the final policy is written as a Hugging Face model; null = no export."""
    save_rollouts: bool = False
    """Save the rollouts of a step and their scores to disk as soon as they are finished, so that a
    killed run does not generate them again. They are deleted once a checkpoint includes their
    step."""

    def __post_init__(self) -> None:
        check_filled("checkpoint", self, "dir")
        check_range("checkpoint", self, "interval", at_least=0)
        check_range("checkpoint", self, "keep", at_least=1)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Metrics."""

    dir: str = "runs/default/logs"
    """Directory for metrics.jsonl and the TensorBoard event files."""

    def __post_init__(self) -> None:
        check_filled("logging", self, "dir")


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised warm start (megatron_rpp.sft)."""

    steps: int = 1000
    """Number of optimizer steps."""
    batch_size: int = 64
    """Samples per step, over all ranks."""
    dir: str = "runs/default/sft"
    """Directory for the checkpoints and the logs of the warm start."""
    eval_interval: int = 50
    """Steps between evaluations; 0 = evaluate only after the last step."""
    checkpoint_interval: int = 0
    """Steps between checkpoints; 0 = save only at the end, or when the run is told to stop."""
    stop_accuracy: float | None = None
    """Stop when the held-out accuracy reaches this share; null = never."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and learning-rate schedule of the warm start, independent of the section optimizer."""

    def __post_init__(self) -> None:
        check_filled("sft", self, "dir")
        check_range("sft", self, "steps batch_size", at_least=1)
        check_range("sft", self, "eval_interval checkpoint_interval", at_least=0)
        check_range("sft", self, "stop_accuracy", above=0, at_most=1)
