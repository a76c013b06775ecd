"""Opens the data sets that the configuration of a run names: training and held-out prompts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_rpp.config.data import DataConfig
from megatron_rpp.data.chat import PromptFormat
from megatron_rpp.data.examples import Example, open_examples
from megatron_rpp.data.prompts import PromptFile, PromptSet, fitting_rows, split_held_out
from megatron_rpp.data.row_cache import Pass, cached, stamp
from megatron_rpp.data.sources import check_present
from megatron_rpp.lifecycle.config_error import ConfigError

ProgressBar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(title, total) -> a context that shows a bar; its value advances the bar. See console.Console."""
Names = TypeVar("Names", str, list[str])
"""The name of a file or source, or several."""


@dataclass(frozen=True)
class RowCheck:
    """A check of the content of a row, in addition to its form."""

    name: str
    """Identifies the check: the row cache uses it as part of the key."""
    problem: Callable[[Example], str | None]
    """What is wrong with a row, and the remedy; None if nothing is."""


ANY_ROW = RowCheck("none", lambda example: None)


@dataclass(frozen=True)
class Data:
    train: PromptSet
    held_out: PromptSet
    dropped: int
    """Number of prompts that were left out because they are too long."""


def open_data(
    data: DataConfig,
    form: PromptFormat,
    *,
    limit: int,
    seed: int,
    bar: ProgressBar,
    held_out_check: RowCheck = ANY_ROW,
    train_check: RowCheck = ANY_ROW,
    log: Callable[[str], None] = print,
) -> Data:
    """Opens and checks every source. The first run on a source reads all of it.

    Args:
        limit: most tokens of a prompt; data.max_prompt_tokens can lower it.
        log: called with a note if a cache cannot be used.

    Raises:
        ConfigError: no source is named, or one is missing or empty, or a row is malformed or too
            long.
    """
    limit = min(limit, data.max_prompt_tokens or limit)
    dropped = 0

    def open_file(source: str, check: RowCheck) -> PromptFile:
        nonlocal dropped
        examples = open_examples(
            source, data.prompt_key, data.label_key, cache_dir=data.cache_dir, log=log
        )
        drop = data.overlong_prompts == "drop"

        def find() -> Pass:
            with bar(f"reading {source}", len(examples)) as advance:
                return fitting_rows(
                    examples, form, limit=limit, drop=drop, check=check.problem, advance=advance
                )

        key = pass_key(data, examples.rows.identity, limit, check.name)
        found = cached(cache_dir(data), key, find, log=log)
        if not len(found.rows):
            raise ConfigError(
                f"data set {source} has no prompt of at most {limit} tokens: raise "
                "data.max_prompt_tokens or model.max_length"
            )
        dropped += len(examples) - len(found.rows)
        return PromptFile(examples, form, found.rows, (found.prompts, found.labels))

    train, held_out = open_parts(
        data, seed, train=lambda source: open_file(source, train_check),
        held_out=lambda source: open_file(source, held_out_check),
    )  # fmt: skip
    return Data(train, held_out, dropped)


def open_parts(
    data: DataConfig,
    seed: int,
    *,
    train: Callable[[str], PromptFile],
    held_out: Callable[[str], PromptFile],
) -> tuple[PromptSet, PromptSet]:
    """The training set and the held-out one, of data.eval or a part of the training sources.

    train, held_out: open a source. Raises ConfigError if no source is named.
    """
    held = None
    if data.eval or not data.eval_split:
        held = [held_out(given("data.eval", data.eval))]
    parts = [train(source) for source in given("data.train", data.sources)]
    if held is None:
        parts, held = split_held_out(parts, data.eval_split, seed)
    return PromptSet(parts, data.weights), PromptSet(held)


def check_sources(data: DataConfig) -> None:
    """Raises ConfigError if a data set is not named or not there; reads none of them."""
    named = list(given("data.train", data.sources))
    if data.eval or not data.eval_split:
        named.append(given("data.eval", data.eval))
    for source in named:
        check_present(source)


def given(setting: str, value: Names | None) -> Names:
    """The value of a setting that names files. Raises ConfigError if it is empty."""
    if not value or value == [""]:
        raise ConfigError(f"{setting} is empty: name a file with --{setting} or in the recipe")
    return value


def cache_dir(data: DataConfig) -> Path:
    """The directory of the row cache (row_cache.py)."""
    if data.cache_dir is not None:
        return Path(data.cache_dir)
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "megatron_rpp"


def pass_key(data: DataConfig, *more: str | int) -> list:
    """The key in the row cache of a pass over a data set: `more`, and all settings and files that
    decide whether a row is well formed and how many tokens it has."""
    template = [] if data.chat_template is None else stamp(data.chat_template)
    return [
        *more, data.prompt_key, data.label_key, data.apply_chat_template, data.system_prompt,
        data.overlong_prompts, stamp(data.tokenizer), template,
    ]  # fmt: skip
