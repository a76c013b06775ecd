"""Random weights that depend on the seed and the parameter's global name, never on the layout.

Every rank draws the whole parameter from a generator seeded by (seed, name) and keeps its own
shard, so TP2 and PP2 start from the same bits as one process. This needs host memory for one whole
parameter at a time; large models start from a checkpoint anyway.
"""

from __future__ import annotations

import hashlib
import math

import torch

from megatron_rpp.hf.families import SCORE
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.model.language_model import LanguageModel

# The std of projections into the residual stream is smaller by 1/sqrt(2·layers) (GPT-2).
RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


def is_tensor_sharded(parameter: torch.nn.Parameter) -> bool:
    """Whether the tensor-parallel ranks hold different shards of it."""
    return bool(vars(parameter).get("tensor_model_parallel"))


def global_name(model: LanguageModel, name: str) -> str:
    """Replaces the layer's number in this pipeline stage by its number in the whole model."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    return ".".join(parts)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _local_shard(
    whole: torch.Tensor, *, dim: int, blocks: int, rank: int, size: int
) -> torch.Tensor:
    """Cuts this rank's shard along `dim`; each of `blocks` stacked matrices (gate, up) is split."""
    pieces = [block.chunk(size, dim)[rank] for block in whole.chunk(blocks, dim)]
    return torch.cat(pieces, dim)


def _scale(model: LanguageModel, name: str, std: float) -> float:
    """The standard deviation of a matrix. Scores begin near 0 (arXiv 2009.01325, appendix B)."""
    if name == SCORE:
        return 1 / (model.config.hidden_size + 1)
    residual = name.endswith(RESIDUAL_OUTPUTS)
    return std / math.sqrt(2 * model.config.num_layers) if residual else std


@torch.no_grad()
def clear(model: LanguageModel) -> None:
    """Sets all weights to zero. Drawing large ones takes minutes, and others replace them."""
    for parameter in model.parameters():
        parameter.zero_()


@torch.no_grad()
def fill(model: LanguageModel, std: float, seed: int) -> None:
    """Draws every matrix of `model` from N(0, std²); sets norm weights to one, biases to zero."""
    for name, parameter in model.named_parameters():
        heartbeat.current.beat()
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            _draw(model, name, parameter, std=std, seed=seed)


@torch.no_grad()
def fill_score(model: LanguageModel, seed: int) -> None:
    """Draws the head of a critic or a reward model, if the chunk has one, and nothing else."""
    for name, parameter in model.named_parameters():
        if name == SCORE:
            _draw(model, name, parameter, std=0.0, seed=seed)


def _draw(
    model: LanguageModel, name: str, parameter: torch.nn.Parameter, *, std: float, seed: int
) -> None:
    """Draws a whole matrix and keeps this rank's shard."""
    tensor = model.pg_collection.tp
    sharded = is_tensor_sharded(parameter)
    shape, dim = list(parameter.shape), vars(parameter)["partition_dim"] if sharded else 0
    size = tensor.size() if sharded else 1
    shape[dim] *= size
    whole = torch.empty(shape, device="cpu", dtype=torch.float32)
    scale = _scale(model, name, std)
    whole.normal_(0.0, scale, generator=_generator(seed, global_name(model, name)))
    blocks = 2 if name.endswith("linear_fc1.weight") else 1
    shard = _local_shard(
        whole, dim=dim, blocks=blocks, rank=tensor.rank() if sharded else 0, size=size
    )
    parameter.copy_(shard.to(parameter.dtype))
