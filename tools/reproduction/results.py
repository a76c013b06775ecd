"""Rows of results: one per run, from its logs.

A curve has a point per evaluation. Its `accuracy` and `held_out_reward` are of the held-out prompts
after that many steps. Its `reward`, `right` (share of rollouts that the rule calls right), `kl` (nats per
response) and `length` (tokens) are means over the rollouts since the point before.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from plot import rows_of

from megatron_rpp.lifecycle.atomic_files import write_atomic
from megatron_rpp.lifecycle.config_error import ConfigError
from reproduction.protocol import ALGORITHMS, TARGET_ACCURACY, Experiment, Job

Row = dict[str, Any]
ROLLOUTS = ("reward", "kl", "length", "right")
"""The quantities of a curve that come from rollouts."""


def run_row(experiment: Experiment, algorithm: str, *, job: Job, digest: str, folder: Path) -> Row:
    """The row of a finished run in `folder`."""
    steps, evaluations = (
        rows_of(folder / "logs" / f"{name}.jsonl") for name in ("metrics", "evaluations")
    )
    right = right_tag(experiment)
    return {
        "experiment": experiment.name,
        "algorithm": algorithm,
        "seed": job.settings["seed"],
        "learning_rate": job.settings["optimizer.lr"],
        "settings": digest,
        "commits": json.loads((folder / "commits.json").read_text()),
        "steps": steps[-1]["step"],
        "seconds": median_seconds(steps),
        "peak_memory_gb": rounded(max(row["memory/peak_gb"] for row in steps)),
        "target": time_to(TARGET_ACCURACY, evaluations, steps),
        "curve": curve(evaluations, steps, right=right),
    }


def right_tag(experiment: Experiment) -> str:
    """The metric that is the share of right rollouts."""
    if not experiment.learned_reward:
        return "reward/mean"
    return f"reward/{experiment.task.rule}"


def median_seconds(steps: list[Row]) -> dict[str, float]:
    """Seconds of each phase and of the whole step: medians over the steps, without the first, which
    warms up."""
    rows = steps[1:] or steps
    tags = [tag for tag in rows[0] if tag.startswith("time/") and tag != "time/checkpoint"]
    return {
        tag.removeprefix("time/"): rounded(statistics.median(row[tag] for row in rows))
        for tag in tags
    }


def time_to(accuracy: float, evaluations: list[Row], steps: list[Row]) -> Row | None:
    """Steps to the first evaluation with at least this accuracy, and seconds of these steps; None if
    there is none."""
    for row in evaluations:
        if row["accuracy"] >= accuracy:
            seconds = sum(step["time/step"] for step in steps if step["step"] <= row["step"])
            return {"steps": row["step"], "seconds": rounded(seconds)}
    return None


def curve(evaluations: list[Row], steps: list[Row], *, right: str) -> list[Row]:
    """The points of a run."""
    points: list[Row] = []
    for row in evaluations:
        last = points[-1]["step"] if points else -1
        # Before training there are no rollouts yet: those of the first step are of the same policy.
        since = [step for step in steps if last < step["step"] <= row["step"]] or steps[:1]
        points.append(
            {"step": row["step"], "accuracy": rounded(row["accuracy"]),
             "held_out_reward": rounded(row["reward"])}
            | {name: rounded(value) for name, value in rollout_means(since, right).items()}
        )  # fmt: skip
    return points


def rollout_means(steps: list[Row], right: str) -> dict[str, float]:
    """The means of ROLLOUTS over some steps."""

    def values(step: Row) -> tuple[float, ...]:
        length = step["response/length_mean"]
        return step["reward/mean"], step["kl/k1"] * length, length, step[right]

    columns = zip(*(values(step) for step in steps))
    return dict(zip(ROLLOUTS, (statistics.fmean(column) for column in columns)))


def rounded(value: float) -> float:
    """Five significant digits, which is more than the runs can tell apart."""
    return float(f"{value:.5g}")


def final_accuracy(row: Row) -> float:
    """Mean held-out accuracy of the last two evaluations of a run."""
    return statistics.fmean(point["accuracy"] for point in row["curve"][-2:])


def best_rate(rows: Iterable[Row]) -> float:
    """The learning rate with the highest final accuracy, as a mean over seeds; of equal ones the
    lowest."""
    by_rate: dict[float, list[float]] = {}
    for row in rows:
        by_rate.setdefault(row["learning_rate"], []).append(final_accuracy(row))
    return max(sorted(by_rate), key=lambda rate: statistics.fmean(by_rate[rate]))


def evaluation_of(folder: Path, name: str) -> Row:
    """What a warm start or a reward model in `folder` reached on held-out rows."""
    rows = rows_of(folder / "metrics.jsonl")
    evaluated = [row for row in rows if "eval/accuracy" in row]
    return {
        "model": name,
        "steps": rows[-1]["step"],
        "accuracy": rounded(evaluated[-1]["eval/accuracy"]),
        "commits": json.loads((folder / "commits.json").read_text()),
    }


def in_order(rows: Iterable[Row]) -> list[Row]:
    """The rows of an experiment by seed, algorithm and learning rate."""
    names = list(ALGORITHMS)
    return sorted(
        rows, key=lambda row: (row["seed"], names.index(row["algorithm"]), row["learning_rate"])
    )


def write_rows(path: Path, rows: list[Row]) -> None:
    """Writes a JSONL file."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file; none if it is not there."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): make it again") from error
