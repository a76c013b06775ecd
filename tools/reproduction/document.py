"""Tables of the results, written into a document between its markers.

A marker is a line ``<!-- results: NAME -->``; what follows it up to ``<!-- end -->`` is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_rpp.lifecycle.config_error import ConfigError
from reproduction.drawing import PANELS
from reproduction.protocol import ALGORITHMS, BASELINE, TARGET_ACCURACY
from reproduction.results import Row, final_accuracy
from reproduction.statistics import Estimate, estimate, paired_difference

Metric = Callable[[Row], float | None]
"""From the row of a run; None if the run has no such number."""


def last(quantity: str) -> Metric:
    """The value at the last point of the curve."""
    return lambda row: row["curve"][-1][quantity]


def per_nat(quantity: str) -> Metric:
    """How much a quantity has grown since the start, per nat of KL at the end; None without KL."""

    def ratio(row: Row) -> float | None:
        first, end = row["curve"][0], row["curve"][-1]
        return (end[quantity] - first[quantity]) / end["kl"] if end["kl"] > 0 else None

    return ratio


def phase(name: str) -> Metric:
    """Median seconds of a phase; 0 if the algorithm has no such phase."""
    return lambda row: row["seconds"].get(name, 0.0)


def to_target(name: str) -> Metric:
    """Steps or seconds to TARGET_ACCURACY; None if it was not reached."""
    return lambda row: row["target"] and row["target"][name]


_TARGET = f"to {TARGET_ACCURACY:.0%}"
_ACCURACY = {"held-out accuracy": final_accuracy}
_MODEL = {
    "held-out reward by the model": last("held_out_reward"),
    "KL at the end, nats per response": last("kl"),
    "accuracy gained per nat": per_nat("accuracy"),
    "reward gained per nat": per_nat("held_out_reward"),
    "length at the end, tokens": last("length"),
}
METRICS: dict[str, dict[str, Metric]] = {
    "speed": {
        "seconds per step": phase("step"),
        **{f"{name}, seconds": phase(name)
           for name in ("rollout", "reward", "values", "score", "critic", "update")},
        "peak memory, GB": lambda row: row["peak_memory_gb"],
        f"steps {_TARGET}": to_target("steps"),
        f"seconds {_TARGET}": to_target("seconds"),
    },
    "math": _ACCURACY | {
        "KL at the end, nats per response": last("kl"),
        "accuracy gained per nat": per_nat("accuracy"),
    },
    "math-model": _ACCURACY | _MODEL,
    "length": _ACCURACY | _MODEL,
}  # fmt: skip
"""The rows of each experiment's table."""


def comparison(rows: list[Row], metrics: dict[str, Metric]) -> str:
    """A table: per metric and algorithm the mean over seeds, and the difference from BASELINE."""
    present = [name for name in ALGORITHMS if any(row["algorithm"] == name for row in rows)]
    lines = []
    for title, metric in metrics.items():
        values = {name: by_seed(rows, name, metric) for name in present}
        for name in present:
            runs = sum(row["algorithm"] == name for row in rows)
            lines.append([title, f"`{name}`", *_cells(name, values, runs=runs)])
            title = ""
    head = ["", "algorithm", "mean, 95% interval", f"difference from `{BASELINE}`", "verdict"]
    return table(head, lines)


def by_seed(rows: list[Row], algorithm: str, metric: Metric) -> dict[int, float]:
    """The metric of an algorithm's runs that have it."""
    found = {row["seed"]: metric(row) for row in rows if row["algorithm"] == algorithm}
    return {seed: value for seed, value in found.items() if value is not None}


def _cells(name: str, values: dict[str, dict[int, float]], *, runs: int) -> list[str]:
    """Mean, difference and verdict of an algorithm. A mean over a part of the seeds would flatter: if
    a run lacks the number, only how many have it is said."""
    own, others = values[name], values.get(BASELINE, {})
    if len(own) < runs:
        return [f"in {len(own)} of {runs} runs", "", ""]
    mean = shown(estimate(list(own.values())))
    difference = paired_difference(own, others)
    if name == BASELINE or difference is None or len(others) < runs:
        return [mean, "", ""]
    if difference.margin is None:
        return [mean, shown(difference, signed=True), "one seed"]
    verdict = "differs" if difference.leaves_out_zero else "no difference shown"
    return [mean, shown(difference, signed=True), verdict]


def shown(value: Estimate, *, signed: bool = False) -> str:
    """A mean with its interval, as text."""
    mean = f"{value.mean:+.4g}" if signed else f"{value.mean:.4g}"
    return mean if value.margin is None else f"{mean} ± {value.margin:.2g}"


def section(name: str, rows: list[Row]) -> str:
    """The text of an experiment: picture, table, and where the rows come from."""
    tables = {"choose": rates_table, "models": models_table}
    body = tables[name](rows) if name in tables else comparison(rows, METRICS[name])
    picture = [f"![{name}](reproduction/{name}.png)"] * (name in PANELS)
    sentence = [savings(rows)] if name == "speed" else []
    return "\n\n".join([*picture, body, *sentence, provenance(rows)])


def savings(rows: list[Row]) -> str:
    """How much of PPO's seconds BASELINE saves; the paper has 1 - 42 / 60 = 30%."""
    found = []
    for title, metric in (("per step", phase("step")), (_TARGET, to_target("seconds"))):
        ours, theirs = (by_seed(rows, name, metric) for name in (BASELINE, "ppo"))
        shares = [1 - ours[seed] / theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
        if len(shares) == len(rows) / 2:
            found.append(f"{shown(estimate([100 * share for share in shares]))}% {title}")
    return f"Seconds that `{BASELINE}` saves against `ppo`: {', '.join(found)}. The paper: 30%."


def rates_table(rows: list[Row]) -> str:
    """The final accuracy of each algorithm at each learning rate."""
    rates = sorted({row["learning_rate"] for row in rows})
    lines = []
    for name in (name for name in ALGORITHMS if any(row["algorithm"] == name for row in rows)):
        found = {rate: [final_accuracy(row) for row in rows
                        if (row["algorithm"], row["learning_rate"]) == (name, rate)]
                 for rate in rates}  # fmt: skip
        best = max(estimate(values).mean for values in found.values() if values)
        cells = [_marked(values, best) for values in found.values()]
        lines.append([f"`{name}`", *cells])
    return table(["algorithm", *(f"{rate:g}" for rate in rates)], lines)


def _marked(values: list[float], best: float) -> str:
    if not values:
        return ""
    mean = estimate(values).mean
    return f"**{mean:.3f}**" if mean == best else f"{mean:.3f}"


def models_table(rows: list[Row]) -> str:
    """What the warm starts and the reward models reach on held-out rows."""
    head = ["model", "steps", "held-out accuracy"]
    return table(
        head, [[row["model"], str(row["steps"]), f"{row['accuracy']:.3f}"] for row in rows]
    )


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """A table in Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def provenance(rows: list[Row]) -> str:
    """On which commits the rows were made."""
    commits = sorted({commit for row in rows for commit in row["commits"]})
    return f"{len(rows)} rows, made on {', '.join(f'`{commit}`' for commit in commits)}."


def fill(document: str, sections: dict[str, str]) -> str:
    """The document with new text between its markers. Raises ConfigError if a marker is missing."""
    for name, text in sections.items():
        marker = f"<!-- results: {name} -->"
        pattern = re.compile(f"{re.escape(marker)}\n.*?<!-- end -->", re.DOTALL)
        new = f"{marker}\n\n{text}\n\n<!-- end -->"
        document, count = pattern.subn(lambda _, new=new: new, document)
        if count != 1:
            raise ConfigError(f"the document has {count} places with {marker}: it must have one")
    return document


def write_document(source: Path, out: Path, sections: dict[str, str]) -> None:
    """Fills the document `source` and writes it to `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(fill(source.read_text(), sections))
