"""Conversations: lists of messages ``{"role": ..., "content": ...}``, as data sets hold them.

The content is a text, or a list of text parts as in OpenAI's format, which are joined to one text.
It may be null only if the assistant calls tools. Left out: images and other parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_rpp.data.rows import kind
from megatron_rpp.lifecycle.config_error import ConfigError

Message = dict[str, Any]
"""``role``; ``content``, a text (or None next to tool calls); and all else that the template
reads."""


def conversation(prompt: Any, where: str) -> tuple[Message, ...]:
    """The messages of a prompt, each with one text as its content; empty if the prompt is a text.

    Raises:
        ConfigError: the prompt is blank, or neither a text nor a list of messages.
    """
    if isinstance(prompt, str) and prompt.strip():
        return ()
    if not isinstance(prompt, list) or not prompt:
        raise ConfigError(
            f"{where} is {prompt!r}, it must be a non-empty string or a list of messages"
        )
    return tuple(_message(message, f"{where}: message {i}") for i, message in enumerate(prompt))


def last_user_text(messages: Sequence[Message]) -> str:
    """Content of the last user message; empty if there is none."""
    return next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ConfigError(
            f"{where} is {message!r}, it must be an object with the fields 'role' and 'content'"
        )
    content = _text(message, where)
    if message["role"] == "user" and content is not None and not content.strip():
        raise ConfigError(
            f"{where}: 'content' is {content!r}, which asks nothing: write the question"
        )
    return message | {"content": content}


def _text(message: Message, where: str) -> str | None:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return None
    if isinstance(content, list) and all(map(_is_text_part, content)):
        return "".join(part if isinstance(part, str) else part["text"] for part in content)
    if "content" not in message:
        raise ConfigError(f"{where} has no 'content', only {sorted(message)}: name it so")
    found = f"a list with {_other_part(content)}" if isinstance(content, list) else kind(content)
    raise ConfigError(
        f"{where}: 'content' is {found}, it must be a text or a list of text parts "
        '{"type": "text", "text": ...}'
    )


def _is_text_part(part: Any) -> bool:
    """Whether a part is text. Arrow gives each part the keys of all parts, with None if it lacks
    one."""
    if isinstance(part, str):
        return True
    if not isinstance(part, dict):
        return False
    return part.get("type") == "text" and isinstance(part.get("text"), str)


def _other_part(parts: list[Any]) -> str:
    other = next(part for part in parts if not _is_text_part(part))
    return f"a part of type {other.get('type')!r}" if isinstance(other, dict) else kind(other)
