"""Unusual directories give the same function as in transformers, converted or loaded directly.

Directories with errors are in test_source_errors.py, config.json is in test_config_json.py.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_rpp.config import ParallelConfig
from megatron_rpp.conversion.convert import to_hf, to_megatron
from megatron_rpp.conversion.models import HfModel
from megatron_rpp.hf.safetensors_in import SINGLE, Weights
from megatron_rpp.model import build
from megatron_rpp.model.hf_weights import load_hf
from megatron_rpp.parallel import groups
from tests.hf import odd
from tests.hf.models import edit, logits, set_config
from tests.hf.odd import EMBEDDING, HEAD, NORM
from tests.model.test_hf_weights import TOKENS, model_config, our_logits


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    groups.start(1, 1, seed=1)
    yield
    groups.stop()


def bf16_head(tensors: odd.Tensors) -> None:
    tensors[EMBEDDING] = tensors[EMBEDDING].bfloat16().float()
    tensors[HEAD] = tensors[EMBEDDING].bfloat16()


def exchanged(files: dict[str, str]) -> None:
    files[EMBEDDING], files[NORM] = files[NORM], files[EMBEDDING]


MANY = "30KB"  # size of a file, so that there are many
ACCEPTED = {
    "a tied head, stored too": ("smollm2", odd.tensors(odd.stored_head)),
    "the same in another type": ("smollm2", odd.tensors(bf16_head)),
    "an older save beside": ("llama2", odd.older_save),
    "an older index beside": ("llama2", odd.older_index),
    "the index names another of its files": ("llama2", odd.index(exchanged), MANY),
    "two files hold one tensor alike": ("llama2", odd.in_two_shards(torch.clone), MANY),
    "pickled weights beside": ("llama2", odd.pickled),
    "other weights beside": ("llama2", odd.beside("consolidated.safetensors")),
    "a variant beside": ("llama2", odd.beside("model.fp16.safetensors")),
    "norms in another type": ("llama2", odd.tensors(odd.half)),
    "another type in config.json": ("llama2", partial(set_config, dtype="bfloat16")),
}


@torch.no_grad()
def their_weights(directory: Path) -> odd.Tensors:
    """The tensors that transformers reads, in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True
    )
    return model.state_dict()


@pytest.mark.parametrize("case", ACCEPTED)
def test_an_odd_directory_is_the_function_that_transformers_makes_of_it(tmp_path, case):
    directory = odd.made(tmp_path, *ACCEPTED[case])
    expected, weights = logits(directory, TOKENS), their_weights(directory)
    source = HfModel(directory)
    for name in (name for row in source.rows for name in row.hf):
        assert torch.equal(source.weights.read(name).float(), weights[name]), name

    model = model_config(directory)
    stage = build.build_model(model, ParallelConfig(), vocab_size=model.vocab_size, seed=8)
    load_hf(stage.requires_grad_(False), directory)
    bound = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(our_logits(stage), expected, rtol=0, atol=bound)

    to_megatron(directory, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back")
    assert torch.equal(logits(tmp_path / "back", TOKENS), expected)
    assert {file.name for file in (tmp_path / "back").glob("*.safetensors*")} == {SINGLE}


def test_large_tensors_are_compared_in_parts(tmp_path, monkeypatch):
    """Two embeddings are never in memory at once, and a value of the last row counts like any
    other."""
    directory = odd.made(tmp_path, "smollm2", odd.tensors(odd.stored_head))
    monkeypatch.setattr("megatron_rpp.hf.safetensors_in._COMPARED", 7 * 32 * 4)
    parts, plain = [], Weights._part

    def counting(self, *args, **kwargs):
        parts.append(plain(self, *args, **kwargs))
        return parts[-1]

    monkeypatch.setattr(Weights, "_part", counting)
    assert Weights(directory).same(EMBEDDING, HEAD)
    assert [len(part) for part in parts] == [7] * 28 + [3] * 2  # 101 rows of each
    edit(directory, lambda tensors: tensors[HEAD][-1, -1].add_(1))
    assert not Weights(directory).same(EMBEDDING, HEAD)


def test_surprising_directories_are_logged(tmp_path):
    directory = odd.made(tmp_path, "llama2", odd.older_index)
    set_config(directory, dtype="bfloat16")
    said: list[str] = []
    to_megatron(directory, tmp_path / "megatron", log=said.append)
    assert [note.removeprefix(str(directory)) for note in said] == [
        "/config.json says bfloat16, the files hold float32: each weight keeps the type it is "
        "stored in",
        "/model.safetensors is read, as transformers does, and not the files that "
        "model.safetensors.index.json beside it names",
    ]


def test_the_type_is_written_under_either_name_of_its_key(tmp_path):
    """transformers prefers `dtype`. The old value would round the exported weights."""
    both = partial(set_config, dtype="float16", torch_dtype="bfloat16")
    to_megatron(odd.made(tmp_path, "llama2", both), tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back")
    content = json.loads((tmp_path / "back/config.json").read_text())
    assert content["dtype"] == content["torch_dtype"] == "float32"
