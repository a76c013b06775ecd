"""Reading, encoding and ordering of prompts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rpp.data.chat import PromptFormat
from megatron_rpp.data.prompts import (
    Example,
    Prompt,
    encode_prompts,
    prompt_indices,
    read_examples,
)


class CodePoints:
    """A real tokenizer of the simplest kind: one id per character, after the special ids."""

    vocab_size = 4 + 0x110000
    eos_id, eos_ids, pad_id = 3, (3,), 0

    def __init__(self, bos_id: int | None) -> None:
        self.bos_id = bos_id

    def encode(self, text: str) -> list[int]:
        return [4 + ord(character) for character in text]

    def decode(self, ids) -> str:
        return "".join(chr(i - 4) for i in ids if i >= 4)


def write(tmp_path, *lines: str):
    path = tmp_path / "rows.jsonl"
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return path


def test_rows_come_back_in_order_with_labels_as_text(tmp_path):
    path = write(
        tmp_path,
        '{"prompt": "1+1=", "label": "2", "metadata": {"level": 1}, "other": []}',
        '{"prompt": "1+2=", "label": 3}',
        '{"prompt": "1/2=", "label": 0.5, "metadata": {}}',
        '{"prompt": "write a poem", "label": null}',
        '{"prompt": "separator\u2028inside, \u00e9"}',
    )
    assert read_examples(path, "prompt", "label") == [
        Example("1+1=", "2", {"level": 1}),
        Example("1+2=", "3", {}),
        Example("1/2=", "0.5", {}),
        Example("write a poem", None, {}),
        Example("separator\u2028inside, \u00e9", None, {}),
    ]


def test_keys_are_the_users_and_a_missing_last_newline_is_fine(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}')
    assert read_examples(path, "question", "answer") == [Example("a", "b", {})]


@pytest.mark.parametrize(
    "line, problem",
    [
        ('{"prompt": "a"', "is not JSON"),
        ("", "is not JSON"),
        ("[1, 2]", "is a list"),
        ("null", "is null"),
        ('{"question": "a"}', r"no field 'prompt', only \['question'\]: set data.prompt_key"),
        ('{"prompt": ""}', "non-empty string"),
        ('{"prompt": " \\n"}', "non-empty string"),
        ('{"prompt": 7}', "'prompt' is 7"),
        ('{"prompt": []}', r"'prompt' is \[\], it must be a non-empty string or a list of messages"),
        ('{"prompt": [{"content": "a"}]}', "message 0 is .* must be an object with the fields 'role'"),
        ('{"prompt": "a", "label": true}', "'label' is true or false"),
        ('{"prompt": "a", "label": ["b"]}', "'label' is a list"),
        ('{"prompt": "a", "metadata": "b"}', "'metadata' is a string"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, line, problem):
    path = write(tmp_path, '{"prompt": "fine"}', line, '{"prompt": "fine"}')
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2.*{problem}"):
        read_examples(path, "prompt", "label")


def test_bytes_that_are_not_utf8_name_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1 is not JSON"):
        read_examples(path, "prompt", "label")


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match="absent.jsonl is not a file"):
        read_examples(tmp_path / "absent.jsonl", "prompt", "label")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty.jsonl is empty"):
        read_examples(tmp_path / "empty.jsonl", "prompt", "label")


def test_prompts_start_with_begin_of_sequence_where_there_is_one():
    example = Example("ab", "c", {})
    assert encode_prompts([example], PromptFormat(CodePoints(2)), 3, "f") == [Prompt(example, (2, 101, 102))]
    assert encode_prompts([example], PromptFormat(CodePoints(None)), 3, "f") == [Prompt(example, (101, 102))]


def test_prompt_over_the_limit_is_refused_with_the_remedies():
    examples = [Example("ab"), Example("abc")]
    assert len(encode_prompts(examples, PromptFormat(CodePoints(2)), 4, "f")) == 2
    with pytest.raises(ValueError) as error:
        encode_prompts(examples, PromptFormat(CodePoints(2)), 3, "data/train.jsonl")
    assert str(error.value) == (
        "data/train.jsonl, line 2: the prompt has 4 tokens, the limit is 3: raise "
        "model.max_length, lower rollout.max_new_tokens, or remove the row"
    )


@settings(deadline=None)
@given(
    cursor=st.integers(0, 200),
    counts=st.lists(st.integers(0, 40), max_size=6),
    size=st.integers(1, 30),
    seed=st.integers(0, 2**64),
)
def test_order_is_the_same_however_it_is_cut(cursor, counts, size, seed):
    parts, position = [], cursor
    for count in counts:
        parts += prompt_indices(position, count, size, seed)
        position += count
    assert parts == prompt_indices(cursor, sum(counts), size, seed)


@settings(deadline=None)
@given(epoch=st.integers(0, 50), size=st.integers(1, 50), seed=st.integers(0, 2**32))
def test_every_epoch_is_a_permutation(epoch, size, seed):
    assert sorted(prompt_indices(epoch * size, size, size, seed)) == list(range(size))


def test_epochs_and_seeds_differ_and_every_first_row_is_possible():
    orders = {tuple(prompt_indices(epoch * 20, 20, 20, 7)) for epoch in range(10)}
    orders |= {tuple(prompt_indices(0, 20, 20, seed)) for seed in range(8, 18)}
    assert len(orders) == 20
    first = [prompt_indices(epoch * 4, 1, 4, 0)[0] for epoch in range(400)]
    # Binomial(400, 1/4): 100 expected, 60 and 140 are 4.6 standard deviations away.
    assert all(60 < first.count(row) < 140 for row in range(4))


def test_order_is_pinned():
    # A change of this order breaks the resume of every run in flight.
    assert prompt_indices(3, 12, 8, 1234) == [5, 2, 7, 3, 1, 0, 4, 5, 6, 3, 1, 7]


@pytest.mark.parametrize("arguments", [(-1, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, 0), (0, 1, 1, -1)])
def test_impossible_positions_are_refused(arguments):
    with pytest.raises(ValueError, match="must be at least 0"):
        prompt_indices(*arguments)
