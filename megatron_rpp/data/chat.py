"""From a row's prompt to the tokens that the model sees: plain text, or a chat template.

A prompt is a text or a conversation, ``[{"role": "user", "content": ...}, ...]``. A conversation
always goes through the tokenizer's chat template; a text goes as it is, or as one user message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_rpp.data.tokenizer import Tokenizer

Message = dict[str, Any]
"""``role`` and ``content``, and whatever else the template reads."""


class Rendered(NamedTuple):
    """A prompt as text."""

    text: str
    begin: bool
    """Begin-of-sequence goes in front: a template writes its own."""


@dataclass(frozen=True)
class PromptFormat:
    """How the prompts of a run become tokens."""

    tokenizer: Tokenizer
    apply_chat_template: bool = False
    """A prompt that is a text becomes one user message."""
    system_prompt: str = ""
    """A system message in front of conversations that have none; empty = none."""

    def render(self, prompt: str | Sequence[Message]) -> Rendered:
        """What the model reads: ValueError where there is no template or it refuses the prompt."""
        if isinstance(prompt, str):
            if not self.apply_chat_template:
                return Rendered(prompt, begin=True)
            prompt = [{"role": "user", "content": prompt}]
        text = self.tokenizer.render(self.with_system(prompt), generation_prompt=True)
        return Rendered(text, begin=False)

    def encode_many(self, prompts: Sequence[Rendered]) -> list[tuple[int, ...]]:
        """Token ids of each prompt."""
        encoded = self.tokenizer.encode_many([prompt.text for prompt in prompts])
        return [
            begun(tokens, self.tokenizer) if prompt.begin else tuple(tokens)
            for prompt, tokens in zip(prompts, encoded)
        ]

    def tokens(self, prompt: str | Sequence[Message]) -> tuple[int, ...]:
        """Token ids of the prompt."""
        return self.encode_many([self.render(prompt)])[0]

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation, beginning with the system prompt where it has none of its own."""
        if not self.system_prompt or messages[0]["role"] == "system":
            return list(messages)
        return [{"role": "system", "content": self.system_prompt}, *messages]


def last_user_text(messages: Sequence[Message]) -> str:
    """Content of the last user message that is a text; empty where there is none."""
    texts = (m.get("content") for m in reversed(messages) if m["role"] == "user")
    return next((text for text in texts if isinstance(text, str)), "")


def prompt_tokens(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids of a prompt that is a text."""
    return begun(tokenizer.encode(text), tokenizer)


def begun(tokens: Sequence[int], tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens after begin-of-sequence: added where the tokenizer has one and they do not
    already begin with it."""
    if tokenizer.bos_id is None or tokens[:1] == [tokenizer.bos_id]:
        return tuple(tokens)
    return (tokenizer.bos_id, *tokens)
