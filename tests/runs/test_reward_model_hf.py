"""A reward model starts from a language model, is exported as a classifier, and starts from that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rpp import reward_model
from megatron_rpp.config import cli
from megatron_rpp.model.scalar_model import ScalarModel
from megatron_rpp.runtime.policy import build_start
from megatron_rpp.runtime.rated_inputs import load_rated_inputs
from tests.algorithms import oracle
from tests.hf.models import save
from tests.preference_run import arguments, config_of, make_preferences
from tests.whole_runs import layout, rows, run_program

# The architecture comes with the directory.
NONE = ("layers", "hidden", "ffn_hidden", "heads", "kv_heads", "init_std")
STEPS = {"reward_model__steps": 4, "reward_model__eval_interval": 0}


def words(base: Path, run: str, **settings) -> list[str]:
    given = arguments(base, base / run, **STEPS, **settings)
    left_out = tuple(f"--model.{name}=" for name in NONE)
    return [word for word in given if not word.startswith(left_out)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The data, the language model "model" with tied embeddings, and run "one" from it, which exports
    "exported"."""
    base = tmp_path_factory.mktemp("reward_model_hf")
    make_preferences(base)
    save(base, "smollm2").rename(base / "model")
    settings = {"model__hf_path": base / "model", "checkpoint__export_hf": base / "exported"}
    run_program(reward_model.main, words(base, "one", **settings))
    return base


def test_the_export_gives_the_rewards_of_the_last_evaluation(base):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        base / "exported", local_files_only=True
    ).eval()
    assert model.config.num_labels == 1
    inputs = load_rated_inputs(config_of(base, base / "one"))
    with torch.no_grad():
        found = np.array([
            [float(model(torch.tensor([sequence])).logits) for sequence in prompt.sequences]
            for prompt in inputs.held_out
        ])  # fmt: skip
    targets = np.array([prompt.example.target for prompt in inputs.held_out])
    last = rows(base / "one/metrics.jsonl")[-1]
    expected = oracle.bradley_terry(found[:, 0].copy(), found[:, 1].copy(), targets).mean()
    assert last["eval/loss"] == pytest.approx(expected, rel=1e-4)
    assert last["eval/accuracy"] == pytest.approx((found[:, 0] > found[:, 1]).mean())


def test_the_layers_are_those_of_the_language_model(base):
    """The head is random and small."""
    from transformers import AutoModelForCausalLM

    config = cli.parse(words(base, "new", model__hf_path=base / "model"), "reward_model").config
    with layout(config):
        built = build_start(config, config.model.vocab_size, kind=ScalarModel)[0]
    theirs = AutoModelForCausalLM.from_pretrained(base / "model", local_files_only=True).model
    ours = built.embedding.word_embeddings.weight[: len(theirs.embed_tokens.weight)]
    assert torch.equal(ours, theirs.embed_tokens.weight)
    assert torch.equal(built.decoder.final_layernorm.weight, theirs.norm.weight)
    assert 0 < built.score.weight.abs().max() < 0.2


def test_a_reward_model_goes_on_from_another(base):
    """From the export and from the checkpoint; the first loss is near the last of the other run."""
    starts = {"hf": {"model__hf_path": base / "exported"}, "mc": {"model__init_path": base / "one"}}
    for run, settings in starts.items():
        run_program(reward_model.main, words(base, run, **settings))
    (one, *_), (other, *_) = (rows(base / run / "metrics.jsonl") for run in starts)
    assert one["rm/loss"] == pytest.approx(other["rm/loss"], rel=1e-6)
    assert one["rm/loss"] < rows(base / "one/metrics.jsonl")[0]["rm/loss"]
