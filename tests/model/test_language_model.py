"""Our forward pass against transformers' Llama, decoding against both, and other layouts.

The oracle is LlamaForCausalLM with the same weights: grouped-query attention (4 query heads, 2
key-value heads), rotary positions, SwiGLU, RMSNorm. Log-probs agree to 1e-5: fp32, four layers,
sums in another order.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from megatron_rpp.config import ModelConfig, ParallelConfig
from megatron_rpp.data.prompts import Example, Prompt
from megatron_rpp.model import attention_metadata, build, decode_sizes, pipeline
from megatron_rpp.model.decoder import decoders
from megatron_rpp.model.language_model import chunks
from megatron_rpp.parallel import groups
from megatron_rpp.records import Generation, Request
from megatron_rpp.rollout import engine, metadata
from megatron_rpp.rollout.blocks import Blocks
from megatron_rpp.rollout.buffer import from_generations
from megatron_rpp.stages import logprobs
from tests.distributed import run_ranks

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, VOCAB, MAX_LENGTH = 4, 32, 48, 4, 2, 100, 33
TOLERANCE = 1e-5
# [b, s] token batches of several shapes; one fills the context, whose odd length two ranks cannot
# halve.
BATCHES = [
    torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(number))
    for number, shape in enumerate([(3, 8), (2, 20), (1, MAX_LENGTH)])
]
# Sequences to decode, and the lengths of their prompts.
SEQUENCES = torch.randint(VOCAB, (3, 20), generator=torch.Generator().manual_seed(9))
PROMPT_LENGTHS = [3, 7, 5]


def model_config(tied):
    return ModelConfig(
        layers=LAYERS,
        hidden=HIDDEN,
        ffn_hidden=FFN,
        heads=HEADS,
        kv_heads=KV_HEADS,
        tied_embeddings=tied,
        max_length=MAX_LENGTH,
        rope_theta=500.0,
        norm_eps=1e-3,
        init_std=0.2,
    )


def make_model(tied=False, parallel=ParallelConfig()):
    """Builds this rank's chunks with weights from seed 5 and norm weights that are not all one."""
    stage = build.build_model(
        model_config(tied), parallel, vocab_size=VOCAB, seed=5
    ).requires_grad_(False)
    for parameter in stage.parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)))
    return stage


def all_logprobs(stage, hidden):
    """Returns log-probs [b, s, vocabulary] from hidden states [s, b, h] of the last stage."""
    logits = chunks(stage)[-1].sampling_logits(hidden.flatten(0, 1))
    logits = logits.unflatten(0, hidden.shape[:2])
    return logits.log_softmax(-1).transpose(0, 1)


@pytest.fixture(scope="module", autouse=True)
def world():
    groups.start(1, 1, seed=7)
    torch.set_num_threads(1)  # the matrices are tiny
    yield
    groups.stop()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def tied(request):
    return request.param


@pytest.fixture(scope="module")
def model(tied):
    return make_model(tied)[0]


def llama_weights(stage):
    """Megatron's parameters under the names of transformers' Llama, without the output projection.

    linear_qkv stacks [queries, key, value] per key-value head; linear_fc1 is [gate; up].
    """
    ours = dict(stage.named_parameters())
    theirs = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"][:VOCAB],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
    }
    for layer in range(LAYERS):
        mine, name = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        qkv = ours[mine + "self_attention.linear_qkv.weight"]
        per_group = qkv.view(KV_HEADS, HEADS // KV_HEADS + 2, -1, HIDDEN)
        gate, up = ours[mine + "mlp.linear_fc1.weight"].chunk(2)
        theirs |= {
            name + "self_attn.q_proj.weight": per_group[:, :-2].flatten(0, 2),
            name + "self_attn.k_proj.weight": per_group[:, -2].flatten(0, 1),
            name + "self_attn.v_proj.weight": per_group[:, -1].flatten(0, 1),
            name + "self_attn.o_proj.weight": ours[mine + "self_attention.linear_proj.weight"],
            name + "mlp.gate_proj.weight": gate,
            name + "mlp.up_proj.weight": up,
            name + "mlp.down_proj.weight": ours[mine + "mlp.linear_fc2.weight"],
            name + "input_layernorm.weight": ours[mine + "input_layernorm.weight"],
            name + "post_attention_layernorm.weight": ours[mine + "pre_mlp_layernorm.weight"],
        }
    return theirs


def llama(stage, tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    oracle = LlamaForCausalLM(config).eval()
    oracle.load_state_dict(llama_weights(stage) | {"lm_head.weight": stage.output_weight[:VOCAB]})
    return oracle


@torch.no_grad()
def test_log_probs_equal_those_of_transformers(model, tied):
    oracle = llama(model, tied)
    for tokens in BATCHES:
        expected = oracle(tokens, use_cache=False).logits.log_softmax(-1)
        assert expected.std() > 1, "weights too small to tell right from wrong"
        found = all_logprobs(model, model(tokens))
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_padding_on_the_right_does_not_reach_the_tokens(model):
    padded = torch.nn.functional.pad(BATCHES[1], (0, 9), value=17)
    expected = model(BATCHES[1])
    torch.testing.assert_close(model(padded)[: len(expected)], expected, rtol=0, atol=TOLERANCE)


def decode_all(stage, steps):
    """Hidden states [b, steps, h] after each prompt's last token and the ones that follow, through the
    decoder and the cache: prompts in one pass, then token by token."""
    sequences, lengths = range(len(SEQUENCES)), np.array(PROMPT_LENGTHS) - 1
    blocks = Blocks(len(sequences), 60, max(PROMPT_LENGTHS) + steps)
    parts, found = decoders(stage), []
    cache = engine.new_cache(parts, blocks.total)
    for sequence in sequences:
        blocks.grow(sequence, blocks.count(int(lengths[sequence]) + steps))
    cache.use(blocks.highest)
    prompts = [row[:length] for row, length in zip(SEQUENCES, lengths)]
    run_stages(
        parts, cache, torch.cat(prompts),
        metadata.prompt_metadata(blocks, sequences, [0] * len(sequences), lengths=lengths, dtype=torch.float32),
    )  # fmt: skip
    for step in range(steps):
        where = metadata.token_metadata(
            blocks, np.arange(len(sequences)), lengths + step, ahead=1, dtype=torch.float32
        )
        tokens = SEQUENCES[torch.arange(len(sequences)), torch.from_numpy(lengths + step)]
        found.append(run_stages(parts, cache, tokens, where))
    return torch.stack(found, 1)


def run_stages(parts, cache, tokens, where):
    """Runs tokens [t] through this rank's chunks; returns the hidden states of its last one."""
    for decoder in parts:
        first = decoder.chunk.pre_process
        given = tokens if first else pipeline.receive(decoder.chunk, len(tokens))
        hidden = decoder.forward(given, where.positions, partial(cache.attend, metadata=where))
        if not decoder.chunk.post_process:
            pipeline.send(hidden).wait()
    return hidden


@pytest.fixture(params=[True, False], ids=["packed", "plain"])
def packed(request, monkeypatch):
    """Whether the decoder packs its weights, which are small."""
    if request.param:
        monkeypatch.setattr(decode_sizes, "SMALLEST_PACKED", 1)


@torch.no_grad()
@pytest.mark.parametrize("block", [3, 64])
@pytest.mark.usefixtures("packed")
def test_decoding_with_a_cache_equals_the_full_forward(model, block, monkeypatch):
    monkeypatch.setattr(attention_metadata, "block_size", lambda: block)
    found, full = decode_all(model, 12), model(SEQUENCES).transpose(0, 1)
    for row, length in enumerate(PROMPT_LENGTHS):
        expected = full[row, length - 1 : length + 11]
        torch.testing.assert_close(found[row], expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{"qkv_bias": True}, {"qk_norm": True, "head_dim": 16}], ids=["Qwen2", "Qwen3"]
)
@pytest.mark.usefixtures("packed")
def test_other_families_decode_as_their_full_forward(settings):
    """Biases and norms get values that matter; test_hf_weights.py compares these modules with
    transformers."""
    config = replace(model_config(False), **settings)
    stage = build.build_model(config, ParallelConfig(), vocab_size=VOCAB, seed=6)
    stage.requires_grad_(False)
    for parameter in stage.parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)))
    found, full = decode_all(stage, 12), stage[0](SEQUENCES).transpose(0, 1)
    for row, length in enumerate(PROMPT_LENGTHS):
        expected = full[row, length - 1 : length + 11]
        torch.testing.assert_close(found[row], expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.usefixtures("packed")
def test_logits_of_the_decoder_are_those_of_the_model(model):
    hidden = model(BATCHES[0])[-1]
    (decoder,) = decoders(model)
    expected = model.sampling_logits(hidden)
    torch.testing.assert_close(decoder.logits(hidden), expected, rtol=0, atol=TOLERANCE)


LAYOUTS = {
    "TP1": ParallelConfig(),
    "TP2": ParallelConfig(tensor=2),
    "TP2, sequence-parallel": ParallelConfig(tensor=2, sequence_parallel=True),
    "PP2": ParallelConfig(pipeline=2),
    "PP2 of 2 chunks each": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "CP2": ParallelConfig(context=2),
}


def packed_buffer():
    """The sequences of BATCHES, each with a prompt of one token."""
    rows = [row.tolist() for tokens in BATCHES for row in tokens]
    prompts = [Prompt(Example("?"), tuple(row[:1])) for row in rows]
    requests = [Request(prompt.tokens, i) for i, prompt in enumerate(prompts)]
    generations = [Generation(row[1:], [0.0] * (len(row) - 1), False) for row in rows]
    return from_generations(prompts, requests, generations, samples_per_prompt=1)


def response_logprobs(model):
    """Returns the log-probs of `packed_buffer`'s responses by `model`, which equals transformers."""
    found = []
    for tokens in BATCHES:
        logprobs = all_logprobs(model, model(tokens))[:, :-1]
        found.append(logprobs.gather(2, tokens[:, 1:, None]).flatten())
    return torch.cat(found)


def score_on_layout(parallel, tied):
    """Runs BATCHES through the pipeline schedules before and after decoding.

    Returns both log-probs, the last rank's decoded hidden states, and the lengths that this rank's
    first layer received.
    """
    groups.start(**parallel.sizes(), seed=1)
    stage = make_model(tied, parallel)
    seen = []
    chunks(stage)[0].decoder.layers[0].register_forward_hook(
        lambda *call: seen.append(len(call[2][0]))
    )
    with torch.no_grad():
        scores = logprobs.response_logprobs(stage, packed_buffer(), 64, temperature=1.0)
        packed = len(seen)
        decoded = decode_all(stage, 6)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode_sizes, "SMALLEST_PACKED", 1)
            decoded_packed = decode_all(stage, 6)
        again = logprobs.response_logprobs(stage, packed_buffer(), 64, temperature=1.0)
    last = groups.is_last_stage()
    groups.destroy()
    return {
        "scores": scores,
        "again": again,
        "decoded": [decoded, decoded_packed] if last else [],
        "packed": seen[:packed],
        "seen": seen[packed:-packed],
    }


def on_every_layout(rank):
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return {
        (name, tied): score_on_layout(parallel, tied)
        for name, parallel in LAYOUTS.items()
        for tied in (False, True)
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(on_every_layout, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_scores_packed_rows_as_transformers_does(ranks, model, tied, layout):
    with torch.no_grad():
        expected = response_logprobs(model)
    for rank in ranks:
        for key in ("scores", "again"):
            torch.testing.assert_close(rank[layout, tied][key], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_decodes_as_one_process(ranks, model, tied, layout):
    with torch.no_grad():
        expected = decode_all(model, 6)
    found = [hidden for rank in ranks for hidden in rank[layout, tied]["decoded"]]
    assert found
    for hidden in found:
        torch.testing.assert_close(hidden, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_who_shares_a_sequence_holds_its_part(ranks, layout):
    """Rows of at most 64 tokens, from sequences of 33, 20, 20, 8, 8 and 8 tokens."""
    parallel, rows = LAYOUTS[layout], [33 + 20, 20 + 3 * 8]
    if parallel.sequence_parallel:
        rows = [54 // 2, 44 // 2]
    elif parallel.context == 2:
        rows = [(36 + 20) // 2, 44 // 2]  # each sequence a multiple of 4
    elif parallel.pipeline == 2:
        rows = [53, 53]  # all of the same shape
    for rank in ranks:
        assert rank[layout, False]["packed"] == rows
        assert rank[layout, False]["seen"] == [], "decoding has a forward pass of its own"
