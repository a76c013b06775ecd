"""The checks of tools/gpu_acceptance.py, in their order. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    name: str
    place: str
    """module:function below tools/acceptance. The function takes a Scale and yields figures."""
    title: str
    seconds: int = 120
    """The check fails if it takes longer."""


CHECKS = (
    Entry(
        "preflight", "environment:preflight", "driver, libraries, compiler, links, one-rank NCCL"
    ),
    Entry("training", "training:training", "bf16: updates, save, resume, save in the background"),
    Entry(
        "attention", "attention:attention", "each kernel for packed rows against plain attention"
    ),
    Entry(
        "decode", "decoding:decode", "time a token and host memory, with and without CUDA graphs"
    ),
    Entry("logprobs", "head:logprobs", "matmul_fp32 and log-probs against fp32 autograd"),
    Entry("rollout", "decoding:rollout", "log-probs of the rollout against those of training"),
    Entry("profile", "profiles:profile", "launches, gaps and MFU of decoding and of an update"),
    Entry("training-local", "training:without_engine", "training without TransformerEngine"),
    Entry("training-fp32", "training:in_fp32", "training in fp32"),
    Entry("determinism", "updates:determinism", "two identical updates, bit by bit"),
    Entry("recompute", "updates:recompute", "train.recompute full against none"),
)
NAMES = [entry.name for entry in CHECKS]
