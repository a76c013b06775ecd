"""Turns the prompt of a row into the tokens that the model sees: plain text, or a chat template.

A prompt is a text or a conversation, ``[{"role": "user", "content": ...}, ...]``. A conversation
always goes through the chat template of the tokenizer. A text is used as it is or, if so
configured, as one user message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_rpp.data.messages import Message
from megatron_rpp.data.tokenizer import Tokenizer
from megatron_rpp.lifecycle.config_error import ConfigError, reading


class Rendered(NamedTuple):
    """A prompt as text."""

    text: str
    prepend_bos: bool
    """Whether begin-of-sequence is put in front. A template writes its own."""


@dataclass(frozen=True)
class PromptFormat:
    """How the prompts of a run become tokens."""

    tokenizer: Tokenizer
    apply_chat_template: bool = False
    """Whether a prompt that is a text becomes one user message."""
    system_prompt: str = ""
    """System message to put in front of conversations that have none; empty = none."""

    def render(self, prompt: str | Sequence[Message]) -> Rendered:
        """The text that the model reads. Raises ConfigError if the template is missing or fails."""
        if isinstance(prompt, str):
            if not self.apply_chat_template:
                return Rendered(prompt, prepend_bos=True)
            prompt = [{"role": "user", "content": prompt}]
        text = self.tokenizer.render(self.with_system(prompt), generation_prompt=True)
        return Rendered(text, prepend_bos=False)

    def render_answered(
        self, prompt: str | Sequence[Message], response: str
    ) -> tuple[Rendered, str | None]:
        """The text of a prompt, and that of the response if it follows; None if it is in the first,
        because a chat template has written both.

        Raises ConfigError if the template is missing or fails.
        """
        if isinstance(prompt, str) and not self.apply_chat_template:
            return self.render(prompt), response
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        turns = [*self.with_system(turns), {"role": "assistant", "content": response}]
        text = self.tokenizer.render(turns, generation_prompt=False)
        return Rendered(text, prepend_bos=False), None

    def encode_many(self, prompts: Sequence[Rendered]) -> list[tuple[int, ...]]:
        """Token ids of each prompt."""
        encoded = self.tokenizer.encode_many([prompt.text for prompt in prompts])
        return [
            prepend_bos(tokens, self.tokenizer) if prompt.prepend_bos else tuple(tokens)
            for prompt, tokens in zip(prompts, encoded)
        ]

    def tokens(self, prompt: str | Sequence[Message]) -> tuple[int, ...]:
        """Token ids of the prompt."""
        return self.encode_many([self.render(prompt)])[0]

    def checked_tokens(self, prompt: str, limit: int) -> tuple[int, ...]:
        """Token ids of a prompt that does not come from a data set.

        Raises:
            ConfigError: it is blank, has no tokens or more than `limit`, or cannot be rendered.
        """
        if not prompt.strip():
            raise ConfigError(f"the prompt is {prompt!r}, it must hold a text")
        with reading(f"the prompt {prompt[:80]!r}", "correct it"):
            tokens = self.tokens(prompt)
        problem = length_problem(len(tokens), limit)
        if problem is not None:
            raise ConfigError(
                f"{problem}: shorten {prompt[:80]!r}, raise model.max_length or lower "
                "rollout.max_new_tokens, which share the context"
            )
        return tokens

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation, with the system prompt in front unless it begins with one."""
        if not self.system_prompt or messages[0]["role"] == "system":
            return list(messages)
        return [{"role": "system", "content": self.system_prompt}, *messages]


def prompt_tokens(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids of a prompt that is a text."""
    return prepend_bos(tokenizer.encode(text), tokenizer)


def prepend_bos(tokens: Sequence[int], tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens with begin-of-sequence in front.

    It is added only if the tokenizer has one and the tokens do not begin with it already.
    """
    if tokenizer.bos_id is None or tokens[:1] == [tokenizer.bos_id]:
        return tuple(tokens)
    return (tokenizer.bos_id, *tokens)


def length_problem(tokens: int, limit: int) -> str | None:
    """Why a prompt with this many tokens cannot be used; None if it can."""
    if not tokens:
        return "the prompt has no tokens: the tokenizer makes nothing of it"
    if tokens > limit:
        return f"the prompt has {tokens} tokens, the limit is {limit}"
    return None
