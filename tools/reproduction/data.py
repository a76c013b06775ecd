"""Data of the experiment length: sums whose answers may show their steps.

A supervised answer shows the first s steps of its sum, with s uniform from none to all, and then the
result: ``4+3=7;7-2=5;5``. Each shown answer ends with a check in CHECKS of the cases: its last step once
more, or twice. So the length of an answer says nothing about the prompt, and a trained policy may
choose it.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from megatron_rpp.config import Config
from megatron_rpp.data.tasks import Row, jsonl, make_task
from megatron_rpp.data.tokenizer import train_sentencepiece
from megatron_rpp.lifecycle.atomic_files import write_atomic

CHECKS = {0: 0.6, 1: 0.25, 2: 0.15}
"""How often the last shown step is repeated: probability of each number of repetitions."""


def steps_of(expression: str) -> list[str]:
    """The steps from left to right: ``4 + 3 - 2`` -> ``["4+3=7", "7-2=5"]``."""
    first, *rest = re.findall(r"^-?[0-9]+|[-+] [0-9]+", expression)
    total, steps = int(first), []
    for term in rest:
        sign, number = term.split()
        result = total + int(sign + number)
        steps.append(f"{total}{sign}{number}={result}")
        total = result
    return steps


def worked_answer(expression: str, rng: random.Random) -> str:
    """A supervised answer to a sum."""
    steps = steps_of(expression)
    shown = steps[: rng.randint(0, len(steps))]
    (repeats,) = rng.choices(list(CHECKS), weights=list(CHECKS.values()))
    result = steps[-1].partition("=")[2]
    return ";".join([*shown, *shown[-1:] * repeats, result])


def supervised_rows(rows: list[Row], seed: int) -> list[Row]:
    """The rows with worked answers as labels."""
    rng = random.Random(seed)
    return [
        row | {"label": worked_answer(row["metadata"]["entry"]["expression"], rng)} for row in rows
    ]


def make_steps_data(config: Config, supervised: Path) -> None:
    """Writes data.train and data.eval, whose labels are results, the same training rows with worked
    answers to `supervised`, and the tokenizer."""
    task = config.task
    train, held_out = make_task(
        task.name, task.params, train_size=task.train_size, eval_size=task.eval_size,
        train_seed=task.train_seed, eval_seed=task.eval_seed,
    )  # fmt: skip
    worked = supervised_rows(train, task.train_seed)
    assert isinstance(config.data.train, str)
    for path, rows in (
        (Path(config.data.train), train), (Path(config.data.eval), held_out), (supervised, worked)
    ):  # fmt: skip
        write_atomic(path, jsonl(rows))
    texts = [row[key] for row in worked + held_out for key in ("prompt", "label")]
    train_sentencepiece(texts, Path(config.data.tokenizer), task.vocab_size)
