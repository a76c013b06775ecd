"""How many tokens the key-value cache of the engine in the training process may hold."""

from __future__ import annotations

import torch.distributed as dist

from megatron_rpp.config import Config
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron_rpp.runtime.memory_estimate import CPU, GPU, cache_bytes_per_token, stage_estimates

CACHE_SHARE = 0.8
"""Share of a rank's memory that model and cache may fill together: the estimate is right within 15%."""


def max_cache_tokens(config: Config, vocab_size: int) -> int:
    """rollout.max_cache_tokens, or else what the memory leaves beside the model. Collective.

    It follows from the settings and the machine alone, and not from the memory that is free at the
    moment. So a resumed run decodes the same batches, which decide how log-probs are rounded.
    """
    if config.rollout.max_cache_tokens is not None:
        return config.rollout.max_cache_tokens
    kind = CPU if devices.ON_CPU else GPU
    stages = stage_estimates(config, vocab_size, replicas=groups.data_size(), device=kind)
    others = max(need.resident + need.rollout - need.cache for need in stages)
    left = CACHE_SHARE * devices.total_memory_of_rank() - others
    least = groups.reduce_sums([left], None, dist.ReduceOp.MIN)[0]
    each = cache_bytes_per_token(config.model, config.parallel)
    return max(config.model.max_length, int(least / each))
