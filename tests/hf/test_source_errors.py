"""Directories that versions of transformers would read differently, or not at all, are errors.

The check itself, the converter and a run that loads them name the cause with absolute paths.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_rpp.config import ParallelConfig
from megatron_rpp.conversion.convert import to_megatron
from megatron_rpp.hf.safetensors_in import INDEX, SINGLE
from megatron_rpp.hf.source import check_source
from megatron_rpp.model import build
from megatron_rpp.model.hf_weights import load_hf
from megatron_rpp.parallel import groups
from tests.hf import odd
from tests.hf.models import edit, save, set_config
from tests.hf.odd import EMBEDDING, HEAD
from tests.model.test_hf_weights import model_config
from tools import convert_hf_to_megatron

SCORE = "score.weight"
LATE_NORM = "model.layers.3.input_layernorm.weight"


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A model on one rank, to load weights into."""
    model = model_config(save(tmp_path_factory.mktemp("plain"), "llama2"))
    groups.start(1, 1, seed=1)
    yield build.build_model(model, ParallelConfig(), vocab_size=model.vocab_size, seed=8)
    groups.stop()


def one_value_differs(tensors: odd.Tensors) -> None:
    odd.stored_head(tensors)
    tensors[HEAD][-1, -1] += 1


def more_rows(tensors: odd.Tensors) -> None:
    tensors[HEAD] = torch.cat([tensors[EMBEDDING], tensors[EMBEDDING][:3]])


def without_prefix(tensors: odd.Tensors) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def only_pickled(directory: Path) -> None:
    odd.pickled(directory)
    (directory / SINGLE).unlink()


def only_an_adapter(directory: Path) -> None:
    (directory / "config.json").rename(directory / "adapter_config.json")


def dangling(directory: Path) -> None:
    (directory / SINGLE).unlink()
    (directory / SINGLE).symlink_to("/nowhere/model.safetensors")


def cut(size: int) -> odd.Change:
    """Cuts a file off after its first bytes."""

    def truncate(directory: Path) -> None:
        (directory / SINGLE).write_bytes((directory / SINGLE).read_bytes()[:size])

    return truncate


MANY = "30KB"  # size of a file, so that there are many
ERRORS = {
    # transformers 4 ties the head anyway, 5 keeps both.
    "a tied head that differs": (
        "smollm2", odd.tensors(one_value_differs),
        r"config.json ties the embeddings, but lm_head.weight in .*/model.safetensors differs from "
        r"model.embed_tokens.weight: set tie_word_embeddings to false",
    ),
    "a tied head of another shape": (
        "smollm2", odd.tensors(more_rows), "lm_head.weight in .* differs from",
    ),
    "a tied head, no embedding": (
        "smollm2", odd.tensors(lambda t: t.update({HEAD: t.pop(EMBEDDING)})),
        "lacks model.embed_tokens.weight",
    ),
    "no head, not tied": (
        "llama2", odd.tensors(lambda t: t.pop(HEAD)), "lacks lm_head.weight",
    ),
    "two files hold one tensor": (
        "llama2", odd.in_two_shards(lambda tensor: tensor + 1),
        "both hold model.embed_tokens.weight, with different values", MANY,
    ),
    # transformers 5 reads the tensor, 4 draws a random one.
    "a tensor that the index does not list": (
        "llama2", odd.index(lambda files: files.pop(HEAD)),
        "holds lm_head.weight, which model.safetensors.index.json does not list", MANY,
    ),
    "a tensor that no file holds": (
        "llama2", odd.index(lambda files: files.update({"more": files[HEAD]})),
        "does not hold more, which model.safetensors.index.json says it does", MANY,
    ),
    "files without their index": (
        "llama2", lambda directory: (directory / INDEX).unlink(),
        "but model-00001-of-.*: fetch the index that belongs to it", MANY,
    ),
    "a file of the index is missing": (
        "llama2", lambda directory: odd.shards(directory)[1].unlink(),
        r"model-00002-of-\d+.safetensors cannot be read \(FileNotFoundError", MANY,
    ),
    "pickled weights alone": (
        "llama2", only_pickled, "but pytorch_model.bin: pickled weights are not read",
    ),
    "other weights alone": (
        "llama2", odd.renamed("consolidated.safetensors"),
        "but consolidated.safetensors: only files named as save_pretrained names them are read",
    ),
    "a broken link": ("llama2", dangling, "but model.safetensors: it is a broken link"),
    # The result depends on whether peft is installed.
    "an adapter beside": (
        "llama2", odd.text("adapter_config.json", "{}"),
        "adapter_config.json: with peft installed transformers loads this adapter on top",
    ),
    "an adapter alone": (
        "llama2", only_an_adapter, "has no config.json: it holds an adapter .* merge it into",
    ),
    # transformers 5 reads this file, 4 the others.
    "a distributed checkpoint beside": (
        "llama2", odd.beside("shard-00001-model-00001-of-00001.safetensors"),
        "shard-00001-model-00001-of-00001.safetensors is part of a distributed checkpoint",
    ),
    "names without 'model.'": (
        "smollm2", odd.tensors(without_prefix),
        "lacks model.embed_tokens.weight.*do not begin with 'model.'.*AutoModelForCausalLM",
    ),
    "a classifier's names without 'model.'": (
        "llama-score", odd.tensors(without_prefix),
        "do not begin with 'model.'.*load it with AutoModelForSequenceClassification",
    ),
    "a classifier with an output projection": (
        "llama-score", odd.tensors(odd.stored_head),
        r"also has lm_head.weight \(1 in all\): config.json names a classifier .* of a language model",
    ),
    "a language model as a classifier": (
        "llama2", partial(set_config, architectures=["LlamaForSequenceClassification"], num_labels=1),
        r"lacks score.weight \(1 in all\): config.json names a classifier .*: name ForCausalLM",
    ),
    "a classifier without its head": (
        "llama-score", odd.tensors(lambda t: t.pop(SCORE)), "lacks score.weight .* without its head",
    ),
    "a classifier with two labels": (
        "llama-score", odd.tensors(lambda t: t.update({SCORE: t[SCORE].repeat(2, 1)})),
        "another shape score.weight .* it has 2 labels, but config.json says 1",
    ),
    "a classifier as a language model": (
        "qwen3-score", partial(set_config, architectures=["Qwen3ForCausalLM"]),
        "lacks lm_head.weight .*of a classifier: name its architecture",
    ),
    "broken generation settings": (
        "llama2", odd.text("generation_config.json", '{"eos'),
        "generation_config.json cannot be read",
    ),
    "a header cut off": ("llama2", cut(100), "model.safetensors cannot be read .*header"),
    "values cut off": ("llama2", cut(-9), "model.safetensors cannot be read"),
    "an empty file": ("llama2", cut(0), "model.safetensors cannot be read .*header too small"),
    "a pointer of Git LFS": (
        "llama2", odd.text(SINGLE, "version https://git-lfs.github.com/spec/v1\n"),
        "model.safetensors cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_ambiguous_directories_are_errors_that_name_the_cause(stage, tmp_path, case):
    family, change, message, *shards = ERRORS[case]
    directory = odd.made(tmp_path, family, change, *shards)
    with pytest.raises(ValueError, match=message) as refused:
        check_source(directory)
    assert str(directory) in str(refused.value)
    with pytest.raises(ValueError, match=message):
        to_megatron(directory, tmp_path / "megatron")
    with pytest.raises(ValueError, match=message):
        load_hf(stage, directory)


INDICES = {
    "a list": ("[]", "must hold a JSON object .* got list"),
    "cut off": ('{"weight_map": {"lm_', r"cannot be read \(JSONDecodeError"),
    "empty": ("", r"cannot be read \(JSONDecodeError"),
    "without its map": ("{}", "has no 'weight_map' that names files"),
    "null": ({"weight_map": None}, "has no 'weight_map' that names files"),
    "of a list": ({"weight_map": ["lm_head.weight"]}, "weight_map must be an object"),
    "a number": ({"weight_map": {HEAD: 7}}, "weight_map.lm_head.weight is 7, which is not a file"),
    "outside": ({"weight_map": {HEAD: "../secret"}}, 'is "../secret", which is not a file name'),
    "absolute": ({"weight_map": {HEAD: "/etc/passwd"}}, "which is not a file name"),
}


@pytest.mark.parametrize("case", INDICES)
def test_a_broken_index_ends_in_one_line(tmp_path, capfd, case):
    content, message = INDICES[case]
    directory = save(tmp_path, "llama2", MANY)
    (directory / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))
    words = ["--hf-path", str(directory), "--megatron-path", str(tmp_path / "out")]
    capfd.readouterr()
    assert convert_hf_to_megatron.main(words) == 2
    shown = capfd.readouterr().err
    assert shown.startswith(f"error: {directory / INDEX}") and shown.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        check_source(directory)


def test_the_layers_of_a_stack_have_one_type(tmp_path):
    """Megatron stacks the layers in one type, so the bits of another type would be lost."""
    directory = odd.made(tmp_path, "llama2", odd.tensors(odd.half))
    edit(directory, lambda tensors: tensors.update({LATE_NORM: tensors[LATE_NORM].bfloat16()}))
    message = "layers.0.input_layernorm.weight is stored as torch.float32, .*layers.3.*bfloat16"
    with pytest.raises(ValueError, match=message):
        to_megatron(directory, tmp_path / "megatron")
