"""The SentencePiece tokenizer: training, round trips, errors."""

from __future__ import annotations

import io

import pytest
import sentencepiece

from megatron_rpp.data.tasks import make_task
from megatron_rpp.data.tokenizer import load_tokenizer, train_sentencepiece

PARAMS = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2, "allow_negation": True}


@pytest.fixture(scope="module")
def sums():
    train, held_out = make_task(
        "chain_sum", PARAMS, train_size=600, eval_size=200, train_seed=1, eval_seed=2
    )
    return train, held_out


@pytest.fixture(scope="module")
def model(sums, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "sums.model"
    train_sentencepiece(texts_of(sums[0]), path, 64)
    return path


def texts_of(rows) -> list[str]:
    return [text for row in rows for text in (row["prompt"], row["label"])]


def pieces(path) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


def test_special_ids_and_size(model):
    tokenizer = load_tokenizer(model)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_ids) == (0, 2, (3,))
    assert pieces(model)[:4] == ["<pad>", "<unk>", "<s>", "</s>"]
    assert 4 < tokenizer.vocab_size == len(pieces(model)) <= 64


def test_digits_and_operators_stay_single_and_the_instruction_is_one_piece(model):
    long = [piece for piece in pieces(model)[4:] if len(piece) > 3]
    assert long and all(not set(piece) & set("0123456789+-=") for piece in long)
    assert "State▁the▁final▁answer▁to▁the▁following▁arithmetic▁problem:▁" in long
    tokenizer = load_tokenizer(model)
    prompt = "State the final answer to the following arithmetic problem: 23 - 60 ="
    # the instruction, 2, 3, " - ", 6, 0, " ="
    assert len(tokenizer.encode(prompt)) == 7
    assert [tokenizer.decode([i]) for i in tokenizer.encode("-137")] == ["-", "1", "3", "7"]


def test_held_out_text_round_trips_whole_and_in_parts(model, sums):
    tokenizer = load_tokenizer(model)
    for row in sums[1]:
        prompt, label = tokenizer.encode(row["prompt"]), tokenizer.encode(row["label"])
        assert tokenizer.decode(prompt) == row["prompt"]
        assert tokenizer.decode(label) == row["label"]
        assert tokenizer.decode(prompt + label) == row["prompt"] + row["label"]


@pytest.mark.parametrize("text", ["", " 5", "5 ", "  7 +  8", " + ", "-", " = 12 "])
def test_spaces_survive_anywhere(model, text):
    tokenizer = load_tokenizer(model)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_skips_special_ids_but_shows_unknown_pieces(model):
    tokenizer = load_tokenizer(model)
    five, seven = tokenizer.encode("5")[0], tokenizer.encode("7")[0]
    assert tokenizer.decode([2, five, seven, 3, 0, 0]) == "57"
    assert tokenizer.decode([five, 1, seven]) not in ("57", "5 7")
    assert tokenizer.encode("€") == [1]


def test_the_same_texts_give_the_same_file(model, sums, tmp_path):
    train_sentencepiece(iter(texts_of(sums[0])), tmp_path / "deep" / "again.model", 64)
    assert (tmp_path / "deep" / "again.model").read_bytes() == model.read_bytes()
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["again.model"]


def test_lines_tabs_and_other_scripts_round_trip(tmp_path):
    texts = ["1 2\n3 4\n\nwhat?\t(a)", "\r\nздравствуй 漢字 🙂", " ".join(map(str, range(1500)))]
    train_sentencepiece(texts, tmp_path / "t.model", 128)
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts


def test_training_is_silent(sums, tmp_path, capfd):
    train_sentencepiece([row["prompt"] for row in sums[0]], tmp_path / "t.model", 64)
    assert capfd.readouterr() == ("", "")


def test_too_few_pieces_for_the_characters(tmp_path):
    with pytest.raises(ValueError, match="task.vocab_size 8 pieces, raise it"):
        train_sentencepiece(["abcdefghijkl"], tmp_path / "t.model", 8)
    with pytest.raises(ValueError, match="no text"):
        train_sentencepiece(["", ""], tmp_path / "t.model", 8)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="absent.model is not a file or a directory: correct"):
        load_tokenizer(tmp_path / "absent.model")
    for content in (b"", b'{"model": "bpe"}'):
        (tmp_path / "other.model").write_bytes(content)
        with pytest.raises(ValueError, match="other.model is not a SentencePiece model"):
            load_tokenizer(tmp_path / "other.model")


def foreign_model(path, **ids: int):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 10),
        model_writer=model,
        vocab_size=8,
        model_type="char",
        hard_vocab_limit=False,
        minloglevel=2,
        **ids,
    )
    path.write_bytes(model.getvalue())
    return path


def test_models_of_others_may_lack_begin_and_padding_but_not_end(tmp_path):
    tokenizer = load_tokenizer(foreign_model(tmp_path / "a.model", bos_id=-1, eos_id=1, unk_id=0))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 1, 1)
    with pytest.raises(ValueError, match="b.model has no end-of-sequence piece"):
        load_tokenizer(foreign_model(tmp_path / "b.model", eos_id=-1))
