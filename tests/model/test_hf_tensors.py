"""A running model as Hugging Face tensors: on every layout, the tensors it was loaded from, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_rpp.config import ModelConfig, ParallelConfig
from megatron_rpp.config.model import RopeScalingConfig
from megatron_rpp.hf.architecture import read_architecture
from megatron_rpp.model import build, hf_tensors
from megatron_rpp.model.hf_weights import load_hf
from megatron_rpp.parallel import groups
from tests.distributed import run_ranks
from tests.hf.models import save

pytestmark = pytest.mark.slow

LAYOUTS = [
    ParallelConfig(tensor=2),
    ParallelConfig(pipeline=2, virtual_pipeline=2),
    ParallelConfig(context=2),
    ParallelConfig(),  # two replicas
]
FAMILIES = ("qwen2-tied", "qwen3")


def model_of(directory, parallel):
    settings = dict(read_architecture(directory).settings)
    settings["rope_scaling"] = RopeScalingConfig(**settings["rope_scaling"])
    model = ModelConfig(**settings)
    stage = build.build_model(model, parallel, vocab_size=model.vocab_size, seed=8)
    load_hf(stage, directory)
    return stage


def gather_all(rank, directories):
    for directory in directories:
        files = directory.glob("*.safetensors")
        expected = {name: tensor for file in files for name, tensor in load_file(file).items()}
        for parallel in LAYOUTS:
            groups.start(**parallel.sizes(), seed=1)
            stage = model_of(directory, parallel)
            shared = [part for row in hf_tensors.shared_out(stage) for part in row]
            check(expected, groups.gather_objects(shared, dist.group.WORLD), parallel)
            everything = [part for row in hf_tensors.on_every_rank(stage) for part in row]
            check(expected, [everything], parallel)
            names = [name for row in hf_tensors.all_rows(stage) for name in row.hf]
            assert [name for name, _ in everything] == names
            groups.destroy()


def check(expected, parts, parallel):
    """Checks that together the parts are the expected tensors, each once."""
    found = [item for part in parts for item in part]
    assert len(found) == len(expected), parallel
    assert all(parts), f"a rank of {parallel} had nothing to do"
    for name, tensor in found:
        assert torch.equal(tensor, expected[name]), (name, parallel)


def test_the_tensors_are_those_of_the_source_on_every_layout(tmp_path):
    run_ranks(gather_all, 2, tmp_path, [save(tmp_path, family) for family in FAMILIES])
