"""The reward of the benchmarks: cheap, and different for every response."""

from __future__ import annotations

import statistics


def even_share(  # noqa: PLR0917 (the signature of a reward function)
    prompts, responses, labels, metadata
) -> list[float]:
    """The share of even token ids in each response."""
    return [
        statistics.mean(int(word) % 2 == 0 for word in response.split()) for response in responses
    ]
