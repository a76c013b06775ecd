"""Megatron-LM's flag names, accepted as aliases of our settings, so that known commands work.

--micro-batch-size is not listed here because it sets a product (cli.py). Left out: flags that have
no setting here, such as --expert-model-parallel-size. They are unknown keys.
"""

from __future__ import annotations

import re

# Megatron's flag: our setting. If the setting includes a value, the flag is a bare switch.
_ALIASES = {
    "tensor-model-parallel-size": "parallel.tensor",
    "pipeline-model-parallel-size": "parallel.pipeline",
    "num-virtual-stages-per-pipeline-rank": "parallel.virtual_pipeline",
    "context-parallel-size": "parallel.context",
    "sequence-parallel": "parallel.sequence_parallel=true",
    "overlap-grad-reduce": "parallel.overlap_grad_reduce=true",
    "overlap-param-gather": "parallel.overlap_param_gather=true",
    "num-layers": "model.layers",
    "hidden-size": "model.hidden",
    "ffn-hidden-size": "model.ffn_hidden",
    "num-attention-heads": "model.heads",
    "num-query-groups": "model.kv_heads",
    "kv-channels": "model.head_dim",
    "vocab-size": "model.vocab_size",
    "seq-length": "model.max_length",
    "max-position-embeddings": "model.max_length",
    "rotary-base": "model.rope_theta",
    "norm-epsilon": "model.norm_eps",
    "init-method-std": "model.init_std",
    "bf16": "model.dtype=bf16",
    "transformer-impl": "model.transformer_impl",
    "tokenizer-model": "data.tokenizer",
    "lr": "optimizer.lr",
    "min-lr": "optimizer.min_lr",
    "lr-warmup-iters": "optimizer.warmup_steps",
    "lr-decay-iters": "optimizer.decay_steps",
    "lr-decay-style": "optimizer.decay_style",
    "weight-decay": "optimizer.weight_decay",
    "adam-beta1": "optimizer.beta1",
    "adam-beta2": "optimizer.beta2",
    "adam-eps": "optimizer.eps",
    "clip-grad": "optimizer.clip_grad",
    "use-distributed-optimizer": "optimizer.distributed=true",
    "recompute-activations": "train.recompute=selective",
    "recompute-granularity": "train.recompute",
    "recompute-method": "train.recompute_method",
    "recompute-num-layers": "train.recompute_layers",
    "optimizer-cpu-offload": "optimizer.offload=true",
    "deterministic-mode": "train.deterministic=true",
    "train-iters": "train.steps",
    "eval-interval": "evaluation.interval",
    "save": "checkpoint.dir",
    "load": "checkpoint.load",
    "save-interval": "checkpoint.interval",
    "async-save": "checkpoint.async_save=true",
    "tensorboard-dir": "logging.dir",
}
# sft and reward_model have a section each: an alias must not set what they never read.
_SECTION_SETTINGS = {
    "train.steps": "steps",
    "evaluation.interval": "eval_interval",
    "checkpoint.dir": "dir",
}
_ONLY_IN_TRAIN = ("load", "save-interval", "async-save", "tensorboard-dir")


def aliases_of(program: str) -> dict[str, str]:
    """The aliases of a program: flag -> setting, or ``setting=value`` for a bare switch."""
    if program == "train":
        return _ALIASES

    def own(setting: str) -> str:
        if setting in _SECTION_SETTINGS:
            return f"{program}.{_SECTION_SETTINGS[setting]}"
        return re.sub("^optimizer", f"{program}.optimizer", setting)

    return {
        alias: own(setting) for alias, setting in _ALIASES.items() if alias not in _ONLY_IN_TRAIN
    }


def list_aliases(aliases: dict[str, str]) -> str:
    """The lines that ``--help`` prints at its end."""
    lines = [
        f"  --{alias + ('' if '=' in setting else ' VALUE'):45} --{setting}"
        for alias, setting in aliases.items()
    ]
    return "\n".join(["Names of Megatron-LM that are accepted as aliases:", *lines])
