"""Small data sets for a reward model: texts of letters, of which some are good and some are bad.

The prompt says nothing about the reward, and each letter is as frequent in either response as chance
has it, so a model that has not learned the letters ranks half of the pairs right.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from megatron_rpp.config import cli
from megatron_rpp.data.tokenizer import train_sentencepiece

GOOD, BAD = "aceg", "bdfh"


def goodness(text: str) -> int:
    """Good letters - bad letters."""
    return sum(text.count(c) for c in GOOD) - sum(text.count(c) for c in BAD)


def _letters(draw: random.Random) -> str:
    return "".join(draw.choices(GOOD + BAD, k=draw.randint(3, 9)))


def pairs(count: int, seed: int) -> list[dict]:
    """Rows with a prompt, two responses that differ in goodness by 2 or more, and, in every third row,
    a margin."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        better, worse = sorted((_letters(draw), _letters(draw)), key=goodness, reverse=True)
        if goodness(better) >= goodness(worse) + 2:
            row = {"prompt": "xyz"[len(found) % 3] * draw.randint(1, 4)}
            row |= {"chosen": better, "rejected": worse}
            found.append(row if len(found) % 3 else row | {"margin": 0.25})
    return found


def graded(count: int, seed: int) -> list[dict]:
    """Rows with a prompt, a response and its goodness as the score."""
    draw = random.Random(seed)
    texts = [_letters(draw) for _ in range(count)]
    return [{"prompt": "xyz", "response": text, "score": goodness(text) / 4} for text in texts]


def make_preferences(folder: Path) -> None:
    """Writes {train,eval}.jsonl with pairs, graded_{train,eval}.jsonl and tokenizer.model."""
    for name, count, seed in (("train", 240, 1), ("eval", 61, 2)):
        for prefix, rows in (("", pairs(count, seed)), ("graded_", graded(count, seed))):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{prefix}{name}.jsonl").write_text(lines)
    letters = [c * 2 + d for c in "xyz" + GOOD + BAD for d in "xyz" + GOOD + BAD]
    train_sentencepiece(letters, folder / "tokenizer.model", 16)


def arguments(data: Path, run: Path, **settings) -> list[str]:
    """Command line of a run over the data of `make_preferences`; settings use __ for dots."""
    values = {
        "data__train": data / "train.jsonl",
        "data__eval": data / "eval.jsonl",
        "data__tokenizer": data / "tokenizer.model",
        "data__cache_dir": data / "cache",
        "reward_model__dir": run,
        "reward_model__steps": 12,
        "reward_model__batch_size": 13,
        "reward_model__eval_interval": 6,
        "reward_model__optimizer__lr": 1e-3,
        # Adam turns fp32 rounding into steps where a gradient is nearly zero; this epsilon damps it.
        "reward_model__optimizer__eps": 1e-3,
        "model__layers": 4,
        "model__hidden": 32,
        "model__ffn_hidden": 64,
        "model__heads": 4,
        "model__kv_heads": 2,
        "model__max_length": 24,
        "model__init_std": 0.1,
        "rollout__max_new_tokens": 8,
        "train__max_tokens_per_microbatch": 96,
    } | settings
    return [f"--{name.replace('__', '.')}={value}" for name, value in values.items()]


def config_of(data: Path, run: Path, **settings):
    return cli.parse(arguments(data, run, **settings), "reward_model").config
