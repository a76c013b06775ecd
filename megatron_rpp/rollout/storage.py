"""Saves and loads the rollouts of a step: one file per replica, which any layout can read.

The files leave out the columns that a stage computes from others (advantages, returns,
rollout_weights) and the prompts, which follow from the data set and the step.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_rpp.data.prompts import Prompt
from megatron_rpp.rewards import Scores
from megatron_rpp.rollout.buffer import RolloutBuffer

PER_SAMPLE = ("prompt_lengths", "sample_ids", "group_ids", "truncated", "scores")
PER_RESPONSE_TOKEN = ("mask", "rollout_logprobs", "old_logprobs", "ref_logprobs", "values")
NOT_STORED = ("prompts", "offsets", "advantages", "returns", "rollout_weights")
assert {field.name for field in fields(RolloutBuffer)} == {
    "tokens", *PER_SAMPLE, *PER_RESPONSE_TOKEN, *NOT_STORED
}  # fmt: skip
_OLD_NAMES = {"behaviour_logprobs": "rollout_logprobs"}
"""Names of columns in files of earlier versions, and their names now."""
_PART, _TOTAL = "reward/", "reward_total"
_COUNTS = ("timeouts", "cut")
"""Numbers of Scores, each of which stands with the first sample of its file."""


def save(buffer: RolloutBuffer, scores: Scores | None, path: Path) -> None:
    """Writes the columns that the buffer has so far, and the scores if there are any."""
    columns = {"tokens": buffer.tokens, "lengths": buffer.lengths}
    for name in (*PER_SAMPLE, *PER_RESPONSE_TOKEN):
        if getattr(buffer, name) is not None:
            columns[name] = getattr(buffer, name)
    if scores is not None:
        by_name = {_PART + name: values for name, values in scores.parts.items()}
        for name, values in ({_TOTAL: scores.total} | by_name).items():
            columns[name] = torch.tensor(values, dtype=torch.float64)
        for name in _COUNTS:
            column = torch.zeros(len(buffer), dtype=torch.int64)
            column[:1] = getattr(scores, name)
            columns[f"reward_{name}"] = column
    try:
        save_file({name: column.contiguous() for name, column in columns.items()}, path)
    except SafetensorError as error:  # for example, a full disk
        raise OSError(f"{path}: {error}") from error


def _chosen(path: Path, first: int, end: int) -> dict[str, torch.Tensor]:
    """The columns of a file, restricted to the samples first .. end-1 of the step."""
    with safe_open(path, framework="pt") as file:
        columns = {_OLD_NAMES.get(name, name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    inside = (columns["sample_ids"] >= first) & (columns["sample_ids"] < end)
    response_lengths = columns["lengths"] - columns["prompt_lengths"]
    by_kind = {
        "tokens": inside.repeat_interleave(columns["lengths"]),
        **dict.fromkeys(PER_RESPONSE_TOKEN, inside.repeat_interleave(response_lengths)),
    }
    return {name: column[by_kind.get(name, inside)] for name, column in columns.items()}


def load(
    paths: list[Path], samples: range, prompts: list[Prompt]
) -> tuple[RolloutBuffer, Scores | None]:
    """Loads the buffer and the scores of `samples`, contiguous numbers in the step.

    Args:
        paths: the files of all replicas, in order.
        prompts: the prompts of those samples, in order.
    """
    found = [_chosen(path, samples.start, samples.stop) for path in paths]
    columns = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    assert columns["sample_ids"].tolist() == list(samples), "the files do not hold these samples"
    scores = None
    if _TOTAL in columns:
        parts = {
            name.removeprefix(_PART): columns.pop(name).tolist()
            for name in list(columns)
            if name.startswith(_PART)
        }
        none = torch.zeros(1)  # earlier versions had no reward models
        counts = {name: int(columns.pop(f"reward_{name}", none).sum()) for name in _COUNTS}
        scores = Scores(columns.pop(_TOTAL).tolist(), parts, **counts)
    offsets = torch.nn.functional.pad(columns.pop("lengths").cumsum(0), (1, 0))
    return RolloutBuffer(prompts=prompts, offsets=offsets, **columns), scores
