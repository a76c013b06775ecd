"""Prompts of a run: encoded on access, filtered, mixed, split and cached."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest

from megatron_rpp.config import DataConfig
from megatron_rpp.data.chat import PromptFormat
from megatron_rpp.data.examples import Example, open_examples
from megatron_rpp.data.loading import open_data
from megatron_rpp.data.prompts import Prompt, PromptSet, fitting_rows
from tests.data.code_points import CodePoints


def write(path, prompts: list[str]) -> str:
    rows = [json.dumps({"prompt": prompt, "label": str(i)}) for i, prompt in enumerate(prompts)]
    path.write_text("".join(row + "\n" for row in rows))
    return str(path)


@pytest.fixture
def opened(tmp_path):
    """open_data with the given settings and at most 10 tokens per prompt; `seen` records
    progress."""
    seen = []

    @contextmanager
    def progress(title: str, total: int):
        seen.append(total)
        yield lambda done: None

    def run(seed=1234, bos_id=2, **settings):
        settings = {"tokenizer": __file__, "cache_dir": str(tmp_path / "cache")} | settings
        form = PromptFormat(CodePoints(bos_id))
        return open_data(DataConfig(**settings), form, limit=10, seed=seed, bar=progress)

    run.seen = seen
    return run


def prompts_of(data: PromptSet) -> list[str]:
    return [prompt.example.prompt for prompt in data]


def test_prompts_start_with_begin_of_sequence_where_there_is_one(opened, tmp_path):
    train = write(tmp_path / "a.jsonl", ["ab"])
    for bos_id, tokens in ((2, (2, 101, 102)), (None, (101, 102))):
        data = opened(train=train, eval=train, bos_id=bos_id)
        assert list(data.train) == [Prompt(Example("ab", "0"), tokens)]


def test_prompt_over_the_limit_is_an_error_with_the_remedies(tmp_path):
    path = write(tmp_path / "a.jsonl", ["ab", "abc"])
    examples, form = open_examples(path, "prompt", "label"), PromptFormat(CodePoints(2))
    assert fitting_rows(examples, form, limit=4, drop=False).rows.tolist() == [0, 1]
    assert fitting_rows(examples, form, limit=3, drop=True).rows.tolist() == [0]
    with pytest.raises(ValueError) as error:
        fitting_rows(examples, form, limit=3, drop=False)
    assert str(error.value).startswith(
        f"{path}, line 2: the prompt has 4 tokens, the limit is 3: raise it (the lower of "
    )
    assert "set data.overlong_prompts to drop" in str(error.value)


def test_dropped_prompts_are_counted_and_keep_their_places(opened, tmp_path):
    words = [letter * length for letter in "abc" for length in range(1, 13)]
    train = write(tmp_path / "a.jsonl", words)
    data = opened(train=train, eval=train, overlong_prompts="drop", max_prompt_tokens=5)
    assert prompts_of(data.train) == [word for word in words if len(word) < 5]
    assert data.dropped == 2 * 3 * 8
    assert data.train.where(4) == f"{train}, line 13"
    with pytest.raises(ValueError, match="the prompt has 11 tokens, the limit is 10"):
        opened(train=train, eval=train, max_prompt_tokens=500)
    with pytest.raises(ValueError, match="no prompt of at most 1 tokens"):
        opened(train=train, eval=train, overlong_prompts="drop", max_prompt_tokens=1)


def test_a_second_start_reads_the_cache_and_a_changed_file_does_not(opened, tmp_path):
    train = write(tmp_path / "a.jsonl", ["ab", "c"])
    first = opened(train=train, eval=train)
    assert opened.seen == [2]  # the second source is the same file
    assert prompts_of(opened(train=train, eval=train).train) == prompts_of(first.train)
    opened(train=train, eval=train, max_prompt_tokens=4)
    assert opened.seen == [2, 2]
    write(tmp_path / "a.jsonl", ["ab", "c", "d"])
    assert len(opened(train=train, eval=train).train) == 3
    assert opened.seen == [2, 2, 3]


def test_several_files_make_one_order_and_weights_another(opened, tmp_path):
    files = [write(tmp_path / "a.jsonl", list("abc")), write(tmp_path / "b.jsonl", list("ABCDEFG"))]
    data = opened(train=files, eval=files[0]).train
    assert prompts_of(data) == list("abcABCDEFG")
    epoch = data.order(10, 10, seed=7)
    assert sorted(epoch) == list(range(10)) and epoch != data.order(0, 10, seed=7)
    mixed = opened(train=files, eval=files[0], weights=[3, 1]).train
    letters = [mixed[row].example.prompt for row in mixed.order(0, 4000, seed=7)]
    assert 2860 < sum(letter.islower() for letter in letters) < 3140  # 3000 +- 5 deviations
    assert mixed.order(1000, 50, seed=7) == mixed.order(0, 1050, seed=7)[1000:]
    assert set(letters) == set("abcABCDEFG")


@pytest.mark.parametrize("split, count", [(0.25, 10), (7, 7)])
def test_a_held_out_split_is_disjoint_and_drawn_from_the_seed(opened, tmp_path, split, count):
    files = [
        write(tmp_path / "a.jsonl", [f"a{i}" for i in range(15)]),
        write(tmp_path / "b.jsonl", [f"b{i}" for i in range(25)]),
    ]
    data = opened(train=files, eval_split=split)
    train, held_out = prompts_of(data.train), prompts_of(data.held_out)
    assert len(held_out) == count and sorted(train + held_out) == sorted(
        [f"a{i}" for i in range(15)] + [f"b{i}" for i in range(25)]
    )
    assert prompts_of(opened(train=files, eval_split=split).held_out) == held_out
    assert prompts_of(opened(train=files, eval_split=split, seed=1).held_out) != held_out
    with pytest.raises(ValueError, match="data.eval_split 40 leaves none of the 40 prompts"):
        opened(train=files, eval_split=40)


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"eval_split": -0.1}, "data.eval_split must be at least 0"),
        ({"eval_split": 1.5}, "data.eval_split must be a share below 1 or a whole number"),
        ({"train": ["a", "b"], "weights": [1.0]}, "one number above 0 for each source.*2"),
        ({"train": "a", "weights": [0.0]}, "one number above 0 for each source"),
        ({"overlong_prompts": "cut"}, "data.overlong_prompts must be one of refuse, drop"),
    ],
)
def test_invalid_settings_are_errors(settings, problem):
    with pytest.raises(ValueError, match=problem):
        DataConfig(**settings)
