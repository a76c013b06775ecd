"""Classifiers in config.json: one label, the token that pads, and no policy starts from one.

tests/model/test_hf_classifiers.py compares their scores with transformers.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pytest

from megatron_rpp.config import CheckpointConfig, Config, ModelConfig, cli
from megatron_rpp.config.infer_settings import HF_FOLDER, infer_settings
from megatron_rpp.conversion.convert import to_megatron
from megatron_rpp.hf.architecture import read_architecture
from megatron_rpp.hf.classifier import padding_json
from megatron_rpp.runtime.initial_weights import check_initial_weights
from tests.hf.models import save
from tests.hf.test_config_json import theirs, write

CLASSIFIER = {"architectures": ["Qwen2ForSequenceClassification"]}


@pytest.mark.parametrize(
    "values",
    [{"num_labels": 1}, {"id2label": {"0": "LABEL_0"}}, {"num_labels": 1, "id2label": {"0": "good"}}],
)  # fmt: skip
def test_a_classifier_with_one_label_has_a_score_head(tmp_path, values):
    found = read_architecture(write(tmp_path, "qwen2", **CLASSIFIER, **values))
    assert theirs(tmp_path).num_labels == 1
    assert found.name == "Qwen2ForSequenceClassification"
    assert found.settings == read_architecture(write(tmp_path, "qwen2")).settings | {
        "head": "score"
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "num_labels is absent, .* means 2 labels: set num_labels to 1 if score.weight has one"),
        ({"id2label": {}}, "num_labels is absent"),
        ({"num_labels": 2}, "num_labels is 2: only classifiers with one label .reward models. are"),
        ({"num_labels": True}, "num_labels is true: only"),
        ({"id2label": {"0": "no", "1": "yes"}}, "id2label names 2 labels: only classifiers"),
        ({"id2label": {"0": "no", "1": "yes"}, "num_labels": 1}, "id2label names 2 labels"),
        ({"id2label": {"0": "good"}, "num_labels": 2}, "num_labels is 2, but id2label names 1"),
        ({"id2label": ["good"]}, "id2label must be an object"),
    ],
)  # fmt: skip
def test_several_labels_are_an_error(tmp_path, values, message):
    with pytest.raises(ValueError, match=message) as refused:
        read_architecture(write(tmp_path, "qwen2", **CLASSIFIER, **values))
    assert str(refused.value).startswith(str(tmp_path / "config.json"))


TOKENIZER = {"added_tokens": [{"id": 7, "content": "<pad>"}, {"id": 2, "content": "</s>"}]}


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        ({"pad_token_id": 5, "eos_token_id": 2}, {}, 5),
        ({}, {"generation_config": {"pad_token_id": 6}}, 6),
        ({"pad_token_id": -1}, {"generation_config": {"pad_token_id": 6}}, 6),
        ({}, {"tokenizer_config": {"pad_token": "<pad>"}, "tokenizer": TOKENIZER}, 7),
        ({}, {"tokenizer_config": {"pad_token": {"content": "<pad>"}}, "tokenizer": TOKENIZER}, 7),
        ({}, {"tokenizer_config": {"pad_token": "<other>"}, "tokenizer": TOKENIZER}, None),
        ({}, {"tokenizer_config": {"pad_token": "<pad>"}}, None),
        # The score would be read before the end of the sequence.
        ({"eos_token_id": 6}, {"generation_config": {"pad_token_id": 6}}, None),
        (
            {"eos_token_id": [1, 2]},
            {"tokenizer_config": {"pad_token": "</s>"}, "tokenizer": TOKENIZER}, None,
        ),
        ({}, {}, None),
    ],
)  # fmt: skip
def test_the_padding_of_the_language_model_is_kept_if_it_is_known(
    tmp_path, config, files, expected
):
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = padding_json(tmp_path, config)
    assert found == ({} if expected is None else {"pad_token_id": expected})


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier's directory and its conversion, with side files and without."""
    folder = tmp_path_factory.mktemp("classifier")
    path = save(folder, "qwen2-score")
    to_megatron(path, folder / "megatron")
    shutil.copytree(folder / "megatron", folder / "bare")
    shutil.rmtree(folder / "bare" / HF_FOLDER)
    return folder


MESSAGE = "holds a reward model (a classifier with one label)"


@pytest.mark.parametrize("program", ["train", "sft"])
@pytest.mark.parametrize("word", ["hf_path={}/qwen2-score", "init_path={}/megatron"])
def test_a_policy_of_a_classifier_is_refused_with_its_settings(classifier, capfd, program, word):
    with pytest.raises(SystemExit, match="2"):
        cli.parse([f"--model.{word.format(classifier)}"], program)
    shown = capfd.readouterr().err
    assert shown.startswith(f"error: {classifier}") and shown.count("\n") == 1
    assert MESSAGE in shown and "give the directory of a language model" in shown


@pytest.mark.parametrize("setting", ["init_path", "load"])
def test_a_checkpoint_without_side_files_is_refused_before_a_model_is_built(
    classifier, tmp_path, setting
):
    bare, saved = str(classifier / "bare"), str(tmp_path)
    config = Config(
        model=ModelConfig(init_path=bare if setting == "init_path" else None),
        checkpoint=CheckpointConfig(dir=saved, load=bare if setting == "load" else None),
    )
    with pytest.raises(ValueError, match="bare/release holds a reward model"):
        check_initial_weights(config)
    check_initial_weights(config, scalar=True)


def test_a_reward_model_starts_from_another_one(classifier):
    settings = asdict(Config(model=ModelConfig(hf_path=str(classifier / "qwen2-score"))))
    infer_settings(settings, ModelConfig(), scalar=True)
    assert settings["model"]["hidden"] == 32 and settings["model"]["qkv_bias"]
    assert "head" not in settings["model"]
