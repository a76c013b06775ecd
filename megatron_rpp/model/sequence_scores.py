"""One number per sequence, from a scalar model: the reward at the last token."""

from __future__ import annotations

import torch

from megatron_rpp.model.scalar_model import scalars
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron_rpp.records import MicroBatch

from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region


def sequence_scores(
    model: torch.nn.Module, batch: MicroBatch, hidden: torch.Tensor, *, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers [count], fp32, of a buffer's sequences, and which of them are in the micro-batch.

    The others are 0. The buffer has one response token a sequence, so an entry of `batch.column` is the
    number of a sequence; each is on one context-parallel rank. The sum over these ranks passes the
    gradient back as it is: if all of them compute the same loss from the result, each has the gradient
    of its own sequences, and the sum of the weights' gradients counts every sequence once. Collective
    over the context-parallel ranks.

    Args:
        batch: packed with lag 0 (rollout/packing.py), so that rows are those of the last tokens.
        hidden: [t, 1, h], the last stage's output.
    """
    column = devices.upload(batch.column, hidden.device)
    values = scalars(model, hidden, batch.rows)
    none = values.new_zeros(count)
    scores, present = none.index_put((column,), values), none.index_fill(0, column, 1.0)
    context = groups.context_group()
    if context.size() > 1:
        both = torch.stack([scores, present])
        both = reduce_from_tensor_model_parallel_region(both, context)
        scores, present = both[0], both[1].detach()
    return scores, present > 0
