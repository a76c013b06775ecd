"""Independent reference for megatron_rpp.algorithms: NumPy float64, plain loops, slow.

Written from the equations (DESIGN section 2, arXiv 2501.03262) and not from the code under test:
one token at a time, statistics by ``numpy.mean`` and ``numpy.var`` over a list of the live tokens.
"""

from __future__ import annotations

import math

import numpy as np


def kl(logprobs, ref_logprobs, kind):
    out = np.zeros_like(logprobs)
    for i in np.ndindex(*logprobs.shape):
        k1 = logprobs[i] - ref_logprobs[i]
        out[i] = {"k1": k1, "k2": 0.5 * k1**2, "k3": math.exp(-k1) - 1 + k1}[kind]
    return out


def token_rewards(scores, kl, mask, kl_coef):
    out = np.zeros(mask.shape)
    for b, row in enumerate(mask):
        live = [t for t, on in enumerate(row) if on]
        for t in live:
            out[b, t] = -kl_coef * kl[b, t]
            if t == live[-1]:
                out[b, t] += scores[b]
    return out


def returns_to_go(rewards, mask, gamma):
    """The definition, not the recursion: exponents count live tokens only."""
    out = np.zeros(mask.shape)
    for b, row in enumerate(mask):
        live = [t for t, on in enumerate(row) if on]
        for i, t in enumerate(live):
            out[b, t] = sum(gamma ** (j - i) * rewards[b, live[j]] for j in range(i, len(live)))
    return out


def moments(values, mask):
    live = [float(values[i]) for i in np.ndindex(*mask.shape) if mask[i]]
    if not live:
        return 0, 0.0, 0.0
    mean = math.fsum(live) / len(live)
    return len(live), mean, math.fsum((x - mean) ** 2 for x in live) / len(live)


def whiten(values, mask):
    _, mean, var = moments(values, mask)
    out = np.zeros(mask.shape)
    for i in np.ndindex(*mask.shape):
        if mask[i]:
            out[i] = (values[i] - mean) / math.sqrt(max(var, 1e-8))
    return out


def group_baseline(scores, group_ids, kind):
    out = np.zeros(len(scores))
    for i, score in enumerate(scores):
        others = [scores[j] for j in range(len(scores)) if group_ids[j] == group_ids[i] and j != i]
        everyone = [score, *others]
        if kind == "mean":
            out[i] = score - np.mean(everyone)
        elif not others:
            out[i] = score / (1 + 1e-6) if kind == "grpo" else score
        elif kind == "grpo":
            out[i] = (score - np.mean(everyone)) / (np.std(everyone, ddof=1) + 1e-6)
        else:
            out[i] = score - np.mean(others)
    return out


def policy_loss(logprobs, old_logprobs, advantages, clip_low, clip_high, dual_clip=None):
    out = np.zeros_like(logprobs)
    for i in np.ndindex(*logprobs.shape):
        ratio = math.exp(min(max(logprobs[i] - old_logprobs[i], -20.0), 20.0))
        clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
        out[i] = max(-ratio * advantages[i], -clipped * advantages[i])
        if dual_clip is not None and advantages[i] < 0:
            out[i] = min(out[i], -dual_clip * advantages[i])
    return out


def aggregate(per_token, mask, kind):
    rows = [[float(x) for x, on in zip(r, m, strict=True) if on] for r, m in zip(per_token, mask)]
    rows = [row for row in rows if row]
    if kind == "token_mean":
        return sum(map(sum, rows)), sum(map(len, rows))
    return sum(sum(row) / len(row) for row in rows), len(rows)
