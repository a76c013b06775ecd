"""Runs a model over micro-batches: the only caller of Megatron's forward-backward schedules.

Training and log-probs use the same schedules: no pipelining, 1F1B over the stages, or interleaved
if each stage holds several chunks. Generation passes hidden states on with `receive` and `send`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.model import overlap
from megatron_rpp.model.language_model import LanguageModel, chunks
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron_rpp.records import MicroBatch

from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

# Hidden states [t, 1, h] of a micro-batch -> (loss sum, count, report). Megatron adds up sums and
# counts over micro-batches and data-parallel ranks and divides the gradient once, so the loss is a
# global mean on any layout.
LossFunction = Callable[[MicroBatch, torch.Tensor], tuple[torch.Tensor, torch.Tensor, Any]]


def _run(
    model: torch.nn.ModuleList,
    micro_batches: list[MicroBatch],
    last_stage: Callable[..., Any],
    **schedule: Any,
) -> list[Any]:
    def forward_step(batches, chunk):
        heartbeat.current.beat()
        batch = next(batches)
        return chunk(batch.tokens, batch.positions, batch.packing), partial(last_stage, batch)

    iterators = [iter(micro_batches) for _ in model]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=list(model),
        num_microbatches=len(micro_batches),
        # Length of the whole row. With several stages, all rows have the same.
        seq_length=micro_batches[0].tokens.shape[1] * groups.context_group().size(),
        micro_batch_size=1,
        **schedule,
    )


@dataclass(frozen=True)
class Backward:
    """The results of a backward pass on one rank, besides the gradients in its buffers."""

    reports: list[Any]
    """The loss function's report on each micro-batch, on the last stage; [] on the others."""
    local_grad_norms: list[torch.Tensor]
    """Norm of each gradient buffer, before the gradients of other ranks are added to it unless that
    happens during the backward pass."""


def train(
    model: torch.nn.ModuleList, micro_batches: list[MicroBatch], loss: LossFunction
) -> Backward:
    """Runs forward and backward; leaves the gradients of the global mean in the buffers.

    Afterwards `overlap.complete_weights` comes before any other reader of the weights.
    """
    local_grad_norms: list[torch.Tensor] = []

    def last_stage(batch, hidden):
        overlap.finish_gathers(model)
        return loss(batch, hidden)

    def finalize(wrapped, *args, **kwargs):
        # Taken before the reduction if it has not begun: it spreads one rank's NaN to all ranks.
        reduced = wrapped[0].ddp_config.overlap_grad_reduce
        if reduced:
            finalize_model_grads(wrapped, *args, **kwargs)
        buffers = (buffer for chunk in wrapped for buffer in chunk.buffers)
        local_grad_norms.extend(buffer.grad_data.norm() for buffer in buffers)
        if not reduced:
            finalize_model_grads(wrapped, *args, **kwargs)

    for chunk in chunks(model):
        chunk.config.finalize_model_grads_func = finalize
    overlap.begin_training(model)
    return Backward(_run(model, micro_batches, last_stage, forward_only=False), local_grad_norms)


@torch.no_grad()
def forward(
    model: torch.nn.ModuleList,
    micro_batches: list[MicroBatch],
    head: Callable[[MicroBatch, torch.Tensor], Any],
) -> list[Any]:
    """Returns `head(batch, hidden)` of every micro-batch on the last stage; [] on the others."""
    assert overlap.are_weights_complete(model)

    def last_stage(batch, hidden, non_loss_data=True):
        return head(batch, hidden)

    return _run(model, micro_batches, last_stage, forward_only=True, collect_non_loss_data=True)


def stage_forward(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Runs whole sequences through this rank's chunks, without a cache.

    Args:
        tokens: [b, s], the same on every stage.
    Returns:
        The hidden states [s, b, h] of this rank's last chunk.
    """
    for chunk in chunks(model):
        if not chunk.pre_process:
            chunk.set_input_tensor([receive(chunk, *reversed(tokens.shape))])
        hidden = chunk(tokens)
        if not chunk.post_process:
            send(hidden).wait()
    return hidden


def receive(chunk: LanguageModel, *shape: int) -> torch.Tensor:
    """The input [*shape, h] of a chunk, from the rank that holds the chunk before it."""
    group, config = groups.pipeline_group(), chunk.config
    shape = (*shape, config.hidden_size)
    hidden = torch.empty(shape, dtype=config.params_dtype, device=devices.device())
    sender = (group.rank() - 1) % group.size()
    dist.recv(hidden, dist.get_global_rank(group, sender), groups.pipeline_link(sender))
    return hidden


def send(hidden: torch.Tensor) -> dist.Work:
    """Starts to send a chunk's output to the rank that holds the next one. Keep `hidden` until the
    result has been waited for."""
    group = groups.pipeline_group()
    target = dist.get_global_rank(group, (group.rank() + 1) % group.size())
    work = dist.isend(hidden, target, groups.pipeline_link(group.rank()))
    assert work is not None
    return work
