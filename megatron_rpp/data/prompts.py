"""Prompt data sets: the rows of one or more sources, tokenized on access.

One pass over a new source checks every row and finds the prompts that are too long. The row cache
stores its result, so that later runs on the same files start quickly. Left out: deduplication.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from megatron_rpp.data.chat import PromptFormat, Rendered, length_problem
from megatron_rpp.data.examples import Example, Examples
from megatron_rpp.data.row_cache import Pass
from megatron_rpp.data.rows import locate
from megatron_rpp.data.sampler import Mixture, prompt_indices
from megatron_rpp.lifecycle.config_error import ConfigError, reading
from megatron_rpp.seeds import permutation

CHUNK = 256
"""Number of prompts that are tokenized at a time."""
_HELD_OUT = 1
"""Distinguishes the draw of the held-out rows from other permutations of the same seed."""


@dataclass(frozen=True)
class Prompt:
    """An example and the token ids that the model sees."""

    example: Example
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class PromptFile(Sequence[Prompt]):
    """The prompts of one source. ``rows`` are the rows of the source that are used."""

    examples: Examples
    form: PromptFormat
    rows: np.ndarray
    digests: tuple[str, str]
    """Digests of the prompts and of the labels of all rows of the source."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Prompt:  # type: ignore[override]  # takes no slices
        example = self.examples[int(self.rows[index])]
        return Prompt(example, self.form.tokens(example.messages or example.prompt))

    def where(self, index: int) -> str:
        """The place of a prompt in its source, in words."""
        return self.examples.rows.where(int(self.rows[index]))

    def subset(self, indices: Sequence[int] | np.ndarray) -> PromptFile:
        """Some of the prompts, in the given order."""
        return replace(self, rows=self.rows[np.asarray(indices, np.int64)])


class PromptSet(Sequence[Prompt]):
    """The prompts of several sources, concatenated, and their order in training."""

    def __init__(self, parts: Sequence[PromptFile], weights: Sequence[float] = ()) -> None:
        """``weights``: share of each part in training; empty = in proportion to its rows."""
        self.parts = list(parts)
        self._ends = list(accumulate(map(len, self.parts)))
        self._weights = tuple(weights)
        self._mixtures: dict[int, Mixture] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Prompt:  # type: ignore[override]  # takes no slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        part, row = locate(self._ends, index)
        return self.parts[part][row]

    def labels(self) -> Iterator[str | None]:
        """The labels of all prompts, read one at a time."""
        return (part.examples[int(row)].label for part in self.parts for row in part.rows)

    def with_parts(self, parts: Sequence[PromptFile]) -> PromptSet:
        """The same set with other rows of its sources."""
        return PromptSet(parts, self._weights)

    def identities(self) -> tuple[str, str]:
        """Digests of the prompts with their shares, and of the labels.

        They do not depend on where the files are.
        """
        prompts, labels = digest_of(json.dumps(self._weights).encode()), digest_of()
        for part in self.parts:
            prompts.update(part.digests[0].encode() + part.rows.tobytes())
            labels.update(part.digests[1].encode() + part.rows.tobytes())
        return prompts.hexdigest(), labels.hexdigest()

    def where(self, index: int) -> str:
        """The place of a prompt in its source, in words."""
        part, row = locate(self._ends, index)
        return self.parts[part].where(row)

    def order(self, cursor: int, count: int, seed: int) -> list[int]:
        """The prompts to train on at the global positions ``cursor .. cursor + count - 1``."""
        if not self._weights:
            return prompt_indices(cursor, count, size=len(self), seed=seed)
        if seed not in self._mixtures:
            sizes = [len(part) for part in self.parts]
            self._mixtures[seed] = Mixture(sizes, self._weights, seed)
        drawn = self._mixtures[seed].rows(cursor, count)
        return [self._ends[part] - len(self.parts[part]) + row for part, row in drawn]


def fitting_rows(
    examples: Examples,
    form: PromptFormat,
    *,
    limit: int,
    drop: bool,
    check: Callable[[Example], str | None] = lambda example: None,
    advance: Callable[[int], None] = lambda done: None,
) -> Pass:
    """The rows whose prompt has at most ``limit`` tokens, counting begin-of-sequence.

    Every row is checked.

    Args:
        drop: leave longer prompts out instead of raising an error.
        check: returns what else is wrong with an example, or None.
        advance: called with the number of rows checked since the last call.

    Raises:
        ConfigError: a row is malformed, the chat template fails on it, or its prompt has no tokens
            or, unless ``drop``, too many. The message names the place of the row.
    """
    fits = np.ones(len(examples), bool)
    prompts, labels = digest_of(), digest_of()
    for start in range(0, len(examples), CHUNK):
        chunk = range(start, min(start + CHUNK, len(examples)))
        read = [examples[row] for row in chunk]
        for row, example, tokens in zip(chunk, read, _encoded(examples, chunk, read, form=form)):
            where = examples.rows.where(row)
            prompts.update(json.dumps(example.messages or example.prompt, default=str).encode())
            labels.update(json.dumps(example.label).encode())
            fits[row] = tokens <= limit
            problem = length_problem(tokens, limit)
            if problem is not None and not (drop and tokens):
                raise ConfigError(f"{where}: {problem}: {_remedy(tokens)}")
            other = check(example)
            if other is not None:
                raise ConfigError(f"{where}: {other}")
        advance(len(chunk))
    return Pass(np.flatnonzero(fits), prompts.hexdigest(), labels.hexdigest())


def digest_of(start: bytes = b"") -> hashlib.blake2b:
    """A digest to update, of `start` so far."""
    return hashlib.blake2b(start, digest_size=16)


def _remedy(tokens: int) -> str:
    if not tokens:
        return "correct or remove the row"
    return (
        "raise it (the lower of data.max_prompt_tokens and of model.max_length - "
        "rollout.max_new_tokens), remove the row, or set data.overlong_prompts to drop"
    )


def _encoded(
    examples: Examples, chunk: Sequence[int], read: Sequence[Example], *, form: PromptFormat
) -> list[int]:
    """The number of tokens of each prompt in a chunk."""
    rendered = [_render(examples, row, example, form=form) for row, example in zip(chunk, read)]
    try:
        return list(map(len, form.encode_many(rendered)))
    except Exception:  # a tokenizer may raise anything: encode one by one to find the row
        return [_encode(examples, row, prompt, form=form) for row, prompt in zip(chunk, rendered)]


def _encode(examples: Examples, row: int, prompt: Rendered, *, form: PromptFormat) -> int:
    with reading(f"{examples.rows.where(row)}: the prompt", "correct it"):
        return len(form.encode_many([prompt])[0])


def split_held_out(
    parts: Sequence[PromptFile], share: float, seed: int
) -> tuple[list[PromptFile], list[PromptFile]]:
    """(training, held-out) parts with disjoint rows, drawn at random from the seed.

    Args:
        share: a share of all rows if below 1, else a number of rows.
    """
    sizes = [len(part) for part in parts]
    total = sum(sizes)
    count = int(share) if share >= 1 else max(1, round(share * total))
    if count >= total:
        raise ConfigError(
            f"data.eval_split {share:g} leaves none of the {total} prompts to train on: lower it"
        )
    held_out = np.zeros(total, bool)
    held_out[permutation(total, seed, _HELD_OUT)[:count]] = True
    masks = np.split(held_out, list(accumulate(sizes))[:-1])
    training = [part.subset(np.flatnonzero(~mask)) for part, mask in zip(parts, masks)]
    held = [part.subset(np.flatnonzero(mask)) for part, mask in zip(parts, masks)]
    return training, held


def _render(examples: Examples, row: int, example: Example, *, form: PromptFormat) -> Rendered:
    where = examples.rows.where(row)
    with reading(f"{where}: the prompt", "correct it"):
        try:
            return form.render(example.messages or example.prompt)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
