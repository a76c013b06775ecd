"""From a row's prompt to the tokens that the model sees: plain text, or a chat template.

A prompt is a text or a conversation, ``[{"role": "user", "content": ...}, ...]``. A conversation
always goes through the tokenizer's chat template; a text goes as it is, or as one user message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rpp.data.tokenizer import Tokenizer

Message = dict[str, Any]
"""``role`` and ``content``, and whatever else the template reads."""


@dataclass(frozen=True)
class PromptFormat:
    """How the prompts of a run become tokens."""

    tokenizer: Tokenizer
    apply_chat_template: bool = False
    """A prompt that is a text becomes one user message."""
    system_prompt: str = ""
    """A system message in front of conversations that have none; empty = none."""

    def text(self, prompt: str | Sequence[Message]) -> str:
        """What the model reads after begin-of-sequence: ValueError where a template is missing."""
        if isinstance(prompt, str):
            if not self.apply_chat_template:
                return prompt
            prompt = [{"role": "user", "content": prompt}]
        return self.tokenizer.render(self.with_system(prompt), generation_prompt=True)

    def tokens(self, prompt: str | Sequence[Message]) -> tuple[int, ...]:
        """Token ids of the prompt. A template writes its own begin-of-sequence."""
        if isinstance(prompt, str) and not self.apply_chat_template:
            return prompt_tokens(prompt, self.tokenizer)
        return tuple(self.tokenizer.encode(self.text(prompt)))

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
    """Token ids of a prompt that is a text: begin-of-sequence where the tokenizer has one (and the
    text does not already write it), then the text."""
    tokens = tokenizer.encode(text)
    if tokenizer.bos_id is None or tokens[:1] == [tokenizer.bos_id]:
        return tuple(tokens)
    return (tokenizer.bos_id, *tokens)
