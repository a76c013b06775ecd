"""Independent reference for megatron_rpp.algorithms: NumPy float64, plain loops, slow.

It is written from the equations (arXiv 2501.03262 and those named below), not from the code under
test. It computes one token at a time, and statistics in exact fractions over a list of the live
tokens (those under the mask), so that no offset and no spread is too large.
"""

from __future__ import annotations

import math
from fractions import Fraction

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
    """By the definition and not the recursion; exponents count live tokens only."""
    out = np.zeros(mask.shape)
    for b, row in enumerate(mask):
        live = [t for t, on in enumerate(row) if on]
        for i, t in enumerate(live):
            out[b, t] = sum(gamma ** (j - i) * rewards[b, live[j]] for j in range(i, len(live)))
    return out


def exact_moments(values):
    """Mean and population variance of a list of floats, as fractions."""
    exact = [Fraction(float(x)) for x in values]
    mean = sum(exact) / len(exact)
    return mean, sum((x - mean) ** 2 for x in exact) / len(exact)


def moments(values, mask):
    live = values[mask].tolist()
    if not live:
        return 0, 0.0, 0.0
    mean, var = exact_moments(live)
    return len(live), float(mean), float(var)


def whiten(values, mask):
    out = np.zeros(mask.shape)
    if mask.any():
        mean, var = exact_moments(values[mask])
        std = math.sqrt(max(var, 1e-8))
        for i in np.ndindex(*mask.shape):
            if mask[i]:
                out[i] = float(Fraction(float(values[i])) - mean) / std
    return out


def shape(scores, normalize, scale, clip):
    """Returns (shaped scores, the same before clipping), in the order of the paper."""
    if normalize:
        scores = whiten(scores, np.ones(scores.shape, dtype=bool))
    scaled = np.array([scale * float(x) for x in scores])
    bound = math.inf if clip is None else clip
    return np.array([min(max(x, -bound), bound) for x in scaled]), scaled


def group_baseline(scores, group_ids, kind):
    out = np.zeros(len(scores))
    exact = [Fraction(float(score)) for score in scores]
    for i, score in enumerate(exact):
        others = [exact[j] for j in range(len(exact)) if group_ids[j] == group_ids[i] and j != i]
        everyone = [score, *others]
        mean, var = exact_moments(everyone)
        if kind == "mean":
            out[i] = score - mean
        elif not others:
            out[i] = float(score) / (1 + 1e-6) if kind == "grpo" else score
        elif kind == "grpo":
            sample_std = math.sqrt(var * len(everyone) / len(others))
            out[i] = float(score - mean) / (sample_std + 1e-6)
        else:
            out[i] = score - sum(others) / len(others)
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


def entropy(logits):
    """Entropy of the softmax over the last axis, in nats."""
    out = np.zeros(logits.shape[:-1])
    for i in np.ndindex(*out.shape):
        peak = max(logits[i])
        log_total = peak + math.log(math.fsum(math.exp(x - peak) for x in logits[i]))
        out[i] = -math.fsum(math.exp(x - log_total) * (x - log_total) for x in logits[i])
    return out


def rollout_weights(old_logprobs, rollout_logprobs, kind, maximum):
    out = np.zeros_like(old_logprobs)
    for i in np.ndindex(*out.shape):
        weight = math.exp(min(max(old_logprobs[i] - rollout_logprobs[i], -20.0), 20.0))
        if kind == "cap":
            out[i] = min(weight, maximum)
        else:
            out[i] = weight if 1 / maximum <= weight <= maximum else 0.0
    return out


def gae(rewards, values, mask, gamma, lam):
    """By the definition, A_t = sum of (gamma lambda)^k delta_(t+k) over the live tokens, and A + V."""
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for b, row in enumerate(mask):
        live = [t for t, on in enumerate(row) if on]
        value = [*(values[b, t] for t in live), 0.0]
        deltas = [rewards[b, t] + gamma * value[i + 1] - value[i] for i, t in enumerate(live)]
        for i, t in enumerate(live):
            terms = ((gamma * lam) ** k * delta for k, delta in enumerate(deltas[i:]))
            advantages[b, t] = math.fsum(terms)
            returns[b, t] = advantages[b, t] + value[i]
    return advantages, returns


def value_loss(values, old_values, returns, clip=None):
    out = np.zeros_like(values)
    for i in np.ndindex(*values.shape):
        out[i] = 0.5 * (values[i] - returns[i]) ** 2
        if clip is not None:
            bounded = old_values[i] + min(max(values[i] - old_values[i], -clip), clip)
            out[i] = max(out[i], 0.5 * (bounded - returns[i]) ** 2)
    return out


def bradley_terry(chosen, rejected, margin):
    """-log of the share that the better response wins: e^r / (e^r + e^(r' + margin))."""
    out = np.zeros_like(chosen)
    for i in np.ndindex(*chosen.shape):
        lead = chosen[i] - rejected[i] - margin[i]
        out[i] = math.log1p(math.exp(-abs(lead))) + max(-lead, 0.0)
    return out


def correlation(rewards, scores):
    """Pearson's, in exact fractions; only the last root is rounded."""
    (mean_x, var_x), (mean_y, var_y) = exact_moments(rewards), exact_moments(scores)
    if var_x == 0 or var_y == 0:
        return 0.0
    pairs = [(Fraction(float(x)), Fraction(float(y))) for x, y in zip(rewards, scores)]
    together = sum((x - mean_x) * (y - mean_y) for x, y in pairs) / len(pairs)
    sign = 1 if together > 0 else -1
    return sign * math.sqrt(together * together / (var_x * var_y))
