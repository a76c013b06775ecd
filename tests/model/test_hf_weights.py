"""Weights of every family loaded from safetensors, against the logits and answers of transformers.

On one rank and on every layout of four, fp32 logits agree to 1e-5 of the largest (sums in another
order). On one rank and on the largest layout, 64 greedy tokens are the same. A converted checkpoint
gives the same parameters bit for bit. A rank reads only what it holds.
"""

from __future__ import annotations

import os

import pytest
import torch

from megatron_rpp.checkpoint import state as checkpoint
from megatron_rpp.config import ModelConfig, ParallelConfig
from megatron_rpp.config.model import RopeScalingConfig, padded_vocab_size
from megatron_rpp.conversion.convert import to_megatron
from megatron_rpp.hf.architecture import read_architecture
from megatron_rpp.hf.safetensors_in import Weights
from megatron_rpp.model import build, pipeline
from megatron_rpp.model.hf_weights import load_hf
from megatron_rpp.model.language_model import chunks
from megatron_rpp.model.rotary import inverse_frequencies
from megatron_rpp.parallel import groups
from megatron_rpp.records import Request, Sampling
from megatron_rpp.rollout.engine import MegatronEngine
from tests.distributed import run_ranks
from tests.hf import odd
from tests.hf.models import FAMILIES, LLAMA3, greedy, logits, positions, save

TOKENS = torch.randint(101, (2, 80), generator=torch.Generator().manual_seed(1))
TOLERANCE = 1e-5
GREEDY = Sampling(max_new_tokens=64, temperature=0.0)
CHECKPOINTS = ("qwen2-tied", "qwen3")
"""Between them: biases, query-key norms, tied and untied embeddings, a head size of its own."""
LAYOUTS = {
    "TP2": ParallelConfig(tensor=2),
    "TP2, sequence-parallel": ParallelConfig(tensor=2, sequence_parallel=True),
    "PP2": ParallelConfig(pipeline=2),
    "PP2, interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "TP2xPP2": ParallelConfig(tensor=2, pipeline=2),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Maps each family to its Hugging Face directory; the converted one lies next to it."""
    folder = tmp_path_factory.mktemp("hf")
    paths = {family: save(folder, family) for family in FAMILIES}
    change = odd.tensors(lambda t: t.update({odd.HEAD: t[odd.EMBEDDING] + 1}))
    odd.made(folder / "odd", "smollm2", change)
    for family in CHECKPOINTS:
        to_megatron(paths[family], megatron_path(paths[family]))
    return paths


def megatron_path(directory):
    return directory.with_name(directory.name + "-megatron")


def model_config(directory):
    settings = dict(read_architecture(directory).settings)
    settings["rope_scaling"] = RopeScalingConfig(**settings["rope_scaling"])
    return ModelConfig(**settings)


def loaded(directory, parallel):
    """Loads a model from Hugging Face; asserts that the converted checkpoint gives the same one.

    Only CHECKPOINTS are compared, because Megatron's loading is slow on shared cores.
    """
    model = model_config(directory)
    stage = build.build_model(model, parallel, vocab_size=model.vocab_size, seed=8)
    load_hf(stage, directory)
    if directory.name not in CHECKPOINTS:
        return stage
    other = build.build_model(model, parallel, vocab_size=model.vocab_size, seed=9)
    checkpoint.load_weights(other, megatron_path(directory))
    theirs = dict(other.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in stage.named_parameters())
    return stage


class NoEnd:
    """A tokenizer without end tokens, so that no answer ends early."""

    eos_ids = ()


def our_answer(stage):
    """64 greedy tokens after the first 16 of TOKENS."""
    engine = MegatronEngine(stage, NoEnd(), max_batch=1)
    prompt = Request(tuple(TOKENS[0, :16].tolist()), sample_id=0)
    return engine.generate([prompt], GREEDY, seed=0, step=0)[0].tokens


def our_logits(stage):
    """Returns logits [b, s, v] on the last stage, None on the others."""
    hidden = pipeline.stage_forward(stage, TOKENS)
    if not groups.is_last_stage():
        return None
    logits = chunks(stage)[-1].sampling_logits(hidden.flatten(0, 1))
    return logits.unflatten(0, hidden.shape[:2]).transpose(0, 1)


def on_every_layout(rank, directories):
    os.environ["LOCAL_WORLD_SIZE"] = "4"
    results = {}
    for layout, parallel in LAYOUTS.items():
        groups.start(**parallel.sizes(), seed=1)
        for family, directory in directories.items():
            stage = loaded(directory, parallel).requires_grad_(False)
            results[layout, family] = our_logits(stage)
            if layout == "TP2xPP2":
                results[layout, family, "answer"] = our_answer(stage)
                results[family, "read"] = elements_read(stage, directory)
        if layout == "TP2":
            results["errors"] = error_messages(rank, stage, directories["llama2"])
        groups.destroy()
    return results


def error_messages(rank, stage, directory):
    """The messages for a tied model with a different head, and a directory missing on one rank."""
    messages = []
    for folder in (directory.parent / "odd/smollm2", directory if rank else directory / "gone"):
        with pytest.raises(ValueError) as raised:
            load_hf(stage, folder)
        messages.append(str(raised.value))
    return messages


def elements_read(stage, directory):
    """Returns how many elements this rank reads when it loads `stage`, and how many it holds."""
    read, plain = [], Weights.read

    def counting(self, *args, **kwargs):
        part = plain(self, *args, **kwargs)
        read.append(part.numel())
        return part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weights, "read", counting)
        load_hf(stage, directory)
    return sum(read), sum(parameter.numel() for parameter in stage.parameters())


@pytest.fixture(scope="module")
def found(directories, tmp_path_factory):
    groups.start(1, 1, seed=1)
    alone = {}
    for name, path in directories.items():
        stage = loaded(path, ParallelConfig()).requires_grad_(False)
        alone |= {("TP1", name): our_logits(stage), ("TP1", name, "answer"): our_answer(stage)}
    groups.stop()
    folder = tmp_path_factory.mktemp("ranks")
    ranks = run_ranks(on_every_layout, 4, folder, directories, timeout=300)
    gathered = {
        (family, "read"): [rank[family, "read"] for rank in ranks] for family in directories
    }
    gathered["errors"] = [rank["errors"] for rank in ranks]
    return alone | ranks[3] | gathered  # logits of the last stage on every layout


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["TP1", *LAYOUTS])
def test_logits_equal_those_of_transformers(found, directories, layout, family):
    expected = logits(directories[family], TOKENS)
    assert expected.std() > 1, "weights too small to tell right from wrong"
    bound = TOLERANCE * float(expected.abs().max())
    torch.testing.assert_close(found[layout, family], expected, rtol=0, atol=bound)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_those_of_transformers(found, directories, family):
    expected = greedy(directories[family], TOKENS[:1, :16], 64)
    assert found["TP1", family, "answer"] == found["TP2xPP2", family, "answer"] == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_reads_what_it_holds(found, family):
    """The padding rows of the vocabulary are in no file."""
    padding = (padded_vocab_size(101, 2) - 101) * 32
    for read, held in found[family, "read"]:
        assert held - read in (0, padding, 2 * padding)


def test_an_error_is_the_same_on_every_rank(found):
    first, *others = found["errors"]
    assert all(messages == first for messages in others)
    assert "lm_head.weight" in first[0] and "differs from model.embed_tokens.weight" in first[0]
    assert "gone has no config.json" in first[1]


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("original", [64, 8192])
def test_llama3_frequencies_equal_those_of_transformers_bit_for_bit(dim, original):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = LLAMA3 | {"original_max_position_embeddings": original, "factor": 32.0}
    theirs = LlamaConfig(head_dim=dim, **positions(rope))
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    scaling = RopeScalingConfig(kind="llama3", factor=32.0, original_max_length=original)
    found = inverse_frequencies(ModelConfig(head_dim=dim, rope_theta=500.0, rope_scaling=scaling))
    assert torch.equal(found, expected)
