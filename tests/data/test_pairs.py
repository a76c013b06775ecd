"""The rows of a reward model: their layouts, their tokens, and what is refused."""

from __future__ import annotations

import csv
import json
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_rpp.config import DataConfig, RewardModelConfig
from megatron_rpp.data.chat import PromptFormat
from megatron_rpp.data.pair_files import open_rated
from megatron_rpp.data.tokenizer import load_tokenizer
from megatron_rpp.lifecycle.config_error import ConfigError
from tests.data.hf_tokenizers import make_chatml, make_llama3, make_tokenizer

ASK = {"role": "user", "content": "2 + 2?"}
BRIEF = {"role": "system", "content": "Be brief."}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return load_tokenizer(make_chatml(tmp_path_factory.mktemp("chatml")))


def write(folder: Path, *rows: dict, suffix: str = "jsonl") -> Path:
    path = folder / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import datasets

        datasets.Dataset.from_list(list(rows)).to_parquet(path)
    return path


@contextmanager
def quiet(title, total):
    yield lambda done: None


def open_all(path: Path, form: PromptFormat, *, context: int = 200, data=(), **keys):
    """The data of a file that is both training and held-out data."""
    settings = {"train": str(path), "eval": str(path), "cache_dir": str(path.parent / "cache")}
    config = DataConfig(**(settings | {"tokenizer": str(path)} | dict(data)))
    return open_rated(
        config, RewardModelConfig(**keys), form, context=context, seed=1, bar=quiet, log=print
    )


def texts(prompt, tokenizer) -> list[str]:
    return [tokenizer.decode(sequence, keep_special=True) for sequence in prompt.sequences]


CHAT = [
    f"<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    for answer in ("4.", "5.")
]
LAYOUTS = {
    "TRL, messages": {"prompt": [ASK], "chosen": [said("4.")], "rejected": [said("5.")]},
    "TRL, whole conversations": {"chosen": [ASK, said("4.")], "rejected": [ASK, said("5.")]},
    "UltraFeedback": {
        "prompt": "2 + 2?", "prompt_id": "1", "chosen": [ASK, said("4.")],
        "rejected": [ASK, said("5.")], "messages": [ASK, said("4.")], "score_chosen": 8.0,
    },
    "OpenRLHF, a prompt of messages": {"prompt": [ASK], "chosen": "4.", "rejected": "5."},
    "a prompt and conversations with it": {
        "prompt": [ASK], "chosen": [ASK, said("4.")], "rejected": [said("5.")]
    },
    "content parts": {
        "chosen": [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}, said("4.")],
        "rejected": [ASK, said("5.")],
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversations_in_every_layout_are_the_same(chatml, tmp_path, layout):
    data = open_all(write(tmp_path, LAYOUTS[layout]), PromptFormat(chatml))
    assert (data.content, data.dropped) == ("pairs", 0)
    assert data.have_prompts == ("prompt" in LAYOUTS[layout])
    for prompts in (data.train, data.held_out):
        assert texts(prompts[0], chatml) == CHAT


def test_parquet_has_the_same_rows(chatml, tmp_path):
    """Arrow fills the fields that a message lacks with null."""
    calls = {"role": "user", "content": "2 + 2?", "name": "Ann"}
    row = {"prompt": [calls], "chosen": [ASK, said("4.")], "rejected": [ASK, said("5.")]}
    path = write(tmp_path, row | {"margin": 0.5}, row | {"margin": None}, suffix="parquet")
    data = open_all(path, PromptFormat(chatml))
    assert [texts(prompt, chatml) for prompt in data.train] == [CHAT, CHAT]
    assert [prompt.example.target for prompt in data.train] == [0.5, 0.0]


def test_texts_follow_their_prompt(tmp_path):
    """As in rollouts, prompt and response are encoded separately, and both sequences begin with
    begin-of-sequence and end with end-of-sequence."""
    tokenizer = load_tokenizer(
        make_tokenizer(tmp_path / "t", ["<s>", "</s>"], "<s>", eos_token="</s>")
    )
    row = {"prompt": "What is 12 + 30?", "chosen": " 42.", "rejected": " 40.", "margin": "1.5"}
    path = write(tmp_path, row, suffix="csv")
    (prompt,) = open_all(path, PromptFormat(tokenizer)).train
    assert prompt.sequences == tuple(
        (0, *tokenizer.encode("What is 12 + 30?"), *tokenizer.encode(answer), 1)
        for answer in (" 42.", " 40.")
    )
    assert prompt.example.target == 1.5
    whole = {"chosen": "Human: hi\n\nAssistant: Hi.", "rejected": "Human: hi\n\nAssistant: No."}
    data = open_all(write(tmp_path, whole), PromptFormat(tokenizer))
    assert data.train[0].sequences[0] == (0, *tokenizer.encode(whole["chosen"]), 1)
    assert not data.have_prompts


def test_a_text_becomes_a_user_message_if_so_configured(chatml, tmp_path):
    path = write(tmp_path, {"prompt": "2 + 2?", "chosen": "4.", "rejected": "5."})
    (prompt,) = open_all(path, PromptFormat(chatml, apply_chat_template=True)).train
    assert texts(prompt, chatml) == CHAT


def test_a_system_prompt_and_earlier_turns(chatml, tmp_path):
    """The reward is for the last turn; the template writes it as it writes those before it."""
    turns = [ASK, said("4?"), {"role": "user", "content": "Sure?"}, said("Yes.")]
    path = write(tmp_path, {"chosen": turns, "rejected": [ASK, said("9.")]})
    (prompt,) = open_all(path, PromptFormat(chatml, system_prompt="Be brief.")).train
    form = PromptFormat(chatml)
    assert prompt.sequences == tuple(
        tuple(chatml.encode(chatml.render(conversation, generation_prompt=False)))
        for conversation in ([BRIEF, *turns], [BRIEF, ASK, said("9.")])
    )
    row = {
        "prompt": "2 + 2?",
        "chosen": [BRIEF, ASK, said("4.")],
        "rejected": [BRIEF, ASK, said("5.")],
    }
    (prompt,) = open_all(write(tmp_path, row), form).train
    turns = chatml.render([BRIEF, ASK, said("4.")], generation_prompt=False)
    assert prompt.sequences[0] == tuple(chatml.encode(turns))


def test_rows_with_scores(tmp_path):
    tokenizer = load_tokenizer(make_llama3(tmp_path / "llama3"))
    row = {"question": [ASK], "response": "4.", "marks": {"helpfulness": 3}}
    path = write(tmp_path, row, row | {"response": [said("5.")], "marks": {"helpfulness": -0.5}})
    data = open_all(
        path, PromptFormat(tokenizer), data={"prompt_key": "question"},
        score_key="marks.helpfulness",
    )  # fmt: skip
    assert data.content == "scores"
    assert [prompt.example.target for prompt in data.train] == [3.0, -0.5]
    assert [len(prompt.sequences) for prompt in data.train] == [1, 1]
    assert texts(data.train[0], tokenizer)[0].endswith("<|end_header_id|>\n\n4.<|eot_id|>")


PAIR = {"prompt": "2 + 2?", "chosen": "4.", "rejected": "5."}
GRADED = {"prompt": "2 + 2?", "response": "4.", "score": 1.0}
REFUSED = {
    "equal": (PAIR | {"rejected": "4."}, "both responses are the same"),
    "equal conversations": (
        {"chosen": [ASK, said("4.")], "rejected": [ASK, said("4.")]}, "are the same",
    ),
    "a margin too large for fp32": (PAIR | {"margin": "1e39"}, "'1e39', it must be a finite number"),
    "equal, no user": (
        {"chosen": [BRIEF, said("4.")], "rejected": [BRIEF, said("4.")]}, "are the same",
    ),
    "empty": (PAIR | {"rejected": " "}, "'rejected' is empty"),
    "empty turn": (PAIR | {"chosen": [said("")], "rejected": [said("5.")]}, "'chosen' is empty"),
    "null": (PAIR | {"chosen": None}, "'chosen' is null"),
    "missing": ({"prompt": "2 + 2?", "chosen": "4."}, "has no field 'rejected', only"),
    "empty prompt": (PAIR | {"prompt": ""}, "'prompt' is '', it must be a non-empty string"),
    "margin": (PAIR | {"margin": float("nan")}, "'margin' is nan, it must be a finite number"),
    "margin text": (PAIR | {"margin": "much"}, "'margin' is 'much', it must be a finite"),
    "margin bool": (PAIR | {"margin": True}, "'margin' is True, it must be a finite number"),
    "huge": (PAIR | {"margin": 10**400}, "it must be a finite number"),
    "number": (PAIR | {"rejected": 5}, "'rejected' a number: write both as texts"),
    "mixed": (PAIR | {"rejected": [said("5.")]}, "write both as texts or both as lists"),
    "user last": ({"chosen": [ASK], "rejected": [ASK, said("5.")]}, "'chosen' ends with"),
    "no question": ({"chosen": [said("4.")], "rejected": [said("5.")]}, "has no message before"),
    "another prompt": (
        {"prompt": "3 + 3?", "chosen": [ASK, said("4.")], "rejected": [ASK, said("5.")]},
        "'chosen' begins neither with the prompt nor",
    ),
    "two prompts": (
        {"chosen": [ASK, said("4.")],
         "rejected": [{"role": "user", "content": "3 + 3?"}, said("5.")]},
        "the prompts of the two responses differ",
    ),
    "system differs": (
        {"chosen": [BRIEF, ASK, said("4.")], "rejected": [ASK, said("5.")]}, "differ",
    ),
    "long": (PAIR | {"rejected": "5" * 300}, "tokens, model.max_length is 200"),
    "score": (GRADED | {"score": None}, "'score' is null"),
    "infinite": (GRADED | {"score": float("inf")}, "'score' is inf, it must be a finite number"),
    "no score": ({"prompt": "2 + 2?", "response": "4."}, "has no field 'score', only"),
    "no prompt": ({"response": "4.", "score": 1}, "has no field 'prompt'"),
    "empty response": (GRADED | {"response": ""}, "'response' is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_row_is_refused_with_its_place(chatml, tmp_path, case):
    row, message = REFUSED[case]
    good = GRADED if "response" in row else PAIR
    path = write(tmp_path, good, good, row)
    with pytest.raises(ConfigError) as refused:
        open_all(path, PromptFormat(chatml))
    assert f"{path}, line 3" in str(refused.value) and message in str(refused.value)


def test_long_rows_are_dropped_if_so_configured(chatml, tmp_path):
    path = write(tmp_path, PAIR, PAIR | {"rejected": "5" * 300}, PAIR | {"chosen": "4" * 300})
    data = open_all(path, PromptFormat(chatml), data={"overlong_prompts": "drop"})
    assert (len(data.train), len(data.held_out)) == (1, 1)
    assert data.dropped == 4  # of both sets
    longest = max(map(len, data.train[0].sequences))
    path = write(tmp_path, PAIR)
    assert len(open_all(path, PromptFormat(chatml), context=longest).train) == 1
    with pytest.raises(ConfigError, match=f"have {longest} tokens, model.max_length is"):
        open_all(path, PromptFormat(chatml), context=longest - 1)


def test_messages_need_a_template(tmp_path):
    plain = load_tokenizer(make_tokenizer(tmp_path / "t", ["<s>", "</s>"], "<s>", eos_token="</s>"))
    path = write(tmp_path, LAYOUTS["TRL, messages"])
    with pytest.raises(ConfigError, match=r"rows.jsonl, line 1: tokenizer .* has no chat template"):
        open_all(path, PromptFormat(plain))


def test_whole_texts_have_no_prompt_for_a_template(chatml, tmp_path):
    path = write(tmp_path, {"chosen": "Yes.", "rejected": "No."})
    with pytest.raises(ConfigError, match=r"line 1: data.apply_chat_template needs a prompt"):
        open_all(path, PromptFormat(chatml, apply_chat_template=True))


def test_sources_of_two_kinds_are_refused(chatml, tmp_path):
    pairs = write(tmp_path, PAIR)
    (tmp_path / "graded").mkdir()
    graded = write(tmp_path / "graded", GRADED)
    with pytest.raises(ConfigError, match="is of another kind than"):
        open_all(pairs, PromptFormat(chatml), data={"train": [str(pairs), str(graded)]})


def test_rows_of_neither_kind_are_refused(chatml, tmp_path):
    path = write(tmp_path, {"prompt": "2 + 2?", "label": "4."})
    with pytest.raises(ConfigError, match=r"line 1 has neither 'chosen' and 'rejected' nor"):
        open_all(path, PromptFormat(chatml))


def test_the_split_and_the_digests_follow_from_the_rows(chatml, tmp_path):
    rows = [PAIR | {"prompt": f"2 + {n}?"} for n in range(10)]
    path = write(tmp_path, *rows)
    data = open_all(path, PromptFormat(chatml), data={"eval": "", "eval_split": 0.2})
    seen = [prompt.example.prompt for part in (data.train, data.held_out) for prompt in part]
    assert len(data.held_out) == 2 and sorted(seen) == sorted(row["prompt"] for row in rows)
    before = data.train.identities()
    changed = write(tmp_path, *(row | {"chosen": "Four."} for row in rows))
    after = open_all(
        changed, PromptFormat(chatml), data={"eval": "", "eval_split": 0.2}
    ).train.identities()
    assert after[0] == before[0] and after[1] != before[1]
