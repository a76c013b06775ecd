"""Samples the next token from the logits and (seed, step, sample, position) alone.

A counter-based hash (`seeds.uniforms`) gives one uniform number per token, and the inverse of the
cumulative distribution turns it into the token. There is no generator state, so equal logits give
equal tokens on any layout, in any batch order and after any resume.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_rpp.records import Sampling

_UNIT = 2.0**44


def _prefix_sums(values: torch.Tensor) -> torch.Tensor:
    """The sums of values[:, :i + 1] in units of 2^-44, int64 [b, v]; the values are in [0, 1].

    A sum of integers does not depend on its order, so it is the same on every device and in every
    run. A GPU's sums of floating-point numbers are not.
    """
    return (values * _UNIT).long().cumsum(-1)  # a power of two: the product is exact


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
        before = _prefix_sums(probabilities) / _UNIT - probabilities
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
        uniform: [b] fp64 numbers in [0, 1), from `seeds.uniforms`.
        forbid: tokens that may not be chosen now (end-of-sequence before min_new_tokens).
        rows: [b] bool: the rows for which that holds; None = all.
    Returns:
        tokens [b] int64 and their fp32 log-probs [b] under softmax(logits/temperature): the
        distribution that training sees, before top-k, top-p and `forbid`.
    """
    greedy = sampling.temperature == 0.0
    scaled = logits if greedy or sampling.temperature == 1.0 else logits / sampling.temperature
    weights, log_sums = _exponentials(scaled)
    allowed = _without(scaled, forbid, rows) if forbid else scaled
    if greedy:
        tokens = allowed.argmax(-1)
    else:
        allowed = truncate(allowed, sampling.top_k, sampling.top_p)
        if allowed is not scaled:
            weights, _ = _exponentials(allowed)
        cumulative = _prefix_sums(weights)
        total = cumulative[:, -1:]
        draw = (uniform[:, None] * total).long().minimum(total - 1)  # it may have been rounded up
        tokens = torch.searchsorted(cumulative, draw, right=True).squeeze(1)
    return tokens, torch.gather(scaled, 1, tokens[:, None]).squeeze(1) - log_sums


def _exponentials(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(logits - their maximum) [b, v], and log Σ exp(logits) [b]."""
    peaks = logits.amax(-1, keepdim=True)
    weights = torch.exp(logits - peaks)
    return weights, peaks.squeeze(1) + weights.sum(-1).log()


def _without(
    logits: torch.Tensor, forbid: Sequence[int], rows: torch.Tensor | None
) -> torch.Tensor:
    """A copy of the logits with the tokens `forbid` at -inf."""
    allowed = logits.clone()
    for token in forbid:  # a list of tokens would be copied to the GPU
        if rows is None:
            allowed[:, token] = -torch.inf
        else:
            allowed[:, token].masked_fill_(rows, -torch.inf)
    return allowed
