"""Prompt data sets: the rows of one or more sources, tokenized when they are asked for.

One pass over a new source checks every row and finds the prompts that are too long; its result is
kept in a cache, so that later starts on the same files are quick. Left out: deduplication.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from megatron_rpp.data.chat import PromptFormat, Rendered
from megatron_rpp.data.examples import Example, Examples
from megatron_rpp.data.order import Mixture, prompt_indices
from megatron_rpp.seeds import permutation

_CHUNK = 256
"""Prompts tokenized at once."""
_HELD_OUT = 1
"""Tells the draw of the held-out rows from other permutations of the seed."""


@dataclass(frozen=True)
class Prompt:
    """An example and the token ids the model sees."""

    example: Example
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class PromptFile(Sequence[Prompt]):
    """The prompts of one source: ``rows`` are those of its rows that are used."""

    examples: Examples
    form: PromptFormat
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Prompt:
        example = self.examples[int(self.rows[index])]
        return Prompt(example, self.form.tokens(example.messages or example.prompt))

    def where(self, index: int) -> str:
        """The place of a prompt in its source, in words."""
        return self.examples.rows.where(int(self.rows[index]))

    def subset(self, indices: Sequence[int] | np.ndarray) -> PromptFile:
        """Some of the prompts, in the given order."""
        return replace(self, rows=self.rows[np.asarray(indices, np.int64)])


class PromptSet(Sequence[Prompt]):
    """The prompts of several sources, one after the other, and their order in training."""

    def __init__(self, parts: Sequence[PromptFile], weights: Sequence[float] = ()) -> None:
        """``weights``: the share of each part in training; none = by its number of rows."""
        self.parts = list(parts)
        self._ends = list(accumulate(map(len, self.parts)))
        self._weights = tuple(weights)
        self._mixtures: dict[int, Mixture] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Prompt:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, index)
        return self.parts[part][index - self._ends[part] + len(self.parts[part])]

    def with_parts(self, parts: Sequence[PromptFile]) -> PromptSet:
        """The same set with other rows of its sources."""
        return PromptSet(parts, self._weights)

    def where(self, index: int) -> str:
        """The place of a prompt in its source, in words."""
        part = bisect_right(self._ends, index)
        return self.parts[part].where(index - self._ends[part] + len(self.parts[part]))

    def order(self, cursor: int, count: int, seed: int) -> list[int]:
        """Which prompts to train on at the global positions ``cursor .. cursor + count - 1``."""
        if not self._weights:
            return prompt_indices(cursor, count, len(self), seed)
        if seed not in self._mixtures:
            sizes = [len(part) for part in self.parts]
            self._mixtures[seed] = Mixture(sizes, self._weights, seed)
        drawn = self._mixtures[seed].rows(cursor, count)
        return [self._ends[part] - len(self.parts[part]) + row for part, row in drawn]


def fitting_rows(
    examples: Examples,
    form: PromptFormat,
    limit: int,
    drop: bool,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """[n] int64, the rows whose prompt has at most ``limit`` tokens (begin-of-sequence counts).

    Checks every row. ``progress`` hears how many more rows are done.

    Raises:
        ValueError: a malformed row, one that the chat template refuses or, unless ``drop``, one
            with a longer prompt; names its place.
    """
    fits = np.ones(len(examples), bool)
    for start in range(0, len(examples), _CHUNK):
        chunk = range(start, min(start + _CHUNK, len(examples)))
        encoded = form.encode_many([_render(examples, row, form) for row in chunk])
        for row, tokens in zip(chunk, encoded):
            fits[row] = len(tokens) <= limit
            if not fits[row] and not drop:
                raise ValueError(
                    f"{examples.rows.where(row)}: the prompt has {len(tokens)} tokens, the limit "
                    f"is {limit}: raise it (the lower of data.max_prompt_tokens and of "
                    "model.max_length - rollout.max_new_tokens), remove the row, or set "
                    "data.overlong_prompts to drop"
                )
        progress(len(chunk))
    return np.flatnonzero(fits)


def split_held_out(
    parts: Sequence[PromptFile], share: float, seed: int
) -> tuple[list[PromptFile], list[PromptFile]]:
    """(training, held-out) parts: disjoint rows, drawn from the seed.

    Args:
        share: of all rows below 1, a number of rows from 1 on.
    """
    sizes = [len(part) for part in parts]
    total = sum(sizes)
    count = int(share) if share >= 1 else max(1, round(share * total))
    if count >= total:
        raise ValueError(
            f"data.eval_split {share:g} leaves none of the {total} prompts to train on: lower it"
        )
    held_out = np.zeros(total, bool)
    held_out[permutation(total, seed, _HELD_OUT)[:count]] = True
    masks = np.split(held_out, list(accumulate(sizes))[:-1])
    return tuple(
        [part.subset(np.flatnonzero(mask == wanted)) for part, mask in zip(parts, masks)]
        for wanted in (False, True)
    )


def _render(examples: Examples, row: int, form: PromptFormat) -> Rendered:
    example = examples[row]
    try:
        return form.render(example.messages or example.prompt)
    except ValueError as error:
        raise ValueError(f"{examples.rows.where(row)}: {error}") from error
