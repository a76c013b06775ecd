"""Both names of the norms of a layer: TransformerEngine's fused modules and Megatron's own.

Fused modules hold a norm in the linear layer that follows it (`linear_qkv.layer_norm_weight`);
Megatron's modules keep it separate (`input_layernorm`). TransformerEngine does not run on CPUs. So
Megatron's own saving writes checkpoints here under the fused names, with the objects that fused
modules add, and the parameters are loaded into a model that does run.
"""

from __future__ import annotations

import io
import shutil

import pytest
import torch

from megatron_rpp.config import ParallelConfig
from megatron_rpp.conversion.convert import to_hf
from megatron_rpp.hf.safetensors_in import Weights
from megatron_rpp.model import build
from megatron_rpp.model.hf_weights import load_hf
from megatron_rpp.parallel import groups
from tests.hf.models import SIZES, save
from tests.model.test_hf_weights import model_config

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

LAYERS = SIZES["num_hidden_layers"]
NORMS = {
    "fused": ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"),
    "local": ("input_layernorm.weight", "pre_mlp_layernorm.weight"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tmp_path_factory.mktemp("naming"), "qwen3")


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    groups.start(1, 1, seed=1)
    yield
    groups.stop()


def layer(tensors: dict[str, torch.Tensor], number: int, naming: str) -> dict[str, torch.Tensor]:
    """A layer of Qwen3 under Megatron's names, merged by hand: two queries per key-value head."""
    own = {
        name.removeprefix(f"model.layers.{number}.").removesuffix(".weight"): value
        for name, value in tensors.items()
        if name.startswith(f"model.layers.{number}.")
    }
    q, k, v = (own[f"self_attn.{letter}_proj"].split(12) for letter in "qkv")
    qkv = [q[0], q[1], k[0], v[0], q[2], q[3], k[1], v[1]]
    before_attention, before_mlp = NORMS[naming]
    return {
        before_attention: own["input_layernorm"],
        "self_attention.linear_qkv.weight": torch.cat(qkv),
        "self_attention.q_layernorm.weight": own["self_attn.q_norm"],
        "self_attention.k_layernorm.weight": own["self_attn.k_norm"],
        "self_attention.linear_proj.weight": own["self_attn.o_proj"],
        before_mlp: own["post_attention_layernorm"],
        "mlp.linear_fc1.weight": torch.cat([own["mlp.gate_proj"], own["mlp.up_proj"]]),
        "mlp.linear_fc2.weight": own["mlp.down_proj"],
    }


def sharded(tensors: dict[str, torch.Tensor], naming: str) -> dict:
    """The state that Megatron would pass to its saving."""
    whole = {
        "embedding.word_embeddings.weight": tensors["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": tensors["model.norm.weight"],
        "output_layer.weight": tensors["lm_head.weight"],
    }
    state = {n: ShardedTensor.from_rank_offsets(n, value) for n, value in whole.items()}
    for number in range(LAYERS):
        place = {"prepend_axis_num": 1}
        for name, value in layer(tensors, number, naming).items():
            state[f"{number} {name}"] = ShardedTensor.from_rank_offsets(
                f"decoder.layers.{name}", value, (0, number, LAYERS), **place
            )
        if naming == "fused":  # the FP8 scales that every module of TransformerEngine stores
            name = "self_attention.linear_qkv._extra_state"
            state[f"{number} {name}"] = ShardedObject(
                f"decoder.layers.{name}", io.BytesIO(b"scales"), (LAYERS,), (number,)
            )
    return {"model": state, "iteration": 7}


@pytest.mark.parametrize("naming", NORMS)
def test_a_checkpoint_of_either_naming_becomes_the_same_bits(source, tmp_path, naming):
    files = Weights(source)
    tensors = {name: files.read(name).clone() for name in files.shapes}
    folder = tmp_path / "iter_0000007"
    folder.mkdir()
    dist_checkpointing.save(sharded(tensors, naming), str(folder))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    shutil.copytree(source, tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors*"))
    to_hf(tmp_path, tmp_path.with_name(f"{tmp_path.name}-back"))
    back = Weights(tmp_path.with_name(f"{tmp_path.name}-back"))
    assert back.shapes.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(back.read(name), value), name


def test_a_model_with_fused_names_is_filled_from_hugging_face(source):
    model = model_config(source)
    stage = build.build_model(model, ParallelConfig(), vocab_size=model.vocab_size, seed=8)
    expected = build.build_model(model, ParallelConfig(), vocab_size=model.vocab_size, seed=9)
    load_hf(expected, source)
    for block in stage[0].decoder.layers:
        for linear, norm in (
            (block.self_attention.linear_qkv, "input_layernorm"),
            (block.mlp.linear_fc1, "pre_mlp_layernorm"),
        ):
            linear.register_parameter("layer_norm_weight", getattr(block, norm).weight)
            setattr(block, norm, torch.nn.Identity())
    load_hf(stage, source)
    for ours, theirs in zip(stage[0].decoder.layers, expected[0].decoder.layers):
        pairs = {
            ours.self_attention.linear_qkv.layer_norm_weight: theirs.input_layernorm.weight,
            ours.mlp.linear_fc1.layer_norm_weight: theirs.pre_mlp_layernorm.weight,
            ours.self_attention.linear_qkv.weight: theirs.self_attention.linear_qkv.weight,
        }
        assert all(torch.equal(own, other) for own, other in pairs.items())
        assert len(pairs) == 3 and theirs.input_layernorm.weight.std() > 0.1
