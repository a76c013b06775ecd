"""What supervised fine-tuning learns from an example: every turn of the assistant, nothing else.

The last turn is the label, or the turn that ends the conversation. Earlier turns are part of the
prompt; each is learned up to its end-of-sequence. Left out: templates that rewrite earlier turns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_rpp.data.chat import PromptFormat
from megatron_rpp.data.prompts import Prompt, PromptFile
from megatron_rpp.lifecycle.config_error import ConfigError


@dataclass(frozen=True)
class SftExample:
    """A sequence to learn: the tokens of ``response`` that ``learned`` marks, none of
    ``prompt``."""

    prompt: tuple[int, ...]
    response: list[int]
    learned: list[bool]


def sft_example(prompt: Prompt, form: PromptFormat) -> SftExample:
    """The tokens of an example that has a label.

    Raises:
        ConfigError: the label has no tokens, or the chat template writes earlier turns differently
            once others follow.
    """
    tokenizer, label = form.tokenizer, prompt.example.label
    assert label is not None
    last = [*tokenizer.encode(label), tokenizer.eos_id]
    if len(last) == 1:
        raise ConfigError(f"the label {label!r} has no tokens: correct or remove the row")
    tokens, learned = _earlier_turns(prompt, form)
    start = learned.index(True) if any(learned) else len(tokens)
    marks = learned[start:] + [True] * len(last)
    return SftExample(tuple(tokens[:start]), tokens[start:] + last, marks)


def fitting_sft_rows(
    prompts: PromptFile, form: PromptFormat, context: int, *, drop: bool
) -> np.ndarray:
    """The rows of `prompts` that fit the context with their labels. Every row is checked.

    Args:
        context: most tokens of prompt and label together.
        drop: leave longer rows out instead of raising an error.

    Raises:
        ConfigError: a row has no label, or is too long and may not be dropped.
    """
    fits = np.ones(len(prompts), bool)
    for index, prompt in enumerate(prompts):
        if not prompt.example.label:
            raise ConfigError(
                f"{prompts.where(index)}: the row has no label, which is the response to learn: "
                "add it, or set data.label_key to the field that holds it"
            )
        try:
            learned = sft_example(prompt, form)
        except ConfigError as error:
            raise ConfigError(f"{prompts.where(index)}: {error}") from error
        tokens = len(learned.prompt) + len(learned.response)
        fits[index] = tokens <= context
        if not fits[index] and not drop:
            raise ConfigError(
                f"{prompts.where(index)}: prompt and label have {tokens} tokens, model.max_length "
                f"is {context}: raise it, remove the row, or set data.overlong_prompts to drop"
            )
    return prompts.rows[fits]


def _earlier_turns(prompt: Prompt, form: PromptFormat) -> tuple[list[int], list[bool]]:
    """The tokens of the prompt, and which of them belong to turns of the assistant."""
    messages = form.with_system(prompt.example.messages) if prompt.example.messages else []
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return list(prompt.tokens), [False] * len(prompt.tokens)
    cuts = [""]
    for turn in turns:
        cuts.append(form.tokenizer.render(messages[:turn], generation_prompt=True))
        cuts.append(form.tokenizer.render(messages[: turn + 1], generation_prompt=False))
    cuts.append(form.tokenizer.render(messages, generation_prompt=True))
    tokens, learned = [], []
    for number, (before, after) in enumerate(zip(cuts, cuts[1:])):
        if not after.startswith(before):
            raise ConfigError(
                "the chat template writes earlier turns differently once others follow, so that "
                "they cannot be learned: split the conversation into one row for each answer"
            )
        part = form.tokenizer.encode(after[len(before) :])
        tokens += part
        learned += _until_end(part, form) if number % 2 else [False] * len(part)
    return tokens, learned


def _until_end(part: list[int], form: PromptFormat) -> list[bool]:
    """True up to the last end-of-sequence. What a template writes after it is not learned."""
    ends = [i for i, token in enumerate(part) if token in form.tokenizer.eos_ids]
    length = ends[-1] + 1 if ends else len(part)
    return [i < length for i in range(len(part))]
