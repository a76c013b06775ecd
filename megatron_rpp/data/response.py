"""Turns the tokens of a response into the text that rewards and logs see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rpp.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class ResponseFormat:
    """How responses become text: the same for rewards, logs and tools."""

    tokenizer: Tokenizer
    keep_special_tokens: bool = True
    """Whether special tokens such as <think> are part of the text. Begin, end and padding never
    are."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response, as end-of-sequence does."""

    def text(self, tokens: Sequence[int]) -> str:
        """The text of a response, without begin-of-sequence, padding and the token that ends it."""
        tokenizer = self.tokenizer
        frame = {tokenizer.bos_id, tokenizer.pad_id, *tokenizer.eos_ids, *self.stop_token_ids}
        return tokenizer.decode([t for t in tokens if t not in frame], self.keep_special_tokens)
