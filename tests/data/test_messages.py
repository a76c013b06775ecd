"""Messages of a conversation: the content is a text or a list of text parts, and must not be
blank."""

from __future__ import annotations

import json

import pytest

from megatron_rpp.data.chat import PromptFormat
from megatron_rpp.data.examples import Example, open_examples
from megatron_rpp.data.tokenizer import load_tokenizer
from tests.data.hf_tokenizers import make_chatml

CALL = [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
ASKED = {"role": "user", "content": "Weather?"}
SUNNY = {"role": "tool", "content": "sunny"}


def read(folder, *rows: dict) -> list[Example]:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(open_examples(str(folder / "a.jsonl"), "prompt", "label"))


def test_text_parts_are_one_text(tmp_path):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 3?"}]
    answer = [{"type": "text", "text": "5"}]
    (example,) = read(
        tmp_path,
        {"prompt": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]},
    )
    assert example.messages == ({"role": "user", "content": "What is 2 + 3?"},)
    assert (example.prompt, example.label) == ("What is 2 + 3?", "5")


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "user", "value": "2 + 3?"}, "message 0 has no 'content', only ['role', 'value']"),
        ({"role": "user", "content": None}, "message 0: 'content' is null, it must be a text or"),
        ({"role": "user", "content": 5}, "message 0: 'content' is a number"),
        ({"role": "user", "content": {"text": "x"}}, "message 0: 'content' is an object"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "message 0: 'content' is a list with a part of type 'image_url'",
        ),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "a part of type 'text'"),
        ({"role": "user", "content": [7]}, "'content' is a list with a number"),
        ({"role": "user", "content": []}, "message 0: 'content' is '', which asks nothing"),
        ({"role": "user", "content": " \n"}, "which asks nothing: write the question"),
        ({"role": "assistant", "content": None}, "message 0: 'content' is null"),
        ({"from": "human", "value": "2 + 3?"}, "must be an object with the fields 'role' and"),
        ({"role": None, "content": "2 + 3?"}, "must be an object with the fields 'role' and"),
    ],
)
def test_contents_without_text_are_errors_that_name_row_and_message(tmp_path, message, problem):
    with pytest.raises(ValueError) as error:
        read(tmp_path, {"prompt": [message]})
    assert str(error.value).startswith(f"{tmp_path}/a.jsonl, line 1: 'prompt'")
    assert problem in str(error.value)


PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
CALLS = "{% for m in messages %}{{ m['content'] or m['tool_calls'][0]['function']['name'] }};{% endfor %}"
SUM = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"


def rendered(folder, template: str, messages) -> str:
    (folder / "template.jinja").write_text(template)
    tokenizer = load_tokenizer(make_chatml(folder / "hf"), str(folder / "template.jinja"))
    return PromptFormat(tokenizer).render(messages).text


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (PLAIN, "user: Weather?\nassistant: \ntool: sunny\n"),
        (CALLS, "Weather?;weather;sunny;"),
    ],
)
def test_null_beside_tool_calls_never_becomes_the_word_none(tmp_path, template, written):
    called = {"role": "assistant", "content": None, "tool_calls": CALL}
    (example,) = read(tmp_path, {"prompt": [ASKED, called, SUNNY]})
    assert rendered(tmp_path, template, example.messages) == written
    with pytest.raises(ValueError, match="the chat template refuses the messages"):
        rendered(tmp_path, SUM, example.messages)
