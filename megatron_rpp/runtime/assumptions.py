"""What a plan assumes: efficiencies of the machine, and the lengths of prompts and responses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_rpp.config import Config
from megatron_rpp.config.validation import check_range


def _assumed(default: float | None, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the arithmetic cannot know. The efficiencies reproduce Megatron-LM's published
    utilisation of H100s (tests/runtime/test_step_time.py)."""

    efficiency: float = _assumed(
        0.64, "share of the peak FLOP/s that matrix products of a very wide model reach"
    )
    half_width: float = _assumed(
        1200.0, "hidden size h at which they reach half of it: efficiency x h / (h + half_width)"
    )
    memory_efficiency: float = _assumed(
        0.7, "share of the memory bandwidth that element-wise operations and decoding reach"
    )
    link_efficiency: float = _assumed(0.75, "share of the speed of links that collectives reach")
    hidden_share: float = _assumed(
        0.0, "share of tensor- and context-parallel communication that computation hides"
    )
    row_fill: float = _assumed(0.9, "share of the tokens of micro-batches that are not padding")
    host_ms_per_layer: float = _assumed(
        0.1, "ms of the host for one layer of a decoded token, with CUDA graphs"
    )
    host_bandwidth: float = _assumed(
        50e9, "bytes/s of host memory for each rank, if the optimizer is offloaded"
    )
    mean_prompt: float | None = _assumed(
        None, "tokens of a mean prompt; default: half of model.max_length - rollout.max_new_tokens"
    )
    mean_response: float | None = _assumed(
        None,
        "tokens of a mean response; default: half of rollout.max_new_tokens, the longest response",
    )

    def __post_init__(self) -> None:
        shares = "efficiency memory_efficiency link_efficiency row_fill"
        check_range("plan", self, shares, above=0, at_most=1)
        check_range("plan", self, "hidden_share", at_least=0, at_most=1)
        check_range("plan", self, "half_width host_ms_per_layer mean_prompt", at_least=0)
        check_range("plan", self, "host_bandwidth mean_response", above=0)


@dataclass(frozen=True)
class Work:
    """Tokens of one step, means over its samples."""

    prompt: float
    response: float

    @property
    def length(self) -> float:
        return self.prompt + self.response

    @classmethod
    def of(cls, config: Config, assumed: Assumptions) -> Work:
        longest = config.rollout.max_new_tokens
        room = config.model.max_length - longest
        prompt = room / 2 if assumed.mean_prompt is None else assumed.mean_prompt
        response = longest / 2 if assumed.mean_response is None else assumed.mean_response
        return cls(prompt, response)
