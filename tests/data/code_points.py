"""A tokenizer for tests whose ids can be written by hand."""

from __future__ import annotations


class CodePoints:
    """A real tokenizer of the simplest kind: one id per character, after the special ids."""

    vocab_size = 4 + 0x110000
    eos_id, eos_ids, pad_id = 3, (3,), 0

    def __init__(self, bos_id: int | None) -> None:
        self.bos_id = bos_id

    def encode(self, text: str) -> list[int]:
        return [4 + ord(character) for character in text]

    def encode_many(self, texts) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids) -> str:
        return "".join(chr(i - 4) for i in ids if i >= 4)
