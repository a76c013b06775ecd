"""The layers of TransformerEngine against Megatron's own: the same parameters under other names.

The real modules are built on the CPU; their kernels need a GPU and are not run. Without
TransformerEngine all tests are skipped.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from megatron_rpp.checkpoint import state as checkpoint
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.checkpoint.weights import model_state
from megatron_rpp.config import CheckpointConfig, OptimizerConfig, ParallelConfig
from megatron_rpp.conversion.convert import to_hf_alone, to_megatron
from megatron_rpp.hf.families import canonical
from megatron_rpp.model import build
from megatron_rpp.model.decoder import decoders
from megatron_rpp.model.hf_weights import load_hf
from megatron_rpp.model.language_model import chunks
from megatron_rpp.model.optimizer import build_optimizer
from megatron_rpp.model.trained_model import TrainedModel
from megatron_rpp.parallel import accelerators, groups
from tests.distributed import run_ranks
from tests.hf.models import save
from tests.model.test_hf_weights import model_config

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import apply_factories

ENGINE = accelerators.TRANSFORMER_ENGINE
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not ENGINE.usable, reason=f"TransformerEngine: {ENGINE} {ENGINE.error or ''}"
    ),
]
FAMILIES = ("qwen2-tied", "qwen3")
"""Between them: biases, query-key norms, tied and untied embeddings."""
LAYOUTS = {
    "TP2": ParallelConfig(tensor=2),
    "TP2, sequence-parallel": ParallelConfig(tensor=2, sequence_parallel=True),
    "PP2": ParallelConfig(pipeline=2),
    "DP2": ParallelConfig(),
}
MARKS = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Hugging Face directories by family; a converted checkpoint lies next to each."""
    folder = tmp_path_factory.mktemp("engine")
    paths = {family: save(folder, family) for family in FAMILIES}
    for family, path in paths.items():
        to_megatron(path, folder / f"{family}-megatron")
    return paths


def built(directory, parallel, implementation, seed=8):
    model = replace(model_config(directory), transformer_impl=implementation)
    return build.build_model(model, parallel, vocab_size=model.vocab_size, seed=seed)


def parameters(stage):
    """Value and marks of every parameter, by its name in the table of the family."""
    found = {}
    for number, chunk in enumerate(chunks(stage)):
        for name, parameter in chunk.named_parameters():
            marks = {mark: vars(parameter).get(mark, False) for mark in MARKS}
            if not marks["tensor_model_parallel"]:  # what a whole parameter says of its parts
                del marks["partition_dim"], marks["partition_stride"]
            found[number, canonical(name)] = (parameter.detach(), marks)
    return found


def sharded(stage):
    """Where every tensor of a checkpoint lies in its whole, by key."""
    state = model_state(stage)
    apply_factories(state)
    return {
        (entry.key, entry.global_offset): (entry.global_shape, entry.local_shape, entry.replica_id)
        for entry in nested_values(state)
        if isinstance(entry, ShardedTensor)
    }


def compare(rank, directories, folder):
    """The differences on this rank, by layout and family; exports what DP2 and TP2 have saved."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    torch.cuda.is_available = lambda: True  # its modules ask for this, and build on the CPU
    problems = []
    for layout, parallel in LAYOUTS.items():
        groups.start(**parallel.sizes(), seed=1)
        for family, directory in directories.items():
            place = f"{layout}, {family}, rank {rank}"
            theirs, own = (
                built(directory, parallel, kind) for kind in ("transformer_engine", "local")
            )
            problems += differences(f"{place}: drawn", parameters(theirs), parameters(own))
            for stage in (theirs, own):
                load_hf(stage, directory)
            for ours, fused in zip(decoders(own), decoders(theirs), strict=True):
                if not same_weights(ours, fused):
                    problems.append(f"{place}: generation reads other weights")
            loaded = parameters(own)
            problems += differences(f"{place}: loaded", parameters(theirs), loaded)
            if sharded(theirs) != sharded(own):
                problems.append(
                    f"{place}: {set(sharded(theirs).items()) ^ set(sharded(own).items())}"
                )
            other = built(directory, parallel, "transformer_engine", seed=9)
            checkpoint.load_weights(other, directory.with_name(f"{directory.name}-megatron"))
            problems += differences(f"{place}: converted", parameters(other), loaded)
            export(theirs, directory, folder / layout / family)
        groups.destroy()
    return problems


def same_weights(first, second):
    """Whether two decoders read equal weights, and none where the other reads none."""
    for left, right in zip(first._layers, second._layers, strict=True):
        for name, weight in vars(left).items():
            other = getattr(right, name)
            if (weight is None) != (other is None):
                return False
            if weight is not None and not torch.equal(weight, other):
                return False
    return True


def differences(place, theirs, own):
    """What differs between two results of `parameters`."""
    found = [f"{place}: {name} is in one alone" for name in theirs.keys() ^ own.keys()]
    for name in theirs.keys() & own.keys():
        (value, marks), (value_there, marks_there) = theirs[name], own[name]
        if marks != marks_there:
            found.append(f"{place}: {name} {marks} {marks_there}")
        if value.shape != value_there.shape or not torch.equal(value, value_there):
            found.append(f"{place}: {name} has other values")
    return found


def export(stage, directory, folder):
    """Saves the model as a run does, and converts the checkpoint to Hugging Face."""
    model = build.wrap_for_training(stage, distributed_optimizer=True)
    optimizer = build_optimizer(model, OptimizerConfig(), bf16=False)
    pending = checkpoint.save(
        TrainedModel(model, *optimizer),
        RunState(step=1),
        CheckpointConfig(dir=str(folder / "saved")),
    )
    path = pending.publish()
    if groups.is_main():
        to_hf_alone(path, folder / "exported")


def test_parameters_shards_and_conversion_are_those_of_the_local_layers(directories, tmp_path):
    for problems in run_ranks(compare, 2, tmp_path, directories, tmp_path, timeout=540):
        assert not problems, "\n".join(problems)
    for layout in LAYOUTS:
        for family, directory in directories.items():
            exported = tmp_path / layout / family / "exported"
            first, second = (tensors(folder) for folder in (directory, exported))
            assert first.keys() == second.keys()
            assert all(torch.equal(first[name], second[name]) for name in first)


def tensors(directory):
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found
