"""From the tokens of a response to its text, as rewards and logs see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rpp.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class ResponseFormat:
    """How responses are read. One text for rewards, logs and tools."""

    tokenizer: Tokenizer
    keep_special_tokens: bool = True
    """Special tokens such as <think> are part of the text; the tokens that frame a text never are."""
    stop_token_ids: tuple[int, ...] = ()
    """They end a response as end-of-sequence does."""

    def text(self, tokens: Sequence[int]) -> str:
        """The text of a response: begin-of-sequence, padding and what ends it left out."""
        own = self.tokenizer
        frame = {own.bos_id, own.pad_id, *own.eos_ids, *self.stop_token_ids}
        return own.decode([t for t in tokens if t not in frame], self.keep_special_tokens)
