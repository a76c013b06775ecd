"""Builds Megatron's AdamW and learning-rate schedule from the configuration.

Left out: other optimizers, loss scaling (bf16 and fp32 need none), offloading only a part of Adam's state.
"""

from __future__ import annotations

import torch

from megatron_rpp.config import OptimizerConfig
from megatron_rpp.parallel import device as devices

from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

# Megatron's scheduler needs a length even if the learning rate stays constant.
_NO_END = 2**31


def build_optimizer(
    model: torch.nn.ModuleList, config: OptimizerConfig, bf16: bool
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Returns AdamW over DDP-wrapped chunks, and its schedule, counted in optimizer steps."""
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.distributed,
    )
    if config.offload and not devices.ON_CPU:
        _offload(settings)
    optimizer = get_megatron_optimizer(settings, list(model), use_gloo_process_groups=False)
    constant = config.decay_steps is None
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=_NO_END if constant else config.decay_steps,
        lr_decay_style="constant" if constant else config.decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # A resumed run uses the schedule of its configuration, from the checkpoint's position on.
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )
    return optimizer, scheduler


def _offload(settings: MegatronOptimizerConfig) -> None:
    """Chooses Megatron's hybrid optimizer, with all of Adam's state and the fp32 weights on the host.

    Gradients go to pinned host memory, Adam runs on the CPU, and the new weights come back, parameter
    by parameter and overlapped.
    """
    settings.optimizer_cpu_offload = True
    settings.optimizer_offload_fraction = 1.0
    settings.overlap_cpu_optimizer_d2h_h2d = True
    # Else the GPU keeps fp32 weights too. Set here, because the constructor asks TransformerEngine
    # for its version, which the hybrid optimizer does not need.
    settings.use_precision_aware_optimizer = True
    settings.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    settings.store_param_remainders = False
