"""How large the checks of tools/gpu_acceptance.py are, and the speed that they are held to.

FULL is for one GPU with 80 GB or more, SMALL for a CPU. Thresholds of precision do not depend on the
scale; they stand in the checks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_rpp.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What the checks of speed are held to; None = the figure is only reported.

    The thresholds are estimates for an H100, with room: no GPU has confirmed them yet.
    """

    decode_ms: float | None = None
    """A decoding step of the four layers."""
    graph_gain: float | None = None
    """Least time of a token without CUDA graphs over the time with them."""
    paged_gain: float | None = None
    """Least time of a token with copies of the cache's blocks over the time with the paged kernel."""
    launches: float | None = None
    """Kernels a decoding step."""
    decode_idle: float | None = None
    """Share of the time in which the GPU waits while decoding."""
    update_idle: float | None = None
    """Share of the time in which the GPU waits during an update."""
    mfu: float | None = None
    """Least model FLOPs utilisation of an update; estimated: 0.30 to 0.37 with 28 layers."""
    memory_share: float | None = None
    """Peak memory of our log-probs over that of fp32 autograd."""
    recompute_share: float | None = None
    """Peak memory of forward and backward with train.recompute full over that with none."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    name: str
    pair: ModelConfig
    """Two layers, to train and save."""
    wide: ModelConfig
    """The widths of a 7B model, with few layers."""
    row: tuple[int, ...]
    """Tokens of the sequences of a packed row. The first half of each is its prompt."""
    head_rows: int
    """Rows of the output projection."""
    batch: int
    """Sequences that are decoded at once."""
    prompt: int
    """Tokens of a prompt for decoding."""
    decode_tokens: int
    profiled_tokens: int
    speed: Speed = field(default_factory=Speed)


FULL = Scale(
    name="full",
    pair=ModelConfig(
        layers=2, hidden=1024, ffn_hidden=2816, heads=8, kv_heads=2, vocab_size=32768,
        max_length=4096, dtype="bf16",
    ),
    wide=ModelConfig(
        layers=4, hidden=3584, ffn_hidden=18944, heads=28, kv_heads=4, vocab_size=152064,
        max_length=4096, rope_theta=1e6, qkv_bias=True, dtype="bf16",
    ),
    row=(1024, 300, 2048, 724),
    head_rows=4096,
    batch=64,
    prompt=64,
    decode_tokens=200,
    profiled_tokens=20,
    speed=Speed(
        decode_ms=10.0, graph_gain=1.0, paged_gain=1.0, launches=400.0, decode_idle=0.85, update_idle=0.3, mfu=0.25,
        memory_share=0.5, recompute_share=0.9,
    ),
)  # fmt: skip
SMALL = Scale(
    name="small",
    pair=ModelConfig(
        layers=2, hidden=64, ffn_hidden=128, heads=4, kv_heads=2, vocab_size=640, max_length=128,
        dtype="bf16",
    ),
    wide=ModelConfig(
        layers=2, hidden=64, ffn_hidden=128, heads=4, kv_heads=2, vocab_size=640, max_length=128,
        qkv_bias=True, dtype="bf16",
    ),
    row=(32, 10, 64, 22),
    head_rows=48,
    batch=4,
    prompt=8,
    decode_tokens=16,
    profiled_tokens=8,
)  # fmt: skip
