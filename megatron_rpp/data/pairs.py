"""The rows that a reward model learns from: two responses of which one is better, or one with a score.

A pair is ``{"prompt": ..., "chosen": ..., "rejected": ..., "margin": ...}``; prompt and margin are
optional. A graded row is ``{"prompt": ..., "response": ..., "score": ...}``. A response is

- a text, which follows the prompt; without a prompt it is a whole text,
- a list of messages that ends with a turn of the assistant: the turns that follow the prompt (TRL), or
  the whole conversation (OpenRLHF, TRL without a prompt, UltraFeedback).

Left out: conversations in one text ("Human: ... Assistant: ...") are not taken apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from itertools import takewhile
from typing import Any, Literal

from megatron_rpp.config.reward_model import RewardModelConfig
from megatron_rpp.data.examples import Example, Examples, path_of, value_at
from megatron_rpp.data.messages import Message, conversation, last_user_text
from megatron_rpp.data.rows import Row, Rows, kind
from megatron_rpp.lifecycle.config_error import ConfigError

_LARGEST = 1e6
"""Largest size of a margin or score. Its square has 24 bits left in fp32."""
Content = Literal["pairs", "scores"]
"""What the rows of a data set hold."""


@dataclass(frozen=True)
class Side:
    """A response and what comes before it."""

    context: str | tuple[Message, ...]
    """The prompt, and all other turns before the response; "" if the response is a whole text."""
    response: str


@dataclass(frozen=True)
class RatedExample(Example):
    """A row: its label is its responses and its target as JSON."""

    sides: tuple[Side, ...] = ()
    """The better response and the worse one, or the one that has a score."""
    target: float = 0.0
    """The margin of the pair, or the score."""


class RatedExamples(Examples):
    """The rows of a source. Each is read and checked on access."""

    def __init__(self, rows: Rows, prompt_key: str, keys: RewardModelConfig) -> None:
        super().__init__(rows, prompt_key, keys.chosen_key)
        self.keys = keys
        self.content: Content = self._content_of(rows[0])

    def _content_of(self, row: Row) -> Content:
        keys = self.keys
        if path_of(row, keys.chosen_key) or path_of(row, keys.rejected_key):
            return "pairs"
        if path_of(row, keys.response_key) or path_of(row, keys.score_key):
            return "scores"
        raise ConfigError(
            f"{self.rows.where(0)} has neither {keys.chosen_key!r} and {keys.rejected_key!r} nor "
            f"{keys.response_key!r} and {keys.score_key!r}, only {sorted(row)}: set the keys of "
            "reward_model to the fields that hold the responses"
        )

    @property
    def have_prompts(self) -> bool:
        """Whether the first row has a prompt in a field of its own."""
        return path_of(self.rows[0], self.prompt_key) is not None

    def _example(self, index: int) -> RatedExample:
        row, where = self.rows[index], self.rows.where(index)
        path = path_of(row, self.prompt_key)
        prompt = None if path is None else value_at(row, path)
        turns: tuple[Message, ...] = ()
        if prompt is not None:
            turns = conversation(prompt, f"{where}: {self.prompt_key!r}")
        read = self._pair if self.content == "pairs" else self._graded
        sides, target = read(index, turns or prompt)
        first = sides[0].context
        text = first if isinstance(first, str) else last_user_text(first)
        label = json.dumps([[side.response for side in sides], target])
        return RatedExample(text, label, sides=sides, target=target)

    def _pair(self, index: int, prompt: _Prompt) -> tuple[tuple[Side, ...], float]:
        keys, where = self.keys, self.rows.where(index)
        values = [self._value(index, name) for name in ("chosen_key", "rejected_key")]
        if isinstance(values[0], str) != isinstance(values[1], str):
            raise ConfigError(
                f"{where}: {keys.chosen_key!r} is {kind(values[0])} and {keys.rejected_key!r} "
                f"{kind(values[1])}: write both as texts or both as lists of messages"
            )
        better, worse = (
            _side(prompt, value, f"{where}: {key!r}")
            for key, value in zip((keys.chosen_key, keys.rejected_key), values)
        )
        _check_difference(better, worse, where)
        path = path_of(self.rows[index], keys.margin_key)
        margin = None if path is None else value_at(self.rows[index], path)
        if margin is None:
            return (better, worse), 0.0
        return (better, worse), _number(margin, f"{where}: {keys.margin_key!r}")

    def _graded(self, index: int, prompt: _Prompt) -> tuple[tuple[Side, ...], float]:
        keys, where = self.keys, self.rows.where(index)
        response = self._value(index, "response_key")
        if prompt is None and isinstance(response, str):
            raise ConfigError(
                f"{where} has no field {self.prompt_key!r}: set data.prompt_key to the field that "
                "holds the prompt"
            )
        side = _side(prompt, response, f"{where}: {keys.response_key!r}")
        return (side,), _number(self._value(index, "score_key"), f"{where}: {keys.score_key!r}")

    def _value(self, index: int, setting: str) -> Any:
        """The value of the field that reward_model.`setting` names. Raises ConfigError if there is
        none."""
        row, where, key = self.rows[index], self.rows.where(index), getattr(self.keys, setting)
        path = path_of(row, key)
        if path is None:
            raise ConfigError(
                f"{where} has no field {key!r}, only {sorted(row)}: correct the row, or set "
                f"reward_model.{setting} to the field that holds it"
            )
        value = value_at(row, path)
        if value is None:
            raise ConfigError(f"{where}: {key!r} is null: correct or remove the row")
        return value


_Prompt = str | tuple[Message, ...] | None


def _side(prompt: _Prompt, response: Any, where: str) -> Side:
    """The side of a row; `response`: a text or messages. Raises ConfigError if it is malformed."""
    if isinstance(response, str):
        side = Side("" if prompt is None else prompt, response)
    else:
        turns = _whole(prompt, conversation(response, where), where)
        last = turns[-1]
        if last["role"] != "assistant" or last["content"] is None:
            raise ConfigError(
                f"{where} ends with {last}: it must end with a text of the assistant, which the reward "
                "is for"
            )
        side = Side(turns[:-1], last["content"])
        if not side.context:
            raise ConfigError(
                f"{where} has no message before the assistant's: add the question, or a prompt"
            )
    if not side.response.strip():
        raise ConfigError(f"{where} is empty: remove the row, or write the response")
    return side


def _whole(prompt: _Prompt, turns: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """The conversation of a prompt and the messages of a response, which may begin with the prompt."""
    if prompt is None:
        return turns
    if isinstance(prompt, str):
        given: tuple[Message, ...] = ({"role": "user", "content": prompt},)
        system = turns[:1] if turns[0]["role"] == "system" else ()
    else:
        given, system = prompt, ()
    if turns[0]["role"] == "assistant":
        return given + turns
    if _said(turns[: len(system) + len(given)]) == _said((*system, *given)):
        return turns
    raise ConfigError(
        f"{where} begins neither with the prompt nor with a turn of the assistant: its first message is "
        f"{turns[0]}"
    )


def _said(turns: Sequence[Message]) -> list[tuple[str, str]]:
    """Who says what. (Tables fill up the other fields of messages with null.)"""
    return [(turn["role"], (turn["content"] or "").strip()) for turn in turns]


def _check_difference(better: Side, worse: Side, where: str) -> None:
    """Raises ConfigError if the sides are equal, or answer different prompts."""
    ours, theirs = better.context, worse.context
    if isinstance(ours, str) or isinstance(theirs, str):
        same = ours == theirs
    else:
        same = _said(ours) == _said(theirs)
        both = takewhile(lambda pair: pair[0] == pair[1], zip(_said(ours), _said(theirs)))
        if not same and not any(turn[0] == "user" for turn, _ in both):
            raise ConfigError(
                f"{where}: the prompts of the two responses differ: {ours[0]} and {theirs[0]}; both "
                "must answer the same one"
            )
    if same and better.response == worse.response:
        raise ConfigError(f"{where}: both responses are the same: remove the row")


def _number(value: Any, where: str) -> float:
    """A number, or the text of one: every cell of a CSV file is a text. Raises ConfigError if it is
    not finite or too large to be learned in fp32."""
    number = math.nan
    if isinstance(value, (int, float, Decimal, str)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            number = float(value)
    if not abs(number) <= _LARGEST:  # NaN is not
        raise ConfigError(
            f"{where} is {value!r}, it must be a finite number of at most {_LARGEST:g}: correct the row"
        )
    return number
