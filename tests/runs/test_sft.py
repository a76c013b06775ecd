"""The warm start learns, equally on every layout, and training starts from its checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_rpp import sft, train
from megatron_rpp.data.tokenizer import load_tokenizer
from megatron_rpp.runtime.inputs import load_inputs
from megatron_rpp.runtime.policy import build_policy
from megatron_rpp.stages import logprobs
from tests.data.hf_tokenizers import make_chatml
from tests.distributed import run_ranks
from tests.small_run import arguments, config_of, make_data
from tests.supervised_runs import interrupt_and_finish, left_alone, without_times
from tests.whole_runs import (
    TOLERANCE,
    compare_rows,
    compare_weights,
    layout,
    relative,
    rows,
    run_program,
    small_buckets,
    weights,
)

# Adam's epsilon: see test_layouts.py. 13 samples do not divide evenly over two replicas.
SETTINGS = {
    "sft__steps": 12,
    "sft__batch_size": 13,
    "sft__eval_interval": 6,
    "sft__optimizer__lr": 3e-3,
    # Adam turns fp32 rounding into steps where a gradient is nearly zero; this epsilon damps it.
    "sft__optimizer__eps": 3e-4,
    "model__init_std": 0.02,
}
LAYOUTS = {
    "TP2": {"parallel__tensor": 2, "parallel__sequence_parallel": "true"},
    "PP2": {"parallel__pipeline": 2},
    "PP2 VPP2": {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2},
    "CP2": {"parallel__context": 2},
    "DP2": {"parallel__overlap_param_gather": "true"},
}


def finetune(base: Path, name: str, **settings) -> None:
    config = config_of(base, base / name, **(SETTINGS | settings))
    inputs = load_inputs(config)
    with layout(config):
        sft.finetune(config, inputs)


def on_two_ranks(rank: int, base: Path) -> None:
    for name, settings in LAYOUTS.items():
        with small_buckets():
            finetune(base, name, **settings)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The folder of the data and of run "one": a warm start by the real program on one rank, which
    exports the Hugging Face directory "exported"."""
    base = tmp_path_factory.mktemp("sft")
    make_data(base)
    export_to = {"checkpoint__export_hf": base / "exported"}
    run_program(sft.main, arguments(base, base / "one", **SETTINGS, **export_to))
    return base


@pytest.fixture(scope="module")
def layouts(base, tmp_path_factory) -> Path:
    run_ranks(on_two_ranks, 2, tmp_path_factory.mktemp("ranks"), base)
    return base


def log(base: Path, run: str) -> list[dict]:
    return rows(base / run / "sft/metrics.jsonl")


def test_the_loss_falls_from_that_of_a_guess(base):
    """Small random weights give each of the 41 tokens about the same probability."""
    losses = [row["sft/loss"] for row in log(base, "one")]
    assert len(losses) == 12
    assert losses[0] == pytest.approx(math.log(41), rel=0.02)
    assert losses[-1] < 0.75 * losses[0]


def test_the_log_has_evaluations(base):
    measured = [row["step"] for row in log(base, "one") if "eval/accuracy" in row]
    assert measured == [6, 12]
    assert [row["step"] for row in rows(base / "one/sft/evaluations.jsonl")] == [6, 12]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_learns_the_same(layouts, name):
    deviation = compare_rows(log(layouts, name), log(layouts, "one"))
    assert deviation.size <= TOLERANCE, deviation
    config = config_of(layouts, layouts / name, **SETTINGS)
    ours, theirs = (weights(config, layouts / run / "sft") for run in (name, "one"))
    assert compare_weights(ours, theirs).size <= TOLERANCE


def test_another_order_of_the_data_is_detected(base):
    """The comparison can fail."""
    finetune(base, "other seed", seed=4321)
    losses = (log(base, run)[-1]["sft/loss"] for run in ("other seed", "one"))
    assert relative(*losses) > 100 * TOLERANCE


def test_the_exported_model_answers_like_the_last_evaluation(base):
    """transformers gives the same tokens for the held-out prompts as the last evaluation."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base / "exported", local_files_only=True).eval()
    tokenizer = load_tokenizer(base / "tokenizer.model")
    answered = rows(base / "one/sft/evaluations.jsonl")[-1]["samples"]
    for sample in answered:
        prompt = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(sample["prompt"])]])
        found = model.generate(
            prompt, max_new_tokens=6, do_sample=False, eos_token_id=list(tokenizer.eos_ids),
            pad_token_id=0,
        )  # fmt: skip
        assert tokenizer.decode(found[0, prompt.shape[1] :].tolist()) == sample["response"]
    own = weights(config_of(base, base / "one", **SETTINGS), base / "one/sft")
    ours = own["embedding.word_embeddings.weight"], own["output_layer.weight"]
    for mine, theirs in zip(ours, (model.model.embed_tokens.weight, model.lm_head.weight)):
        assert torch.equal(mine[: len(theirs)], theirs)


def test_a_finished_warm_start_is_left_alone(base, capsys):
    words = arguments(base, base / "one", **SETTINGS)
    left_alone(base / "one", lambda: run_program(sft.main, words))
    said = capsys.readouterr().out
    assert "data: 200 prompts, 16 held out, 0 dropped as too long" in said
    assert "finished before, at step 12: raise sft.steps to go on" in said


def test_training_starts_from_its_weights(base):
    config = config_of(base, base / "rl", **SETTINGS, model__init_path=base / "one/sft")
    own = weights(config, base / "one/sft")
    with layout(config):
        policy = build_policy(config, config.optimizer, 41)
        started = {
            name.removeprefix("0.module."): value.detach().clone()
            for name, value in policy.model.named_parameters()
        }
    assert compare_weights(started, own).size == 0
    random = config_of(base, base / "rl", **SETTINGS)
    with layout(random):
        policy = build_policy(random, random.optimizer, 41)
        assert any(
            (value != own[name.removeprefix("0.module.")]).any()
            for name, value in policy.model.named_parameters()
        )


def test_the_first_evaluation_of_training_is_the_last_of_the_warm_start(base):
    settings = SETTINGS | {"model__init_path": base / "one/sft", "train__steps": 1}
    run_program(train.main, arguments(base, base / "rl", **settings))
    before = rows(base / "rl/logs/evaluations.jsonl")[0]
    after = rows(base / "one/sft/evaluations.jsonl")[-1]
    assert before | {"step": 0} == after | {"step": 0}


def test_a_killed_and_stopped_warm_start_resumes_bit_for_bit(base):
    """It is not compared with run "one", whose process sums in another order because it has more
    threads."""

    def abandoned() -> None:
        assert (base / "resumed/sft/iter_0000005_minibatch_0001").is_dir()
        assert [row["step"] for row in log(base, "resumed")][-1] == 5

    finetune(base, "whole")
    interrupt_and_finish(
        lambda: finetune(base, "resumed", sft__checkpoint_interval=4), "supervised step",
        after_abandoning=abandoned,
    )  # fmt: skip
    ours, theirs = (without_times(log(base, run)) for run in ("resumed", "whole"))
    assert ours == theirs
    evaluated = (rows(base / run / "sft/evaluations.jsonl") for run in ("resumed", "whole"))
    ours, theirs = ([(row["step"], row["reward"]) for row in found] for found in evaluated)
    assert ours[-2:] == theirs and [step for step, _ in theirs] == [6, 12]
    config = config_of(base, base / "resumed", **SETTINGS)
    found = [weights(config, base / run / "sft") for run in ("resumed", "whole")]
    assert compare_weights(*found).size == 0


CHATS = [
    [
        {"role": "user", "content": f"What is {a} + {b}?"},
        {"role": "assistant", "content": f"Let me see, {a + b}."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": f"The answer is {a + b}."},
    ]
    for a in range(3)
    for b in range(3)
]


def test_the_loss_is_the_mean_over_the_assistants_turns(base, tmp_path):
    """The oracle scores the whole conversations as rollouts before the step."""
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    settings = SETTINGS | {
        "data__train": path, "data__eval": path, "data__prompt_key": "messages",
        "data__tokenizer": make_chatml(tmp_path / "chatml"), "model__max_length": 256,
        "sft__steps": 1, "sft__batch_size": len(CHATS), "train__max_tokens_per_microbatch": 512,
        "model__init_std": 0.2,
    }  # fmt: skip
    config = config_of(base, tmp_path, **settings)
    inputs = load_inputs(config)
    with layout(config):
        policy = build_policy(config, config.sft.optimizer, inputs.vocab_size)
        buffer = sft.batch_of(list(inputs.train), inputs.form)
        found = logprobs.response_logprobs(policy.model, buffer, 512, temperature=1.0)
        expected = -float(found[buffer.mask].double().mean())
        everything = -float(found.double().mean())
    assert 0 < int((~buffer.mask).sum()) < int(buffer.mask.sum())
    with layout(config):
        sft.finetune(config, inputs)
    (row,) = rows(tmp_path / "sft/metrics.jsonl")
    assert row["sft/loss"] == pytest.approx(expected, rel=1e-6)
    assert abs(everything - expected) > 1e-4 * expected, "the mask makes no difference here"
