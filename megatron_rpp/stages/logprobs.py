"""Stage 3, logprobs: log-probs of the response tokens under the policy before its update, and under
the reference model. The forward passes are pipelined over micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_rpp.model import pipeline
from megatron_rpp.model.language_model import chunks
from megatron_rpp.model.logprobs import vocab_parallel_logprobs
from megatron_rpp.model.reference import Reference
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron_rpp.records import MicroBatch
from megatron_rpp.rollout import planning
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.rollout.packing import Split


def make_micro_batches(
    model: torch.nn.ModuleList,
    buffer: RolloutBuffer,
    samples: list[int],
    *,
    max_tokens: int,
    together: int = 1,
    lag: int = 1,
) -> list[MicroBatch]:
    """Packs `samples` into micro-batches of at most `max_tokens` tokens.

    Every data-parallel rank gets the same number of them. Collective.

    together, lag: see `planning.micro_batches`.
    """
    config, context = chunks(model)[0].config, groups.context_group()
    stages = config.pipeline_model_parallel_size
    interleaved = config.virtual_pipeline_model_parallel_size is not None

    def agree(count: int) -> int:
        most = groups.reduce_sums([float(count)], groups.data_group(), dist.ReduceOp.MAX)[0]
        # Megatron's interleaved schedule takes micro-batches in turns of one per stage.
        return -(-int(most) // stages) * stages if interleaved else int(most)

    tensor = groups.tensor_group().size() if config.sequence_parallel else 1
    split = Split(context.size(), context.rank(), tensor)
    return planning.micro_batches(
        buffer,
        samples,
        max_tokens,
        split=split,
        device=devices.device(),
        agree=agree,
        same_length=stages > 1,
        together=together,
        lag=lag,
    )


def token_logprobs(
    model: torch.nn.ModuleList,
    batch: MicroBatch,
    hidden: torch.Tensor,
    *,
    temperature: float,
    with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs [n] and, if asked for, entropies [n] of a micro-batch's response tokens.

    hidden: [t, 1, h], the last stage's output.
    """
    stage = chunks(model)[-1]
    return vocab_parallel_logprobs(
        hidden[batch.rows, 0],
        stage.output_weight,
        batch.targets,
        valid_rows=stage.valid_vocab_rows,
        temperature=temperature,
        group=groups.tensor_group(),
        with_entropy=with_entropy,
    )


def response_logprobs(
    model: torch.nn.ModuleList, buffer: RolloutBuffer, max_tokens: int, *, temperature: float
) -> torch.Tensor:
    """Log-probs of every response token of this replica's shard: fp32 [R], on the host.

    temperature: divides the logits, as in the rollout that sampled the tokens.
    """

    def head(batch: MicroBatch, hidden: torch.Tensor) -> torch.Tensor:
        return token_logprobs(model, batch, hidden, temperature=temperature)[0]

    return response_column(model, buffer, head, max_tokens=max_tokens)


def response_column(
    model: torch.nn.ModuleList,
    buffer: RolloutBuffer,
    head: Callable[[MicroBatch, torch.Tensor], torch.Tensor],
    *,
    max_tokens: int,
    together: int = 1,
    lag: int = 1,
) -> torch.Tensor:
    """A number for every response token of this replica's shard: fp32 [R], on the host. Collective.

    Args:
        head: (micro-batch, the last stage's output [t, 1, h]) -> the numbers [n] of its response
            tokens.
        together, lag: see `planning.micro_batches`.
    """
    samples = list(range(len(buffer)))
    batches = make_micro_batches(
        model, buffer, samples, max_tokens=max_tokens, together=together, lag=lag
    )
    column = torch.zeros(len(buffer.mask), dtype=torch.float32, device=devices.device())
    for batch, numbers in zip(batches, pipeline.forward(model, batches, head)):
        column[devices.upload(batch.column, column.device)] = numbers
    if groups.context_group().size() > 1:  # each rank has filled in its own tokens
        dist.all_reduce(column, group=groups.context_group())
    return groups.broadcast_from_last_stage(column).cpu()


def compute_logprobs(
    buffer: RolloutBuffer,
    policy: torch.nn.ModuleList,
    reference: Reference | None,
    *,
    recompute: bool,
    max_tokens: int,
    temperature: float,
) -> None:
    """Fills `old_logprobs` and, if there is a reference model, `ref_logprobs`. Collective.

    Args:
        policy: the model that sampled the responses, before its update.
        recompute: compute `old_logprobs` with the training kernels; otherwise take those of the
            rollout engine.
        max_tokens: the token budget of a micro-batch.
        temperature: that of the rollout.
    """
    if recompute:
        old = response_logprobs(policy, buffer, max_tokens, temperature=temperature)
    else:
        old = buffer.rollout_logprobs
    if reference is not None:
        with reference.active() as model:
            buffer.ref_logprobs = response_logprobs(
                model, buffer, max_tokens, temperature=temperature
            )
    buffer.old_logprobs = old  # set last: it marks the stage as complete
