"""The data sets of a reward model, tokenized on access.

A response to a text follows it as in supervised fine-tuning and in rollouts: prompt and response are
encoded separately, and one end-of-sequence token ends the response. A response in a conversation is
encoded with it, as the chat template ends it. The reward is read at the last token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_rpp.config.data import DataConfig
from megatron_rpp.config.reward_model import RewardModelConfig
from megatron_rpp.data.chat import PromptFormat
from megatron_rpp.data.loading import ProgressBar, cache_dir, open_parts, pass_key
from megatron_rpp.data.pairs import Content, RatedExample, RatedExamples, Side
from megatron_rpp.data.prompts import CHUNK, Prompt, PromptFile, PromptSet, digest_of
from megatron_rpp.data.row_cache import Pass, cached
from megatron_rpp.data.sources import open_rows
from megatron_rpp.lifecycle.config_error import ConfigError, reading


@dataclass(frozen=True)
class RatedPrompt(Prompt):
    """A row and its token ids. `tokens`: the sequence of the first side."""

    example: RatedExample
    sequences: tuple[tuple[int, ...], ...] = ()
    """The whole sequence of each side, to its end-of-sequence."""


@dataclass(frozen=True)
class RatedFile(PromptFile):
    """The rows of one source."""

    examples: RatedExamples

    def __getitem__(self, index: int) -> RatedPrompt:  # type: ignore[override]  # takes no slices
        example = self.examples[int(self.rows[index])]
        assert isinstance(example, RatedExample)
        return _tokenized(example, self.form)


class RatedData(NamedTuple):
    train: PromptSet
    held_out: PromptSet
    content: Content
    have_prompts: bool
    """Whether the rows of the first training source have prompts in a field of their own."""
    dropped: int
    """Number of rows that were left out because they are too long."""


def open_rated(
    data: DataConfig,
    keys: RewardModelConfig,
    form: PromptFormat,
    *,
    context: int,
    seed: int,
    bar: ProgressBar,
    log: Callable[[str], None] = print,
) -> RatedData:
    """Opens and checks every source. The first run on a source reads all of it.

    data.max_prompt_tokens does not apply: the limit is on prompt and response together.

    Args:
        context: most tokens of a sequence; data.overlong_prompts says what happens to longer ones.
        log: called with a note if a cache cannot be used.
    Raises:
        ConfigError: no source is named, or one is missing or empty, or a row is malformed or too
            long, or one source has pairs and another scores.
    """
    opened: list[RatedFile] = []

    def open_file(source: str) -> RatedFile:
        rows = open_rows(str(source), data.cache_dir, log)
        examples = RatedExamples(rows, data.prompt_key, keys)
        drop = data.overlong_prompts == "drop"

        def find() -> Pass:
            with bar(f"reading {source}", len(examples)) as advance:
                return fitting_rated_rows(
                    examples, form, context=context, drop=drop, advance=advance
                )

        names = [keys.chosen_key, keys.rejected_key, keys.margin_key, keys.response_key]
        key = pass_key(data, "rated", rows.identity, context, *names, keys.score_key)
        found = cached(cache_dir(data), key, find, log=log)
        if not len(found.rows):
            raise ConfigError(
                f"data set {source} has no row that fits model.max_length {context}: raise it"
            )
        opened.append(RatedFile(examples, form, found.rows, (found.prompts, found.labels)))
        if opened[-1].examples.content != opened[0].examples.content:
            raise ConfigError(
                f"{rows.where(0)} is of another kind than {opened[0].where(0)}: one has two responses, "
                "the other a response with a score; train on one kind at a time"
            )
        return opened[-1]

    train, held_out = open_parts(data, seed, train=open_file, held_out=open_file)
    first = opened[-1].examples  # training sources come last
    dropped = sum(len(part.examples) - len(part.rows) for part in opened)
    return RatedData(train, held_out, first.content, first.have_prompts, dropped)


def fitting_rated_rows(
    examples: RatedExamples,
    form: PromptFormat,
    *,
    context: int,
    drop: bool,
    advance: Callable[[int], None] = lambda done: None,
) -> Pass:
    """The rows whose sequences fit the context. Every row is checked.

    Args:
        drop: leave longer rows out instead of raising an error.
        advance: called with the number of rows checked since the last call.
    Raises:
        ConfigError: a row is malformed, the chat template fails on it, or it is too long and may not
            be dropped. The message names the place of the row.
    """
    fits = np.ones(len(examples), bool)
    prompts, labels = digest_of(), digest_of()
    for start in range(0, len(examples), CHUNK):
        chunk = range(start, min(start + CHUNK, len(examples)))
        read = [_read(examples, row) for row in chunk]
        for row, example, tokens in zip(chunk, read, _lengths(examples, chunk, read, form=form)):
            contexts = [side.context for side in example.sides]
            prompts.update(json.dumps(contexts, default=str).encode())
            labels.update(json.dumps(example.label).encode())
            fits[row] = tokens <= context
            if tokens > context and not drop:
                raise ConfigError(
                    f"{examples.rows.where(row)}: prompt and response have {tokens} tokens, "
                    f"model.max_length is {context}: raise it, remove the row, or set "
                    "data.overlong_prompts to drop"
                )
        advance(len(chunk))
    return Pass(np.flatnonzero(fits), prompts.hexdigest(), labels.hexdigest())


def _read(examples: RatedExamples, row: int) -> RatedExample:
    with reading(examples.rows.where(row), "correct the row"):
        example = examples[row]
    assert isinstance(example, RatedExample)
    return example


def _lengths(
    examples: RatedExamples, chunk: Sequence[int], read: Sequence[RatedExample], *,
    form: PromptFormat,
) -> list[int]:  # fmt: skip
    """The tokens of the longest side of each row in a chunk."""
    try:
        found = iter(_checked([side for example in read for side in example.sides], form))
        return [max(len(next(found)) for _ in example.sides) for example in read]
    except Exception:  # a tokenizer may raise anything: encode one by one to find the row
        return [_length(examples, row, example, form=form) for row, example in zip(chunk, read)]


def _length(examples: RatedExamples, row: int, example: RatedExample, *, form: PromptFormat) -> int:
    where = examples.rows.where(row)
    with reading(where, "correct the row"):
        try:
            return max(map(len, _checked(example.sides, form)))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error


def _checked(sides: Sequence[Side], form: PromptFormat) -> list[tuple[int, ...]]:
    """Does the same as encode_sides; also raises ConfigError if a response has no tokens, or there is no
    message for the template."""
    if form.apply_chat_template and not all(side.context for side in sides):
        raise ConfigError(
            "data.apply_chat_template needs a prompt in a field of its own: name it with "
            "data.prompt_key, or leave data.apply_chat_template out for whole texts"
        )
    for side, tokens in zip(sides, form.tokenizer.encode_many([s.response for s in sides])):
        if not tokens:
            raise ConfigError(f"the response {side.response!r} has no tokens: remove the row")
    return encode_sides(sides, form)


def encode_sides(sides: Sequence[Side], form: PromptFormat) -> list[tuple[int, ...]]:
    """The token ids of each side, context and response. A reward model reads them up to the last.

    A text gets begin-of-sequence if the tokenizer has one, and one end-of-sequence. A conversation
    begins and ends as the chat template says. Raises ConfigError if the template refuses it.
    """
    rendered = [form.render_answered(side.context, side.response) for side in sides]
    contexts = form.encode_many([before for before, _ in rendered])
    responses = form.tokenizer.encode_many([after or "" for _, after in rendered])
    eos = form.tokenizer.eos_id
    return [
        tuple(before) if after is None else (*before, *tokens, eos)
        for (_, after), before, tokens in zip(rendered, contexts, responses)
    ]


def _tokenized(example: RatedExample, form: PromptFormat) -> RatedPrompt:
    sequences = tuple(encode_sides(example.sides, form))
    return RatedPrompt(example, sequences[0], sequences=sequences)
