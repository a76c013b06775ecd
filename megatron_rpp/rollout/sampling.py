"""Samples the next token from the logits and (seed, step, sample, position) alone.

A counter-based hash (seeds.py) gives one uniform number per token, and the inverse of the
cumulative distribution turns it into the token. There is no generator state, so equal logits give
equal tokens on any layout, in any batch order and after any resume.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_rpp.records import Sampling
from megatron_rpp.seeds import BIT, bits_at

_PER_ONE = 2.0**44
CHUNK = 1024
"""Tokens of a chunk of the vocabulary."""


def uniforms_at(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Returns fp64 numbers in [0, 1) [n, b] for keys [b], from `seeds.sample_keys`, at positions [n, b] of
    the responses. The host does not wait."""
    return bits_at(keys, positions).double() * BIT


def _integers(values: torch.Tensor) -> torch.Tensor:
    """Values in [0, 1] in units of 2^-44, int64 [b, v], rounded down.

    A sum of integers does not depend on its order, so it is the same on every device and in every
    run. A GPU's sums of floating-point numbers are not.
    """
    return (values * _PER_ONE).long()  # a power of two: the product is exact


def truncate(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Returns logits [b, v] with every token outside the top k and the top-p nucleus at -inf.

    All tokens tied with the k-th stay.

    The nucleus is the smallest set of most likely tokens whose probability reaches top_p
    (Holtzman et al., arXiv 1904.09751); the most likely token always stays.
    """
    if top_k:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = _integers(probabilities).cumsum(-1) / _PER_ONE - probabilities
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def choose(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    sampling: Sampling,
    *,
    forbid: Sequence[int] = (),
    rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples one token per row, without making the host wait.

    Args:
        logits: [b, v] fp32, the whole vocabulary.
        uniform: [b] fp64 numbers in [0, 1), from `uniforms_at`.
        forbid: tokens that may not be chosen now (end-of-sequence before min_new_tokens).
        rows: [b] bool: the rows for which that holds; None = all.
    Returns:
        tokens [b] int64 and their fp32 log-probs [b] under softmax(logits/temperature): the
        distribution that training sees, before top-k, top-p and `forbid`.
    """
    greedy = sampling.temperature == 0.0
    scaled = logits if greedy or sampling.temperature == 1.0 else logits / sampling.temperature
    allowed, forbidden = _without(scaled, forbid, rows) if forbid else (scaled, None)
    weights, log_sums = _exponentials(allowed)
    if forbidden is not None:
        log_sums = torch.logaddexp(log_sums, forbidden)
    if greedy:
        tokens = allowed.argmax(-1)
    else:
        nucleus = truncate(allowed, sampling.top_k, sampling.top_p)
        if nucleus is not allowed:
            weights, _ = _exponentials(nucleus)
        tokens = _inverse_cumulative(weights, uniform)
    return tokens, torch.gather(scaled, 1, tokens[:, None]).squeeze(1) - log_sums


def _inverse_cumulative(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first token [b] at which the cumulative sum of weights [b, v] passes uniform [b] · Σ weights.

    A large vocabulary is searched in two steps, first for the chunk and then for the token in it,
    because a cumulative sum over all tokens takes longer than the sums of the chunks.
    """
    counts, size = _integers(weights), weights.shape[-1]
    if size <= CHUNK:
        cumulative = counts.cumsum(-1)
        return torch.searchsorted(cumulative, _target(cumulative, uniform), right=True).squeeze(1)
    whole = size - size % CHUNK
    sums = counts[:, :whole].unflatten(1, (-1, CHUNK)).sum(-1)
    sums = torch.cat([sums, counts[:, whole:].sum(-1, keepdim=True)], 1)
    cumulative = sums.cumsum(-1)
    target = _target(cumulative, uniform)
    chunk = torch.searchsorted(cumulative, target, right=True)
    tokens = chunk * CHUNK + torch.arange(CHUNK, device=weights.device)
    inside = counts.gather(1, tokens.clamp(max=size - 1)).masked_fill_(tokens >= size, 0).cumsum(-1)
    target = target - (cumulative - sums).gather(1, chunk)
    return (chunk * CHUNK + torch.searchsorted(inside, target, right=True)).squeeze(1)


def _target(cumulative: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """uniform · the last sum, [b, 1] int64, below that sum."""
    total = cumulative[:, -1:]
    return (uniform[:, None] * total).long().minimum(total - 1)  # it may have been rounded up


def _exponentials(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(logits - their maximum) [b, v], and log Σ exp(logits) [b]."""
    peaks = logits.amax(-1, keepdim=True)
    weights = torch.sub(logits, peaks).exp_()
    return weights, peaks.squeeze(1) + weights.sum(-1).log()


def _without(
    logits: torch.Tensor, forbid: Sequence[int], rows: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of the logits with the tokens `forbid` at -inf, and log Σ exp [b] of what they were."""
    allowed, removed = logits.clone(), []
    for token in forbid:  # a list of tokens would be copied to the GPU
        column = logits[:, token]
        if rows is None:
            allowed[:, token] = -torch.inf
        else:
            allowed[:, token].masked_fill_(rows, -torch.inf)
            column = column.masked_fill(~rows, -torch.inf)
        removed.append(column)
    return allowed, torch.stack(removed).logsumexp(0)
