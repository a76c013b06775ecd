"""The works of the benchmark `generate`. Imports nothing, because other environments read it too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Sampling at temperature 1 from a random fp32 model of Llama's shape with fp32 weights."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    sequences: int
    new_tokens: int
    """Most tokens of a response."""
    ends: int = 0
    """How many of the tokens end a response; 0 = every response has `new_tokens` tokens. The model's
    distribution is almost uniform, so lengths are geometric with mean vocabulary / ends."""
    prompt: int = 16
    """Tokens of each prompt."""
    samples: int = 4
    """Sequences that share a prompt."""
    ranks: int = 2
    """Ranks of ours, on two cores: 2 = replicas with one thread each; 1 = one rank with two threads, which
    reads the weights once for all sequences."""

    @property
    def end_tokens(self) -> list[int]:
        return list(range(self.vocabulary - max(self.ends, 1), self.vocabulary))

    def prompts(self) -> list[list[int]]:
        """One for each group of samples."""
        return [
            [(7919 * i + 104729 * j + 17) % (self.vocabulary - 8) for j in range(self.prompt)]
            for i in range(self.sequences // self.samples)
        ]


_SMALL = {"layers": 4, "hidden": 128, "heads": 4, "kv_heads": 4, "ffn": 344, "vocabulary": 512}
WORKS = {
    "reference": Work(**_SMALL, sequences=256, new_tokens=64),
    "smollm2": Work(
        layers=30, hidden=576, heads=9, kv_heads=3, ffn=1536, vocabulary=49152, sequences=32,
        new_tokens=64, ranks=1,
    ),
    "long-tail": Work(**_SMALL, sequences=1024, new_tokens=512, ends=8),
}  # fmt: skip
"""reference: of the other benchmarks. smollm2: SmolLM2-135M's shape. long-tail: lengths are geometric
with mean 64, at most 512."""
