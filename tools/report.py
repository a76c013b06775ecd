"""Reports the results of a finished run: a table, answers before and after, curves, directories.

python tools/report.py --config FILE [--section.key value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from plot import draw, rows_of
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_rpp.config import Config, cli
from megatron_rpp.lifecycle.config_error import ConfigError


def mean(rows: list[dict], tag: str) -> float | None:
    values = [row[tag] for row in rows if tag in row]
    return sum(values) / len(values) if values else None


def minutes(rows: list[dict]) -> float:
    return sum(row["time/step"] + row.get("time/checkpoint", 0.0) for row in rows) / 60


def summary(config: Config) -> Table:
    """Accuracy and reward before and after, KL, speed and time of the RL run."""
    log_dir = Path(config.logging.dir)
    rows, evaluations = rows_of(log_dir / "metrics.jsonl"), rows_of(log_dir / "evaluations.jsonl")
    first, last, tail = evaluations[0], evaluations[-1], rows[-5:]
    table = Table("", "before", "after", title=f"{config.algorithm.name}, {rows[-1]['step']} steps")
    table.add_row("held-out accuracy", f"{first['accuracy']:.1%}", f"{last['accuracy']:.1%}")
    table.add_row("held-out reward", f"{first['reward']:.3f}", f"{last['reward']:.3f}")
    sampled = f"{mean(rows[:1], 'reward/mean'):.3f}", f"{mean(tail, 'reward/mean'):.3f}"
    table.add_row("reward of rollouts", *sampled)
    kl = mean(tail, "kl/k1")
    table.add_row("KL from the reference", "0", "not measured" if kl is None else f"{kl:.3f}")
    table.add_row("tokens a second", "", f"{mean(rows, 'throughput/tokens_per_second'):,.0f}")
    table.add_row("minutes", "", f"{minutes(rows):.1f}")
    return table


def answers(config: Config) -> Table:
    """The same held-out prompts, answered before and after."""
    evaluations = rows_of(Path(config.logging.dir) / "evaluations.jsonl")
    table = Table("prompt", "label", "before", "after", title="greedy answers to held-out prompts")
    for old, new in zip(evaluations[0]["samples"], evaluations[-1]["samples"]):
        cells = old["prompt"], str(old["label"]), old["response"], new["response"]
        table.add_row(*map(escape, cells))  # a model may write what reads as markup
    return table


def main() -> None:
    config, console = cli.parse().config, Console(highlight=False)
    log_dir = Path(config.logging.dir)
    try:
        tables = summary(config), answers(config)
        draw([log_dir], log_dir / "curves.png")
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for table in tables:
        console.print(table)
    for name, value in {
        "curves": log_dir / "curves.png",
        "TensorBoard": f"{log_dir}   (open with: .venv/bin/tensorboard --logdir {log_dir})",
        "checkpoint": config.checkpoint.dir,
    }.items():
        console.print(f"{name + ':':<12} {value}", soft_wrap=True)


if __name__ == "__main__":
    main()
