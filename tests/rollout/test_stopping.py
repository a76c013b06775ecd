"""Stop texts become token ids if they are special tokens; searching the end finds every match."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rpp.data.tokenizer import Tokenizer, load_tokenizer
from megatron_rpp.rollout.stopping import StopTexts, split_stops
from tests.data.hf_tokenizers import make_chatml


@cache
def chatml() -> Tokenizer:
    return load_tokenizer(make_chatml(Path(mkdtemp()) / "hf"))


def test_a_stop_text_that_is_a_special_token_is_that_token():
    tokenizer = chatml()
    texts, ids = split_stops(tokenizer, ["<|im_start|>", "\n\n", "<|im_start|>user"], [7, 7])
    assert texts == ("\n\n", "<|im_start|>user")
    assert ids == (7, tokenizer.encode("<|im_start|>")[0]) and len(tokenizer.encode(texts[1])) > 1


@pytest.mark.parametrize("number", [-1, 10_000])
def test_an_id_that_the_tokenizer_does_not_have_is_an_error(number):
    with pytest.raises(ValueError, match=rf"rollout.stop_token_ids has {number}, but the tok"):
        split_stops(chatml(), [], [number])


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, own: Tokenizer) -> None:
        self.own, self.asked = own, []

    def decode(self, ids, keep_special=False) -> str:
        self.asked.append(len(ids))
        return self.own.decode(ids, keep_special)


def first_end(tokens: list[int], stops: list[str], least: int = 0) -> int | None:
    """The length at which a response of `tokens` ends if it is checked after each token."""
    found = StopTexts(chatml(), stops)
    for length in range(max(least, 1), len(tokens) + 1):
        if found.end(tokens[:length], first=length == max(least, 1)):
            return length
    return None


PIECES = st.sampled_from(
    ["a", "b", " ", "\n", "é", "\u2028", "\U0001f600", "12", "<|im_start|>", "answer", ". "]
)


@settings(deadline=None, max_examples=150)
@given(st.lists(PIECES, max_size=30), st.lists(PIECES, min_size=1, max_size=4), st.integers(0, 6))
def test_the_window_finds_what_the_whole_text_holds(pieces, stop, least):
    """The definition is the first length, from `least` on, at which the text contains a stop."""
    tokens, stop = chatml().encode("".join(pieces)), "".join(stop)
    lengths = range(max(least, 1), len(tokens) + 1)
    holds = (n for n in lengths if stop in chatml().decode(tokens[:n], keep_special=True))
    assert first_end(tokens, [stop], least) == next(holds, None)


def test_the_cost_of_a_token_does_not_grow_with_the_response():
    tokenizer = Counting(chatml())
    stops, tokens = StopTexts(tokenizer, ["\n\nQ:"]), chatml().encode("12 " * 500)
    for length in range(2, len(tokens)):
        assert not stops.end(tokens[:length], first=False)
    assert max(tokenizer.asked) == len("\n\nQ:") + 8


def test_without_stop_texts_nothing_is_decoded():
    tokenizer = Counting(chatml())
    assert not StopTexts(tokenizer, []).end([1, 2, 3], first=True) and tokenizer.asked == []
