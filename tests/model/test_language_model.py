"""Our forward pass against transformers' Llama, key-value caches, and other layouts.

The oracle is LlamaForCausalLM with the same weights: grouped-query attention (4 query heads, 2
key-value heads), rotary positions, SwiGLU, RMSNorm. Log-probs agree to 1e-5: fp32, four layers,
sums in another order.
"""

from __future__ import annotations

import os

import pytest
import torch

from megatron_rpp.config import ModelConfig, ParallelConfig
from megatron_rpp.model import build
from megatron_rpp.model.attention import CoreAttention
from megatron_rpp.model.language_model import decoding, unwrap
from megatron_rpp.parallel import groups, pipeline
from megatron_rpp.records import MicroBatch
from tests.distributed import run_ranks

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, VOCAB, MAX_LENGTH = 4, 32, 48, 4, 2, 100, 33
TOLERANCE = 1e-5
# [b, s] token batches of several shapes; even lengths, so that sequence parallelism can halve them.
BATCHES = [
    torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(number))
    for number, shape in enumerate([(3, 8), (2, 20), (1, 32)])
]
# Sequences to decode, and where their prompts end.
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
    """Weights of seed 5, with norm weights that are not all one."""
    stage = build.build_frozen(model_config(tied), parallel, VOCAB, 5)
    for parameter in stage.parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)))
    return stage


def all_logprobs(stage, hidden):
    """[b, s, words] from hidden states [s, b, h] of the last stage."""
    logits = stage.sampling_logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
    return logits.log_softmax(-1).transpose(0, 1)


@pytest.fixture(scope="module", autouse=True)
def world():
    groups.start(1, 1, 7)
    torch.set_num_threads(1)  # the matrices are tiny
    yield
    groups.stop()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def tied(request):
    return request.param


@pytest.fixture(scope="module")
def model(tied):
    return make_model(tied)


def llama_weights(stage):
    """Megatron's parameters under the names of transformers' Llama.

    linear_qkv stacks [queries, key, value] per key-value head; linear_fc1 is [gate; up].
    """
    ours = dict(stage.named_parameters())
    theirs = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"][:VOCAB],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": stage.output_weight[:VOCAB],
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
    oracle.load_state_dict(llama_weights(stage))
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


def ragged_prompts():
    """The prompts of SEQUENCES, right-padded."""
    steps = torch.arange(max(PROMPT_LENGTHS))
    inside = steps < torch.tensor(PROMPT_LENGTHS)[:, None]
    return torch.where(inside, SEQUENCES[:, : len(steps)], 0)


def decode_all(stage, steps):
    """Hidden states [b, 1 + steps, h]: after each prompt, then token by token through the cache."""
    lengths = torch.tensor(PROMPT_LENGTHS)
    rows = torch.arange(len(lengths))
    with decoding(unwrap(stage), int(lengths.max()) + steps) as state:
        hidden = pipeline.stage_forward(stage, ragged_prompts())
        found = [hidden[lengths - 1, rows]]
        for step in range(steps):
            positions = lengths + step
            state.set_positions(positions)
            hidden = pipeline.stage_forward(stage, SEQUENCES[rows, positions, None], positions)
            found.append(hidden[0])
    return torch.stack(found, 1)


@torch.no_grad()
def test_decoding_with_a_cache_equals_the_full_forward(model):
    found, full = decode_all(model, 12), model(SEQUENCES).transpose(0, 1)
    for row, length in enumerate(PROMPT_LENGTHS):
        expected = full[row, length - 1 : length + 12]
        torch.testing.assert_close(found[row], expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_sequences_leave_and_repeat_in_the_cache(model):
    full = model(SEQUENCES).transpose(0, 1)
    order = torch.tensor([2, 0, 2])
    positions = torch.tensor(PROMPT_LENGTHS)[order]
    with decoding(model, 20) as state:
        model(ragged_prompts())
        state.keep(order)
        state.set_positions(positions)
        found = model(SEQUENCES[order, positions, None], positions)[0]
    torch.testing.assert_close(found, full[order, positions], rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_caches_are_gone_afterwards_also_after_an_error(model):
    before = model(BATCHES[0])
    with pytest.raises(RuntimeError, match="stop here"), decoding(model, 20) as state:
        model(BATCHES[0])
        state.set_positions(torch.full((3,), 8))
        raise RuntimeError("stop here")
    attentions = [m for m in model.modules() if isinstance(m, CoreAttention)]
    assert len(attentions) == LAYERS
    assert all(a.cache is a.decode_positions is a.decode_mask is None for a in attentions)
    assert torch.equal(model(BATCHES[0]), before)


LAYOUTS = {
    "TP1": ParallelConfig(),
    "TP2": ParallelConfig(tensor=2),
    "TP2, sequence-parallel": ParallelConfig(tensor=2, sequence_parallel=True),
    "PP2": ParallelConfig(pipeline=2),
}


def score(stage):
    none = torch.zeros(0, dtype=torch.int64)
    batches = [MicroBatch(tokens, none, none, none, none) for tokens in BATCHES]
    return pipeline.score(stage, batches, lambda batch, hidden: all_logprobs(stage, hidden))


def score_on_layout(parallel, tied):
    """Log-probs of BATCHES through the pipeline schedules, before and after decoding ([] on the
    stages that have none), and the sequence lengths that this rank's first layer saw."""
    groups.start(parallel.tensor, parallel.pipeline, 1)
    stage = make_model(tied, parallel)
    seen = []
    stage.decoder.layers[0].register_forward_hook(lambda *call: seen.append(len(call[2][0])))
    with torch.no_grad():
        scores = score(stage)
        decoded = decode_all(stage, 6)
        again = score(stage)
    groups.split_again()
    return {"scores": scores, "again": again, "decoded": decoded, "seen": seen}


def whole_context(parallel):
    """Shape of the hidden states of a sequence as long as the context, padded to be halved."""
    groups.start(parallel.tensor, parallel.pipeline, 1)
    stage = make_model(False, parallel)
    width = -(-MAX_LENGTH // parallel.tensor) * parallel.tensor
    with torch.no_grad():
        shape = stage(torch.zeros(1, width, dtype=torch.int64)).shape
    groups.split_again()
    return tuple(shape)


def on_every_layout(rank):
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    results = {
        (name, tied): score_on_layout(parallel, tied)
        for name, parallel in LAYOUTS.items()
        for tied in (False, True)
    }
    return results | {"context": whole_context(LAYOUTS["TP2, sequence-parallel"])}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(on_every_layout, 2, tmp_path_factory.mktemp("ranks"))


def last_stages(ranks, layout, tied):
    first = LAYOUTS[layout].pipeline - 1
    assert all(rank[layout, tied]["scores"] == [] for rank in ranks[:first])
    return [rank[layout, tied] for rank in ranks[first:]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_scores_as_one_process(ranks, model, tied, layout):
    for found in last_stages(ranks, layout, tied):
        for key in ("scores", "again"):
            for tokens, logprobs in zip(BATCHES, found[key], strict=True):
                with torch.no_grad():
                    expected = all_logprobs(model, model(tokens))
                torch.testing.assert_close(logprobs, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_decodes_as_one_process(ranks, model, tied, layout):
    with torch.no_grad():
        expected = decode_all(model, 6)
    for found in last_stages(ranks, layout, tied):
        torch.testing.assert_close(found["decoded"], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sequence_parallelism_halves_the_sequence_except_in_decoding(ranks, layout):
    scoring, prompts_and_tokens = [8, 20, 32], [7, 1, 1, 1, 1, 1, 1]
    if LAYOUTS[layout].sequence_parallel:
        scoring = [4, 10, 16]
    for rank in ranks:
        assert rank[layout, False]["seen"] == scoring + prompts_and_tokens + scoring


def test_a_sequence_as_long_as_the_context_under_sequence_parallelism(ranks):
    """A context of 33 tokens is padded to 34, which two ranks can halve."""
    assert [rank["context"] for rank in ranks] == [(34, 1, HIDDEN)] * 2
