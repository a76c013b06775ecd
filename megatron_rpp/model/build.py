"""Builds policy, reference, critic and reward model from the configuration, with the same builder.

With TransformerEngine the layers use Megatron's fused linear and norm modules, without it the local
ones and our RMSNorm. Core attention is ours in both cases, because it holds the key-value cache.

A rank's part of the model is a ModuleList of one chunk, or of parallel.virtual_pipeline interleaved
chunks.

Left out: mixture of experts, stages of different sizes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megatron_rpp.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_rpp.config.model import padded_vocab_size
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.model import initialization
from megatron_rpp.model.attention import CoreAttention
from megatron_rpp.model.language_model import LanguageModel, chunks
from megatron_rpp.model.norm import RMSNorm
from megatron_rpp.model.overlap import Overlap
from megatron_rpp.model.rotary import inverse_frequencies
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

INFERENCE = TrainConfig()
"""For a model that is not trained: no backward pass needs activations."""
DEFAULT_LAYOUT = ParallelConfig()


def _no_init(parameter: torch.Tensor) -> torch.Tensor:
    return parameter


def recompute_options(train: TrainConfig) -> dict[str, Any]:
    """Megatron's settings for train.recompute (Chen et al., arXiv 1604.06174; selective: Korthikanti
    et al., arXiv 2205.05198)."""
    if train.recompute == "none":
        return {}
    if train.recompute == "selective":
        # Our attention keeps no score matrix, so the feed-forward networks keep the most.
        return {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    return {
        "recompute_granularity": "full",
        "recompute_method": train.recompute_method,
        "recompute_num_layers": train.recompute_layers,
    }


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, train: TrainConfig = INFERENCE
) -> TransformerConfig:
    """Returns Megatron's configuration of a Llama-like decoder: RMSNorm, SwiGLU."""
    bf16, virtual = model.dtype == "bf16", parallel.virtual_pipeline
    dtype = torch.bfloat16 if bf16 else torch.float32
    implementation = devices.transformer_impl(model.transformer_impl)
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn_hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads or model.heads,
        kv_channels=model.head_dim or model.hidden // model.heads,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Megatron must run its initialisation, because it marks the sharded parameters there.
        # initialization.py sets the values afterwards, so none are drawn here.
        init_method=_no_init,
        output_layer_init_method=_no_init,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=bf16,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        # Interleaved stages send forward and backward at once. With two stages both messages go to
        # the same rank, which mixes them up if they are batched. So each is sent separately.
        overlap_p2p_comm=virtual > 1,
        batch_p2p_comm=virtual == 1,
        variable_seq_lengths=False,  # all rows of a pass have the same length (planning.py)
        moe_token_dispatcher_type="alltoall",  # Megatron checks it even without experts
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=devices.has_apex(),
        # The angles of a packed row are gathered by position, so the kernel sees one plain sequence.
        apply_rope_fusion=implementation == "transformer_engine",
        bias_activation_fusion=not devices.ON_CPU,
        bias_dropout_fusion=not devices.ON_CPU,
        masked_softmax_fusion=False,
        transformer_impl=implementation,
        persist_layer_norm=implementation == "transformer_engine",
        deterministic_mode=train.deterministic,
        **recompute_options(train),
    )


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Returns TransformerEngine's layer or Megatron's own, as `config` says; attention is ours."""
    qk_norm = config.qk_layernorm
    if config.transformer_impl == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization="RMSNorm")
        spec.submodules.input_layernorm = RMSNorm
        spec.submodules.pre_mlp_layernorm = RMSNorm
        if qk_norm:
            attention = spec.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = CoreAttention
    return spec


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    vocab_size: int,
    seed: int | None,
    train: TrainConfig = INFERENCE,
    kind: type[LanguageModel] = LanguageModel,
) -> torch.nn.ModuleList:
    """Builds this rank's chunks on its device.

    Args:
        seed: weights are drawn from it; the same seed gives the same whole model on every layout.
            None = zeros, for weights that are loaded next.
        train: how the model will be trained (recompute).
        kind: LanguageModel, or ScalarModel for a critic or a reward model.
    """
    heartbeat.enter("build a model")
    config = transformer_config(model, parallel, train)
    count = parallel.virtual_pipeline
    stage = torch.nn.ModuleList(
        _build_chunk(
            model, parallel, config, vocab_size=vocab_size, chunk=chunk, count=count, kind=kind
        )
        for chunk in range(count)
    )
    stage.to(devices.device())
    for chunk in chunks(stage):
        if seed is None:
            initialization.clear(chunk)
        else:
            initialization.fill(chunk, model.init_std, seed)
    return stage


def _build_chunk(
    model: ModelConfig,
    parallel: ParallelConfig,
    config: TransformerConfig,
    *,
    vocab_size: int,
    chunk: int,
    count: int,
    kind: type[LanguageModel],
) -> LanguageModel:
    block = layer = layer_spec(config)
    if config.transformer_impl == "local":
        layers = [layer] * (model.layers // (parallel.pipeline * count))
        block = TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
    stage = kind(
        config=config,
        transformer_layer_spec=block,
        vocab_size=padded_vocab_size(vocab_size, parallel.tensor),
        architecture=model.architecture(vocab_size),
        max_sequence_length=model.max_length,
        pre_process=groups.is_first_stage() and chunk == 0,
        post_process=groups.is_last_stage() and chunk == count - 1,
        share_embeddings_and_output_weights=model.tied_embeddings,
        rotary_base=model.rope_theta,
        vp_stage=chunk if count > 1 else None,
    )
    stage.rotary_pos_emb.inv_freq = inverse_frequencies(model).to(devices.device())
    return stage


def wrap_for_training(
    stage: torch.nn.ModuleList,
    distributed_optimizer: bool,
    parallel: ParallelConfig = DEFAULT_LAYOUT,
) -> torch.nn.ModuleList:
    """Wraps each chunk in Megatron's DDP: gradient buffers in fp32, reduced over DP × CP.

    parallel: says which communication overlaps with computation (overlap.py).
    """
    overlap = Overlap.of(parallel, distributed_optimizer)
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap.grad_reduce,
        overlap_param_gather=overlap.param_gather,
        use_distributed_optimizer=distributed_optimizer,
    )
    wrapped = [DistributedDataParallel(chunk.config, config, chunk) for chunk in stage]
    if overlap.param_gather:  # pipeline.train turns the hooks on while it is needed
        for chunk in wrapped:
            chunk.disable_forward_pre_hook(param_sync=False)
    if overlap.grad_reduce:  # only the last micro-batch's backward pass completes the gradients
        syncs = [chunk.no_sync for chunk in wrapped]
        wrapped[0].config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    return torch.nn.ModuleList(wrapped)


def parameter_count(model: torch.nn.ModuleList) -> int:
    """Counts the parameters of the whole model; weights that every rank holds count once."""
    tensor = groups.tensor_group()
    local = 0
    for chunk in chunks(model):
        for name, parameter in chunk.named_parameters():
            tied_copy = chunk.share_embeddings_and_output_weights and "output_layer" in name
            sharded = initialization.is_tensor_sharded(parameter)
            if not tied_copy and (sharded or tensor.rank() == 0):
                local += parameter.numel()
    return int(groups.reduce_sums([float(local)], groups.model_group())[0])
