"""Hugging Face tokenizers and chat templates, on tokenizers of the two common kinds."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rpp.data.chat import PromptFormat
from megatron_rpp.data.tokenizer import load_tokenizer
from tests.data.hf_tokenizers import TEXTS, make_chatml, make_llama3

QUESTION = [{"role": "user", "content": "What is 12 + 30?"}]


@pytest.fixture(scope="module")
def chatml_path(tmp_path_factory):
    return make_chatml(tmp_path_factory.mktemp("chatml"))


@pytest.fixture(scope="module")
def chatml(chatml_path):
    return load_tokenizer(chatml_path)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    return load_tokenizer(make_llama3(tmp_path_factory.mktemp("llama3")))


def test_special_ids(chatml, llama3):
    assert (chatml.bos_id, chatml.eos_id, chatml.eos_ids, chatml.pad_id) == (None, 2, (2, 0), 0)
    assert (llama3.bos_id, llama3.eos_id, llama3.eos_ids, llama3.pad_id) == (0, 5, (5, 1, 4), 5)
    assert chatml.vocab_size == llama3.vocab_size == 300


@settings(deadline=None, max_examples=150)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60), cut=st.integers(0, 60))
def test_any_text_round_trips_whole_and_in_parts(chatml, llama3, text, cut):
    for tokenizer in (chatml, llama3):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        parts = tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:])
        assert tokenizer.decode(parts) == text


def test_many_texts_give_what_each_gives(chatml, llama3):
    for tokenizer in (chatml, llama3):
        assert tokenizer.encode_many(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
        assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0])  # it has merges


def test_special_ids_give_no_text_and_foreign_ids_a_mark(chatml, llama3):
    for tokenizer in (chatml, llama3):
        five, seven = tokenizer.encode("5")[0], tokenizer.encode("7")[0]
        assert tokenizer.decode([five, *tokenizer.eos_ids, seven]) == "57"
        assert tokenizer.decode([five, 300, 100_000, seven]) == "5\ufffd7"
        assert tokenizer.decode([]) == ""


def test_a_plain_prompt_has_one_begin_of_sequence_where_the_tokenizer_writes_one(chatml, llama3):
    assert PromptFormat(chatml).tokens("What?") == tuple(chatml.encode("What?"))
    plain = PromptFormat(llama3).tokens("What?")
    assert plain == (0, *llama3.encode("What?"))
    assert PromptFormat(llama3).tokens("<|begin_of_text|>What?") == plain


def test_chatml_by_hand(chatml):
    text = "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    form = PromptFormat(chatml, apply_chat_template=True)
    assert form.render(QUESTION).text == form.render("What is 12 + 30?").text == text
    tokens = form.tokens(QUESTION)
    assert tokens == form.tokens("What is 12 + 30?") == tuple(chatml.encode(text))
    assert [i for i in tokens if i < 3] == [1, 2, 1]
    assert chatml.decode(tokens) == "user\nWhat is 12 + 30?\nassistant\n"


def test_llama3_by_hand_has_one_begin_of_sequence(llama3):
    form = PromptFormat(llama3, system_prompt="Be brief.")
    tokens = form.tokens(QUESTION)
    assert [i for i in tokens if i < 6] == [0, 2, 3, 5, 2, 3, 5, 2, 3]
    assert llama3.decode(tokens) == "system\n\nBe brief.user\n\nWhat is 12 + 30?assistant\n\n"


def test_a_conversations_own_system_message_stays(chatml):
    form = PromptFormat(chatml, apply_chat_template=True, system_prompt="Be brief.")
    own = [{"role": "system", "content": "Be kind."}, *QUESTION]
    assert "Be kind." in form.render(own).text and "Be brief." not in form.render(own).text
    assert form.render(QUESTION).text == form.render("What is 12 + 30?").text
    assert form.render(QUESTION).text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert own == [{"role": "system", "content": "Be kind."}, *QUESTION]


def test_tokens_are_those_of_the_library(chatml, chatml_path):
    """The oracle: the library renders and tokenizes in one call."""
    from transformers import AutoTokenizer

    library = AutoTokenizer.from_pretrained(chatml_path)
    encoded = library.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)
    assert tuple(encoded["input_ids"]) == PromptFormat(chatml).tokens(QUESTION)


def test_a_template_file_takes_the_place_of_the_directorys(chatml_path, tmp_path):
    template = "{% for m in messages %}Q: {{ m.content }} A:{% endfor %}"
    (tmp_path / "short.jinja").write_text(template)
    tokenizer = load_tokenizer(chatml_path, str(tmp_path / "short.jinja"))
    assert PromptFormat(tokenizer).render(QUESTION).text == "Q: What is 12 + 30? A:"
    with pytest.raises(ValueError, match="data.chat_template .*absent.jinja cannot be read"):
        load_tokenizer(chatml_path, str(tmp_path / "absent.jinja"))


def test_the_error_of_a_failing_template_is_shown(chatml_path, tmp_path):
    template = "{{ raise_exception('roles must alternate') }}"
    (tmp_path / "strict.jinja").write_text(template)
    tokenizer = load_tokenizer(chatml_path, str(tmp_path / "strict.jinja"))
    with pytest.raises(ValueError, match="refuses the messages .*12.*roles must alternate"):
        PromptFormat(tokenizer).tokens(QUESTION)


@pytest.fixture
def copy(chatml_path, tmp_path):
    """A copy of the directory that a test may damage."""
    return shutil.copytree(chatml_path, tmp_path / "copy")


def test_a_directory_without_template_takes_plain_texts_alone(copy):
    (copy / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(copy)
    assert tokenizer.decode(PromptFormat(tokenizer).tokens("12 + 30")) == "12 + 30"
    with pytest.raises(ValueError, match="copy has no chat template: name a template file with"):
        PromptFormat(tokenizer).tokens(QUESTION)


def test_directories_that_are_no_tokenizer(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is not a directory of Hugging Face tokenizer"):
        load_tokenizer(tmp_path / "empty")
    (copy / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="copy is not a directory of Hugging Face tokenizer files"):
        load_tokenizer(copy)


def test_an_end_must_be_there_and_known(copy):
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings["eos_token"] = None
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(copy).eos_ids == (2, 0)  # generation_config.json suffices
    (copy / "generation_config.json").write_text('{"eos_token_id": 999}')
    with pytest.raises(ValueError, match=r"end-of-sequence ids \[999\], which its tokenizer does"):
        load_tokenizer(copy)
    (copy / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="copy has no end-of-sequence token"):
        load_tokenizer(copy)
