"""The text of a response and its special tokens, with both kinds of tokenizers."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece

from megatron_rpp.data.response import ResponseFormat
from megatron_rpp.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.hf_tokenizers import make_tokenizer

SPECIALS = ["<|endoftext|>", "<s>", "<|im_end|>", "<think>", "</think>"]


def hugging_face(folder: Path) -> Tokenizer:
    path = make_tokenizer(
        folder / "hf", SPECIALS, "<s>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=SPECIALS[3:],
    )  # fmt: skip
    return load_tokenizer(path)


def sentence_piece(folder: Path) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["5 + 7 = 12, says the text"]), model_writer=model, vocab_size=64,
        hard_vocab_limit=False, pad_id=0, unk_id=1, bos_id=2, eos_id=3, minloglevel=2,
        control_symbols=SPECIALS[3:], pad_piece=SPECIALS[0], bos_piece="<s>", eos_piece=SPECIALS[2],
        add_dummy_prefix=False,
    )  # fmt: skip
    (folder / "t.model").write_bytes(model.getvalue())
    return load_tokenizer(folder / "t.model")


@pytest.fixture(params=[hugging_face, sentence_piece])
def tokenizer(request, tmp_path) -> Tokenizer:
    return request.param(tmp_path)


def response(tokenizer: Tokenizer) -> list[int]:
    """<think>5 + 7</think>12<|im_end|> with begin-of-sequence and padding in between."""
    thinking, done = (tokenizer.special_id(text) for text in ("<think>", "</think>"))
    return [
        tokenizer.bos_id, thinking, *tokenizer.encode("5 + 7"), done, tokenizer.pad_id,
        *tokenizer.encode("12"), tokenizer.eos_id,
    ]  # fmt: skip


def test_special_tokens_are_text_but_for_those_that_frame_it(tokenizer):
    tokens = response(tokenizer)
    assert ResponseFormat(tokenizer).text(tokens) == "<think>5 + 7</think>12"
    assert ResponseFormat(tokenizer, keep_special_tokens=False).text(tokens) == "5 + 712"


def test_a_token_that_ends_a_response_is_no_part_of_its_text(tokenizer):
    done = tokenizer.special_id("</think>")
    tokens = [tokenizer.special_id("<think>"), *tokenizer.encode("7"), done]
    assert ResponseFormat(tokenizer, stop_token_ids=(done,)).text(tokens) == "<think>7"


def test_only_special_tokens_have_a_special_id(tokenizer):
    assert [tokenizer.special_id(text) is None for text in SPECIALS] == [False] * 5
    assert [tokenizer.special_id(text) for text in ("5", "<think", "", "<think></think>")] == [
        None
    ] * 4
