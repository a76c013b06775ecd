"""A small but whole run for tests: a task of digit sums, its tokenizer, and a recipe as overrides.

Everything is real (reasoning-gym rows, a SentencePiece model, Megatron, gloo); only the sizes are
small.
"""

from __future__ import annotations

from pathlib import Path

from megatron_rpp.config import cli
from megatron_rpp.data.tasks import jsonl, make_task
from megatron_rpp.data.tokenizer import train_sentencepiece

PARAMS = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}


def make_data(folder: Path) -> None:
    """Writes train.jsonl, eval.jsonl and tokenizer.model into `folder`."""
    train, held_out = make_task(
        "chain_sum", PARAMS, train_size=200, eval_size=16, train_seed=1, eval_seed=2
    )
    (folder / "train.jsonl").write_bytes(jsonl(train))
    (folder / "eval.jsonl").write_bytes(jsonl(held_out))
    texts = [text for row in train for text in (row["prompt"], row["label"])]
    train_sentencepiece(texts, folder / "tokenizer.model", 64)


def arguments(data: Path, run: Path, **settings) -> list[str]:
    """Command line of a run in `run` over the data of `make_data`; settings use __ for dots, None
    leaves one at its default."""
    values = {
        "data__train": data / "train.jsonl",
        "data__eval": data / "eval.jsonl",
        "data__tokenizer": data / "tokenizer.model",
        "checkpoint__dir": run / "checkpoints",
        "logging__dir": run / "logs",
        "sft__dir": run / "sft",
        "model__layers": 4,
        "model__hidden": 32,
        "model__ffn_hidden": 64,
        "model__heads": 4,
        "model__kv_heads": 2,
        "model__max_length": 32,
        "model__init_std": 0.2,
        "rollout__prompts_per_step": 8,
        "rollout__samples_per_prompt": 4,
        "rollout__max_new_tokens": 6,
        "train__steps": 2,
        "train__minibatches": 2,
        "train__epochs": 2,
        "train__max_tokens_per_microbatch": 128,
        "optimizer__lr": 1e-3,
        "evaluation__interval": 0,
        "algorithm__kl_coef": 0.05,
    } | settings
    given = {name: value for name, value in values.items() if value is not None}
    return [f"--{name.replace('__', '.')}={value}" for name, value in given.items()]


def config_of(data: Path, run: Path, **settings):
    return cli.parse(arguments(data, run, **settings)).config
