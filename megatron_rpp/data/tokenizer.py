"""Tokenizers: the interface, SentencePiece models, and training of a small one.

SFT and rollout encode prompt and response separately. So the tokenizers trained here add no space
in front and change no character: ``decode(encode(x)) == x`` for the text they were trained on.
Hugging Face tokenizers are in hf_tokenizer.py. Left out: chat templates for SentencePiece models;
byte fallback in the tokenizers trained here, as it would take 256 pieces of a tiny vocabulary.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn, Protocol

import sentencepiece

from megatron_rpp.data.hf_tokenizer import HuggingFaceTokenizer
from megatron_rpp.lifecycle.atomic_files import write_atomic
from megatron_rpp.lifecycle.config_error import ConfigError, reading

PAD, UNK, BOS, EOS = range(4)
"""Ids of the special pieces in the tokenizers trained here."""

_OPERATOR = re.compile(r" ?([-+*/=^%<>()]) ?")


class Tokenizer(Protocol):
    """What data, rollout and SFT need from a tokenizer."""

    vocab_size: int
    """Ids are 0 .. vocab_size - 1."""
    bos_id: int | None
    """Begin-of-sequence, which precedes every prompt; None = the tokenizer has none."""
    eos_id: int
    """End-of-sequence, which ends every response in supervised fine-tuning."""
    eos_ids: tuple[int, ...]
    """All tokens that end a generated response, including eos_id."""
    pad_id: int
    """Fills unused positions, which are always masked."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text; no special ids are added."""

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """Text of the ids; an unknown id gives " ⁇ " or U+FFFD.

        Args:
            keep_special: special ids give their texts (<think>, <|im_end|>) instead of none.
        """

    def special_id(self, text: str) -> int | None:
        """The special id with this text; None if there is none."""

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text."""

    def render(self, messages: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
        """The conversation as the chat template writes it. Raises ConfigError without a template.

        Args:
            generation_prompt: end with the prefix of the answer of the assistant.
        """


class SentencePieceTokenizer:
    """A SentencePiece ``.model`` file as a ``Tokenizer``."""

    def __init__(self, path: str | Path) -> None:
        """Raises ConfigError if this is not a SentencePiece model with an end-of-sequence piece."""
        path = Path(path).absolute()
        if not path.is_file():
            raise ConfigError(
                f"tokenizer {path} is not a file or a directory: correct data.tokenizer, or make "
                "the file with tools/make_task.py"
            )
        content = path.read_bytes()
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise ConfigError(f"tokenizer {path} is not a SentencePiece model ({error})") from error
        if processor.get_piece_size() == 0:
            raise ConfigError(f"tokenizer {path} is not a SentencePiece model: it has no pieces")
        if processor.eos_id() < 0:
            raise ConfigError(
                f"tokenizer {path} has no end-of-sequence piece: responses could never end; train "
                "it with an eos_id"
            )
        self._path = path
        self._processor = processor
        self.vocab_size: int = processor.get_piece_size()
        self.bos_id: int | None = processor.bos_id() if processor.bos_id() >= 0 else None
        self.eos_id: int = processor.eos_id()
        self.eos_ids: tuple[int, ...] = (self.eos_id,)
        self.pad_id: int = processor.pad_id() if processor.pad_id() >= 0 else self.eos_id
        self._special = frozenset(filter(processor.is_control, range(self.vocab_size)))

    def encode(self, text: str) -> list[int]:
        """Ids of the text; no special ids are added. Characters without a piece become unknown."""
        return self._processor.encode(text)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text."""
        return self._processor.encode(list(texts))

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """Text of the ids, without special pieces or with their texts.

        An unknown piece stays visible as " ⁇ ". Otherwise "5<unk>7" would pass for the answer 57.
        """
        known = range(self.vocab_size)  # a model may have more words than its tokenizer has pieces
        pieces = [int(i) if int(i) in known else self._processor.unk_id() for i in ids]
        if not keep_special:
            return self._processor.decode([p for p in pieces if p not in self._special])
        runs = groupby(pieces, key=self._special.__contains__)
        return "".join(
            "".join(map(self._processor.id_to_piece, run)) if special
            else self._processor.decode(list(run))
            for special, run in runs
        )  # fmt: skip

    def special_id(self, text: str) -> int | None:
        """The control piece with this text; None if there is none."""
        piece = self._processor.piece_to_id(text)
        return piece if piece in self._special else None

    def render(self, messages: Sequence[dict[str, Any]], generation_prompt: bool) -> NoReturn:
        """Raises ConfigError, because a SentencePiece model has no chat template."""
        raise ConfigError(
            f"tokenizer {self._path} is a SentencePiece model, which has no chat template: set "
            "data.tokenizer to a Hugging Face directory, or use prompts that are texts without "
            "data.apply_chat_template"
        )


def load_tokenizer(
    path: str | Path, chat_template: str | None = None, trust_remote_code: bool = False
) -> Tokenizer:
    """Opens the tokenizer of a run: a SentencePiece file or a Hugging Face directory.

    Args:
        chat_template: file of a template that replaces the one in the directory.
        trust_remote_code: run Python code from the directory, if it contains any.

    Raises:
        ConfigError: the path is neither, or one of the files is damaged.
    """
    with reading(f"tokenizer {Path(path).absolute()}", "correct data.tokenizer or its files"):
        if Path(path).is_dir():
            return HuggingFaceTokenizer(path, chat_template, trust_remote_code)
        return SentencePieceTokenizer(path)


def train_sentencepiece(texts: Iterable[str], path: str | Path, vocab_size: int) -> None:
    """Trains a unigram model (Kudo, arXiv 1804.10959) and writes it atomically to ``path``.

    The settings suit tiny vocabularies: a phrase that all texts share becomes one piece, while
    every digit and every operator (with its spaces) is a separate piece. The same texts give the
    same file. If the texts do not yield ``vocab_size`` pieces, the model has fewer.

    Raises:
        ConfigError: there is no text, or ``vocab_size`` is too small for the characters in it.
    """
    texts = [text for text in texts if text]
    if not texts:
        raise ConfigError(f"cannot train the tokenizer {path}: there is no text to train it on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            pad_id=PAD,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            user_defined_symbols=_operators(texts),
            character_coverage=1.0,
            split_digits=True,
            # Whole phrases as pieces: pieces may cross spaces and scripts. Spaces go to the end of
            # a piece, because SentencePiece takes only phrases that differ right after the piece.
            split_by_whitespace=False,
            split_by_unicode_script=False,
            treat_whitespace_as_suffix=True,
            max_sentencepiece_length=128,
            max_sentence_length=1 << 24,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"cannot train a tokenizer of task.vocab_size {vocab_size} pieces, raise it ({error})"
        ) from error
    write_atomic(path, model.getvalue())


def _operators(texts: Sequence[str]) -> list[str]:
    """Operators in the texts, with and without surrounding spaces, in SentencePiece's spelling."""
    found = {
        match.group(group)
        for text in texts
        for match in _OPERATOR.finditer(text)
        for group in (0, 1)
    }
    return sorted(symbol.replace(" ", "▁") for symbol in found)
