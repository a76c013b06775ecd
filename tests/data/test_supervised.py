"""Which tokens of a row supervised fine-tuning learns."""

from __future__ import annotations

import json

import pytest

from megatron_rpp.data.chat import PromptFormat
from megatron_rpp.data.examples import Example, open_examples
from megatron_rpp.data.prompts import Prompt
from megatron_rpp.data.supervised import sft_example
from megatron_rpp.data.tokenizer import load_tokenizer
from tests.data.hf_tokenizers import make_chatml, make_llama3

CHAT = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4, I think."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return load_tokenizer(make_chatml(tmp_path_factory.mktemp("chatml")))


def example_of(tmp_path, **row) -> Example:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return open_examples(str(tmp_path / "rows.jsonl"), "messages", "label")[0]


def taught(example: Example, form: PromptFormat):
    prompt = Prompt(example, form.tokens(example.messages or example.prompt))
    return sft_example(prompt, form)


def learned_ids(part) -> list[int]:
    return [token for token, mark in zip(part.response, part.learned, strict=True) if mark]


def test_every_turn_of_the_assistant_is_learned_with_its_end(chatml, tmp_path):
    form = PromptFormat(chatml, system_prompt="Be brief.")
    example = example_of(tmp_path, messages=CHAT)
    assert (example.prompt, example.label) == ("Sure?", "Yes.")
    part = taught(example, form)
    assert learned_ids(part) == [
        *chatml.encode("4, I think.<|im_end|>"), *chatml.encode("Yes.<|im_end|>")
    ]  # fmt: skip
    # What the template writes, except the line end after the last turn.
    whole = chatml.encode(chatml.render(form.with_system(CHAT), generation_prompt=False))
    assert [*part.prompt, *part.response] == whole[: len(whole) - len(chatml.encode("\n"))]
    assert chatml.decode(part.prompt).endswith("2 + 2?\nassistant\n")


def test_llama_3s_turns(tmp_path):
    tokenizer = load_tokenizer(make_llama3(tmp_path / "llama3"))
    part = taught(example_of(tmp_path, messages=CHAT), PromptFormat(tokenizer))
    assert learned_ids(part) == tokenizer.encode("4, I think.<|eot_id|>Yes.<|eot_id|>")
    assert [*part.prompt, *part.response] == tokenizer.encode(tokenizer.render(CHAT, False))


def test_a_label_of_its_own_is_the_last_turn(chatml, tmp_path):
    part = taught(example_of(tmp_path, messages=CHAT[:1], label="four"), PromptFormat(chatml))
    assert part.response == chatml.encode("four<|im_end|>") and all(part.learned)
    plain = taught(example_of(tmp_path, messages="2 + 2 =", label=4), PromptFormat(chatml))
    assert list(plain.prompt) == chatml.encode("2 + 2 =")
    assert plain.response == chatml.encode("4<|im_end|>")


def test_a_template_that_rewrites_earlier_turns_is_an_error(tmp_path):
    template = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"
    (tmp_path / "t.jinja").write_text(template)
    tokenizer = load_tokenizer(make_chatml(tmp_path / "chatml"), str(tmp_path / "t.jinja"))
    with pytest.raises(ValueError, match="writes earlier turns differently.*one row for each"):
        taught(example_of(tmp_path, messages=CHAT), PromptFormat(tokenizer))
