"""Runs a model over micro-batches: the only caller of Megatron's forward-backward schedules.

Training and scoring go through the same schedules (no pipelining, or 1F1B over the stages).
Generation passes one batch through the stages with `stage_forward`.

Left out: interleaved (virtual) stages; overlapping several batches in generation, so that while
one stage computes a token the others wait.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Callable

import torch
import torch.distributed as dist

from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from megatron_rpp.records import MicroBatch

# Hidden states [s, b, h] of a micro-batch -> (loss sum, count, report). Megatron sums both over
# micro-batches and data-parallel ranks, and divides the gradient once: a global mean on any layout.
LossFunction = Callable[[MicroBatch, torch.Tensor], tuple[torch.Tensor, torch.Tensor, Any]]


def _run(model, micro_batches: list[MicroBatch], last_stage, **schedule) -> list[Any]:
    def forward_step(batches, chunk):
        batch = next(batches)
        return chunk(batch.tokens), partial(last_stage, batch)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=[model],
        num_microbatches=len(micro_batches),
        seq_length=max(batch.tokens.shape[1] for batch in micro_batches),
        micro_batch_size=max(batch.tokens.shape[0] for batch in micro_batches),
        **schedule,
    )


def train(model, micro_batches: list[MicroBatch], loss: LossFunction) -> list[Any]:
    """Forward and backward over `micro_batches`; gradients of the global mean land in the buffers.

    Returns the reports of `loss`, one per micro-batch, on the last stage; [] elsewhere.
    """
    return _run(model, micro_batches, loss, forward_only=False)


@torch.no_grad()
def score(
    model, micro_batches: list[MicroBatch], head: Callable[[MicroBatch, torch.Tensor], Any]
) -> list[Any]:
    """`head(batch, hidden)` of every micro-batch on the last stage; [] elsewhere."""

    def last_stage(batch, hidden, non_loss_data=True):
        return head(batch, hidden)

    return _run(model, micro_batches, last_stage, forward_only=True, collect_non_loss_data=True)


def stage_forward(model, tokens: torch.Tensor, positions: torch.Tensor | None = None):
    """One batch through this stage, received from the stage before and sent to the one after.

    Args:
        tokens: [b, s], the same on every stage.
        positions: [b] while decoding, else None (see LanguageModel.forward).
    Returns:
        this stage's hidden states [s, b, h].
    """
    group = groups.pipeline_group()
    config = get_model_config(model)
    if not groups.is_first_stage():
        shape = (tokens.shape[1], tokens.shape[0], config.hidden_size)
        received = torch.empty(shape, dtype=config.params_dtype, device=devices.device())
        dist.recv(received, group=group, group_src=group.rank() - 1)
        get_attr_wrapped_model(model, "set_input_tensor")([received])
    hidden = model(tokens, positions)
    if not groups.is_last_stage():
        dist.send(hidden.contiguous(), group=group, group_dst=group.rank() + 1)
    return hidden
