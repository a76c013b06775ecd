"""The model with a scalar head against transformers' classifier, and on other layouts.

The oracle is LlamaForSequenceClassification with the same weights. Its score is that of the last token,
so the scores of all prefixes of a sequence are the numbers at all of its positions. They agree to 1e-5:
fp32, four layers, sums in another order. Gradients on other layouts are compared by whole runs
(tests/runs/test_layouts.py).
"""

from __future__ import annotations

import pytest
import torch

from megatron_rpp.config import ParallelConfig
from megatron_rpp.model import build, pipeline
from megatron_rpp.model.language_model import chunks
from megatron_rpp.model.scalar_model import ScalarModel
from megatron_rpp.parallel import groups
from tests.distributed import run_ranks
from tests.model.test_language_model import VOCAB, llama_weights, model_config

TOKENS = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))
TOLERANCE = 1e-5


def scalar_model(tied=False, parallel=ParallelConfig()):
    stage = build.build_model(
        model_config(tied), parallel, vocab_size=VOCAB, seed=5, kind=ScalarModel
    )
    return stage.requires_grad_(False)


def numbers(rank, sizes, tied):
    """The numbers [b, s] at TOKENS; None if this rank is not of the last stage."""
    parallel = ParallelConfig(**sizes)
    groups.start(**parallel.sizes(), seed=7)
    stage = scalar_model(tied, parallel)
    hidden = pipeline.stage_forward(stage, TOKENS)
    last = chunks(stage)[-1]
    if not last.post_process:
        return None
    return last.score(hidden.flatten(0, 1)).view(hidden.shape[:2]).t()


def theirs(rank):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    groups.start(1, 1, seed=7)
    (stage,) = scalar_model()
    settings = model_config(False)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=settings.hidden, intermediate_size=settings.ffn_hidden,
        num_hidden_layers=settings.layers, num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads, max_position_embeddings=settings.max_length,
        rms_norm_eps=settings.norm_eps, num_labels=1, pad_token_id=VOCAB - 1,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.load_state_dict(llama_weights(stage) | {"score.weight": stage.score.weight})
    with torch.no_grad():
        return torch.tensor(
            [
                [float(model(row[None, : end + 1]).logits) for end in range(len(row))]
                for row in TOKENS
            ]
        )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_ranks(numbers, 1, tmp_path_factory.mktemp("alone"), {}, False)[0]


def test_numbers_equal_those_of_transformers(alone, tmp_path):
    (oracle,) = run_ranks(theirs, 1, tmp_path)
    torch.testing.assert_close(alone, oracle, rtol=0, atol=TOLERANCE)
    assert oracle.std() > 100 * TOLERANCE


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "sizes", [{"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}], ids=str
)
def test_other_layouts_give_the_same_numbers(alone, tmp_path, sizes, tied):
    found = [part for part in run_ranks(numbers, 2, tmp_path, sizes, tied) if part is not None]
    for part in found:
        torch.testing.assert_close(part, alone, rtol=0, atol=TOLERANCE)
