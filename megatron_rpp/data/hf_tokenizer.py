"""Hugging Face tokenizers: a directory with tokenizer.json, as models are published.

The library never adds special tokens here: begin-of-sequence comes from `prompt_tokens` or from the
chat template, and so never twice. Left out: downloads from the Hub. As in other trainers, the text
of a special token (`<|im_end|>`) in a prompt becomes that token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_rpp.lifecycle.config_error import ConfigError, reading, reason

UNKNOWN = "\ufffd"
"""Text of an id that the tokenizer does not know: a model may have more rows than there are
tokens."""


class HuggingFaceTokenizer:
    """A directory of Hugging Face tokenizer files as a ``Tokenizer``."""

    def __init__(
        self,
        path: str | Path,
        chat_template: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Opens a tokenizer.

        Args:
            chat_template: file of a template that replaces the one in the directory.

        Raises:
            ConfigError: this is not a tokenizer directory, there is no such template, or the
                tokenizer has no end-of-sequence token.
        """
        from transformers import AutoTokenizer  # imported here: SentencePiece runs do not need it

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # readers of old and new formats raise anything
            raise ConfigError(
                f"tokenizer {Path(path).absolute()} is not a directory of Hugging Face tokenizer "
                f"files ({reason(error)}): correct data.tokenizer"
            ) from error
        self._path = Path(path).absolute()
        self._template = _read_template(chat_template)
        tokens = self._tokenizer.get_vocab()
        self.vocab_size: int = max(tokens.values()) + 1
        self._known = frozenset(tokens.values())
        added = self._tokenizer.added_tokens_decoder.items()
        self._special = {str(token): number for number, token in added if token.special}
        self.eos_ids: tuple[int, ...] = self._end_ids()
        self.eos_id: int = self.eos_ids[0]
        self.bos_id: int | None = self._begin_id()
        pad_id = self._tokenizer.pad_token_id
        self.pad_id: int = self.eos_id if pad_id is None else pad_id

    def encode(self, text: str) -> list[int]:
        """Ids of the text; nothing is added. The text of a special token becomes that token."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text, on all cores."""
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return encoded["input_ids"]

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """Text of the ids, without special tokens or with their texts. Unknown ids give U+FFFD."""
        runs = groupby(map(int, ids), key=self._known.__contains__)
        return "".join(
            self._text(list(run), keep_special) if known else UNKNOWN for known, run in runs
        )

    def special_id(self, text: str) -> int | None:
        """The id of the special token with this text; None if there is none."""
        return self._special.get(text)

    def render(self, messages: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
        """The conversation as the chat template writes it, including special tokens.

        Raises:
            ConfigError: there is no template, or it fails on the messages.
        """
        if self._template is None and self._tokenizer.chat_template is None:
            raise ConfigError(
                f"tokenizer {self._path} has no chat template: name a template file with "
                "data.chat_template, or use prompts that are texts without data.apply_chat_template"
            )
        # Null fields (content next to tool calls, columns that Parquet fills up) are left out, as
        # in transformers 5. Older versions would make templates write the word None.
        given = [{k: v for k, v in message.items() if v is not None} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                given,
                chat_template=self._template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
        except Exception as error:  # a template is a program and may raise anything
            raise ConfigError(
                f"the chat template refuses the messages {list(messages)} ({error}): correct them, "
                "or name another template with data.chat_template"
            ) from error
        assert isinstance(text, str)
        return text

    def _text(self, ids: list[int], keep_special: bool) -> str:
        text = self._tokenizer.decode(
            ids,
            skip_special_tokens=not keep_special,
            clean_up_tokenization_spaces=False,
            spaces_between_special_tokens=False,
        )
        assert isinstance(text, str)
        return text

    def _begin_id(self) -> int | None:
        """Begin-of-sequence, if the tokenizer itself puts it in front of a text."""
        added = self._tokenizer("", return_attention_mask=False)["input_ids"]
        bos_id = self._tokenizer.bos_token_id
        return bos_id if bos_id in added[:1] else None

    def _end_ids(self) -> tuple[int, ...]:
        """The end token of the tokenizer, then those that the files of the model name as well."""
        eos_id = self._tokenizer.eos_token_id
        ids = [] if eos_id is None else [eos_id]
        for name in ("generation_config.json", "config.json"):
            ids += _named_ends(self._path / name)
        if not ids:
            raise ConfigError(
                f"tokenizer {self._path} has no end-of-sequence token: responses could never end; "
                "set eos_token in its tokenizer_config.json"
            )
        unknown = sorted(set(ids) - self._known)
        if unknown:
            raise ConfigError(
                f"{self._path} names the end-of-sequence ids {unknown}, which its tokenizer does "
                "not have: correct eos_token_id in its generation_config.json and config.json"
            )
        return tuple(dict.fromkeys(ids))


def _named_ends(file: Path) -> list[int]:
    """The end-of-sequence ids in a settings file of the model; none if there is no such file."""
    if not file.is_file() and not file.is_symlink():
        return []
    with reading(str(file.absolute()), "correct the file, or fetch it again"):
        named = json.loads(file.read_bytes()).get("eos_token_id")
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if any(type(number) is not int for number in ids):
        raise ConfigError(
            f"{file.absolute()}: eos_token_id is {named!r}, it must be a whole number"
        )
    return ids


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    with reading(f"data.chat_template {Path(path).absolute()}", "name a text file in UTF-8"):
        return Path(path).read_text(encoding="utf-8")
