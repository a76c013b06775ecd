"""Per-token estimators of KL(policy || reference) from the log-probs of sampled tokens.

The three estimators of J. Schulman, "Approximating KL Divergence" (2020), with
k1 = log pi(y_t) - log pi_ref(y_t):

    k1              unbiased, high variance, may be negative; the reward penalty of REINFORCE++
    k2 = k1^2 / 2   biased, low variance; its gradient is that of the KL (the loss term of
                    REINFORCE++ with baseline, arXiv 2501.03262)
    k3 = exp(-k1) - 1 + k1    unbiased, never negative (up to rounding)

Left out: the exact KL over the vocabulary (it needs the reference logits), and clamping, which
would hide a policy that has diverged.

``adapted_kl_factor`` is the adaptive controller of Ziegler et al. 2019 (arXiv 1909.08593, section
2.2): a proportional controller of the coefficient's logarithm with a clipped error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rpp.algorithms.numerics import at_least_fp32, finite_gradient

KL_KINDS = ("k1", "k2", "k3")
MAX_KL_ERROR = 0.2


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Estimates the KL of every token, in nats.

    Args:
        logprobs: [B, T], log-prob of each sampled token under the policy.
        ref_logprobs: [B, T], the same under the reference model.
        kind: "k1", "k2" or "k3".

    Returns:
        [B, T], at least fp32, differentiable. If an estimate is not finite (undefined values of
        masked-out tokens), its gradient is 0.

    Raises:
        ValueError: unknown kind.
    """
    assert logprobs.shape == ref_logprobs.shape
    k1 = at_least_fp32(logprobs) - at_least_fp32(ref_logprobs)
    if kind == "k1":
        return k1
    if kind == "k2":
        return finite_gradient(lambda d: d.square() / 2, k1)
    if kind == "k3":
        return finite_gradient(_k3, k1)
    raise ValueError(f"unknown KL estimator {kind!r}: choose one of {', '.join(KL_KINDS)}")


def _k3(k1: Tensor) -> Tensor:
    """Uses expm1 and fp64: near k1 = 0, exp(-k1) - 1 + k1 cancels down to k1^2 / 2."""
    wide = k1.double()
    return (torch.expm1(-wide) + wide).to(k1.dtype)


def adapted_kl_factor(
    factor: float, kl: float, *, target: float, samples: int, horizon: int
) -> float:
    """Returns the factor on the KL coefficient for the next step.

        e = clip((KL - target) / target, -0.2, 0.2)
        factor' = factor * (1 + e * samples / horizon)

    Args:
        factor: the factor of this step. kl: the KL of this step, in the unit of ``target``.
        samples: the number of responses in this step.
        horizon: the number of responses in which an error of e changes the factor by about e; at
            least ``samples``, so that the factor stays positive.
    """
    error = min(max(kl / target - 1.0, -MAX_KL_ERROR), MAX_KL_ERROR)
    return factor * (1.0 + error * samples / horizon)
