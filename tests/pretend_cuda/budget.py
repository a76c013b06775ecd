"""How often the host may wait for the GPU in each hot loop, and why.

A wait costs the time that the GPU needs for all its queued work, and then the time in which the queue
fills again. So the loops are held to what they need.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from tests.pretend_cuda.watch import Sync


class Loop(NamedTuple):
    """The synchronisations of a stage at two lengths of its loop."""

    short: Counter[Sync]
    long: Counter[Sync]
    lengths: tuple[int, int]


class Allowance(NamedTuple):
    times: int
    reason: str


Budget = dict[str, Allowance]
"""By "file function"; whatever is not named may not wait."""

_BATCH = "megatron_rpp/rollout/batch.py Batch."
_LOGPROBS = "megatron_rpp/stages/logprobs.py "
_MINIBATCHES = "megatron_rpp/stages/minibatches.py "
_P2P = "megatron/core/pipeline_parallel/p2p_communication.py P2PCommunicator."
_AGREE = {
    "megatron_rpp/parallel/groups.py reduce_sums": Allowance(
        2, "the replicas agree on the number of micro-batches"
    )
}
_SKIP = {
    "megatron_rpp/stages/nonfinite.py skip_reason": Allowance(
        1, "the host decides whether to skip the step"
    )
}

PER_UNIT: dict[str, Budget] = {
    "token": {},
    "values": {},
    "log-probs": {},
    "critic": {},
    "update": {},
    "supervised": {},
}
"""Per decoded token of a batch, and per micro-batch, on one pipeline stage."""

_HOP = {f"{_P2P}_communicate": Allowance(1, "Megatron waits after batched sends and receives")}
PER_HOP: dict[str, Budget] = {"token": {}} | dict.fromkeys(
    ("values", "log-probs", "critic", "update", "supervised"), _HOP
)
"""In addition, per micro-batch, where pipeline stages send each other hidden states."""

PER_CALL: dict[str, Budget] = {
    "token": {
        f"{_BATCH}_synchronise": Allowance(1, "the host reads the tokens, to find the ends"),
        "megatron_rpp/parallel/groups.py gather_objects": Allowance(
            1, "context-parallel ranks exchange their responses"
        ),
        "megatron_rpp/parallel/groups.py reduce_sums": Allowance(
            2, "the replicas agree that none was told to stop"
        ),
    },
    **dict.fromkeys(
        ("values", "log-probs"),
        {
            f"{_LOGPROBS}response_column": Allowance(1, "the column goes to the host"),
            **_AGREE,
        },
    ),
    **dict.fromkeys(
        ("critic", "update"),
        {
            f"{_MINIBATCHES}Objective.reduce": Allowance(1, "the metrics go to the host"),
            **_SKIP,
            **_AGREE,
        },
    ),
    "supervised": {
        "megatron_rpp/sft.py _mean_loss": Allowance(1, "the loss goes to the host"),
        **_SKIP,
        **_AGREE,
    },
}
"""Once per rollout of a few tokens, pass over the buffer, or optimizer step; this project's lines only,
because Megatron's differ between its versions."""

PER_PIPELINE: dict[str, Budget] = {
    "token": {f"{_BATCH}_synchronise": Allowance(2, "two stages decode two batches")}
} | dict.fromkeys(("values", "log-probs", "critic", "update", "supervised"), {})
"""The same, in its place, on two pipeline stages."""


def excess(name: str, loop: Loop, *, pipelined: bool) -> list[str]:
    """What is over the budget of the loop `name`: one text for each line that waits too often."""
    per_unit = PER_UNIT[name] | (PER_HOP[name] if pipelined else {})
    units = loop.lengths[1] - loop.lengths[0]
    growth = _by_function(loop.long - loop.short)
    problems = _over(growth, per_unit, units, f"per unit of {name}")
    rates = {key: count // units for key, count in growth.items()}
    once = {
        key: count - rates.get(key, 0) * loop.lengths[0]
        for key, count in _by_function(loop.short).items()
        if key.startswith("megatron_rpp/")
    }
    per_call = PER_CALL[name] | (PER_PIPELINE[name] if pipelined else {})
    return problems + _over(once, per_call, 1, f"once per {name}")


def _by_function(syncs: Counter[Sync]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for sync, count in syncs.items():
        counts[f"{sync.site.file} {sync.site.function}"] += count
    return counts


def _over(counts: dict[str, int], budget: Budget, units: int, what: str) -> list[str]:
    problems = []
    for key, count in counts.items():
        allowed = budget[key].times if key in budget else 0
        if count > allowed * units:
            problems.append(f"{key} waits {count / units:g} times {what}, {allowed} are allowed")
    return problems
