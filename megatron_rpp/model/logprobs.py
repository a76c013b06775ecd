"""Token log-probs and entropy from hidden states: vocabulary-parallel, chunked, never gathered.

The output projection is part of the function. For each chunk of rows, a tensor-parallel rank
computes the logits of its vocabulary rows in fp32. Three reductions over the group (maximum, sum of
exponentials, target logit) give the log-probs, and the logits are dropped. Backward computes them
again, unless they were a single chunk, which is kept. So the memory is that of one chunk, whatever the
sequence length.

With logits z = hidden·Wᵀ/τ and p = softmax(z):
    log-prob   l = z_y − logΣexp(z)        dl/dz = 1[y] − p
    entropy    H = logΣexp(z) − Σ p z      dH/dz = −p (z − Σ p z)

Shape legend: n rows, h hidden, v vocabulary rows of this rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_rpp.model import head_chunks
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import products

CHUNK_ELEMENTS = head_chunks.ON_CPU if devices.ON_CPU else head_chunks.ON_GPU


def _sum_over(group: dist.ProcessGroup, tensor: torch.Tensor) -> torch.Tensor:
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def _chunks(rows: int, columns: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, *, valid_rows: int, temperature: float
) -> torch.Tensor:
    """Returns fp32 logits [n, valid_rows]. Padding rows have no log-prob, so they are left out."""
    return products.matmul_fp32(hidden, weight[:valid_rows].t()).div_(temperature)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds left · right to `total` in fp32, whatever the dtype of the factors."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        total += products.matmul_fp32(left, right)


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 (autograd calls it by position)
        ctx, hidden, weight, targets, valid_rows, temperature, group, with_entropy
    ):
        first = group.rank() * weight.shape[0]
        local_targets = targets - first
        local_mask = (local_targets >= 0) & (local_targets < valid_rows)
        # Any valid column stands for a target that another rank holds. To select rows by a mask
        # instead, the host would have to wait for their number.
        columns = torch.where(local_mask, local_targets, 0)
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        log_sums, mean_logits = torch.empty_like(logprobs), torch.zeros_like(logprobs)
        chunks = _chunks(len(hidden), len(weight))
        for rows in chunks:
            logits = _logits(hidden[rows], weight, valid_rows=valid_rows, temperature=temperature)
            peak = logits.amax(-1) if valid_rows else logprobs.new_full((len(logits),), -torch.inf)
            if group.size() > 1:
                dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
            target = logits.new_zeros(len(logits))
            if valid_rows:
                own = logits.gather(1, columns[rows, None]).squeeze(1)
                target = torch.where(local_mask[rows], own, target)
            exponentials = torch.exp(logits - peak[:, None])
            terms = [exponentials.sum(-1), target]
            if with_entropy:
                terms.append((exponentials * logits).sum(-1))
            sums = _sum_over(group, torch.stack(terms))
            log_sums[rows] = peak + sums[0].log()
            logprobs[rows] = sums[1] - log_sums[rows]
            if with_entropy:
                mean_logits[rows] = sums[2] / sums[0]
        kept = [logits] if len(chunks) == 1 else []
        ctx.save_for_backward(hidden, weight, columns, local_mask, log_sums, mean_logits, *kept)
        ctx.valid_rows, ctx.temperature, ctx.group = valid_rows, temperature, group
        ctx.set_materialize_grads(False)  # no entropy backward if the entropy is only reported
        return logprobs, log_sums - mean_logits if with_entropy else mean_logits

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, columns, local_mask, log_sums, mean_logits, *kept = ctx.saved_tensors
        valid_rows, temperature = ctx.valid_rows, ctx.temperature
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(log_sums)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for rows in _chunks(len(hidden), len(weight)):
            logits = (
                kept[0]
                if kept
                else _logits(hidden[rows], weight, valid_rows=valid_rows, temperature=temperature)
            )
            probabilities = torch.exp(logits - log_sums[rows, None])
            if grad_entropy is None:
                grad_logits = probabilities.mul_(-grad_logprobs[rows, None])
            else:
                spread = (logits - mean_logits[rows, None]).mul_(grad_entropy[rows, None])
                grad_logits = probabilities.mul_(-(spread + grad_logprobs[rows, None]))
            if valid_rows:
                own = torch.where(local_mask[rows], grad_logprobs[rows], 0.0)
                steps = torch.arange(len(own), device=own.device)
                grad_logits[steps, columns[rows]] += own
            grad_logits = grad_logits.div_(temperature).to(hidden.dtype)
            grad_hidden[rows] = grad_logits @ weight[:valid_rows]
            _add_product(grad_weight[:valid_rows], grad_logits.t(), hidden[rows])
        # Each rank has the gradient from its part of the vocabulary; the input's is their sum.
        _sum_over(ctx.group, grad_hidden)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def vocab_parallel_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    valid_rows: int,
    temperature: float,
    group: dist.ProcessGroup,
    with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes the log-probs of `targets` and the entropy of each row's distribution.

    Args:
        hidden: [n, h], the same on every rank of `group`.
        weight: [v, h], this rank's rows of the output projection.
        targets: [n], token ids in the whole vocabulary.
        valid_rows: how many of this rank's rows belong to the vocabulary; the rest is padding.
        temperature: divides the logits, as it did when the tokens were sampled.
        group: the tensor-parallel ranks.
        with_entropy: also compute the entropy in nats.
    Returns:
        (log-probs [n], entropies [n] or None), fp32, differentiable in `hidden` and `weight`. The
        gradient of `hidden` is already summed over `group`.
    """
    logprobs, entropy = _VocabParallelLogProbs.apply(
        hidden, weight, targets, valid_rows, temperature, group, with_entropy
    )
    return logprobs, entropy if with_entropy else None
