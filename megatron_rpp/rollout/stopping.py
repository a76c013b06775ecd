"""Stops: the tokens and texts that end a response, besides end-of-sequence.

A stop text that is a special token of the tokenizer is compared by its id. Any other stop text is
searched for in the text of the response, special tokens included; it may span tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rpp.data.tokenizer import Tokenizer
from megatron_rpp.lifecycle.config_error import ConfigError

_CONTEXT = 8
"""Extra tokens decoded before those that can match: the first token of a text may decode differently
than in the middle of one (a stripped blank, half of a character)."""


def split_stops(
    tokenizer: Tokenizer, texts: Sequence[str], ids: Sequence[int]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Splits rollout.stop and rollout.stop_token_ids into (texts to search, tokens that end).

    Raises:
        ConfigError: the tokenizer has no such id.
    """
    for number in ids:
        if not 0 <= number < tokenizer.vocab_size:
            raise ConfigError(
                f"rollout.stop_token_ids has {number}, but the tokenizer's ids are 0 .. "
                f"{tokenizer.vocab_size - 1}: correct it"
            )
    special = {text: tokenizer.special_id(text) for text in texts}
    searched = tuple(text for text, number in special.items() if number is None)
    found = [number for number in special.values() if number is not None]
    return searched, tuple(dict.fromkeys([*ids, *found]))


class StopTexts:
    """Searches for stop texts in responses that grow by one token at a time."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._texts = tuple(texts)
        # Each token of a match adds at least one byte of it.
        longest = max((len(text.encode()) for text in texts), default=0)
        self._window = longest + _CONTEXT

    def end(self, tokens: Sequence[int], first: bool) -> bool:
        """Whether a response ends with its last token.

        first: the earlier tokens have not been searched yet. Otherwise only a match that the last
        token completes can be new, so the cost of a token does not grow with the response.
        """
        if not self._texts:
            return False
        seen = tokens if first else tokens[-self._window :]
        text = self._tokenizer.decode(seen, keep_special=True)
        return any(stop in text for stop in self._texts)
