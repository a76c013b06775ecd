"""tools/generate.py and tools/evaluate.py on a small Qwen2, from either kind of directory.

The oracle of the answers is transformers' own greedy decoding of the same directory.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_rpp.conversion.convert import to_megatron
from megatron_rpp.data.tokenizer import load_tokenizer
from tests.hf.models import save
from tests.runs.test_hf_run import NOT_OURS
from tests.small_run import arguments, make_data
from tests.whole_runs import rows, run_program
from tools import evaluate, generate

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("generate")
    make_data(base)
    save(base, "qwen2", vocab_size=64)
    to_megatron(base / "qwen2", base / "megatron")
    return base


def words(base: Path, *more: str) -> list[str]:
    return [*arguments(base, base / "run", **dict.fromkeys(NOT_OURS, None)), *more]


@torch.no_grad()
def answer_of_transformers(base: Path, prompt: str) -> str:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(base / "tokenizer.model")
    model = AutoModelForCausalLM.from_pretrained(base / "qwen2", local_files_only=True).eval()
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    for _ in range(NEW_TOKENS):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
        if tokens[-1] in tokenizer.eos_ids:
            break
    return tokenizer.decode(tokens[1 + len(tokenizer.encode(prompt)) :])


@pytest.mark.parametrize("source", ["hf_path", "init_path"])
def test_greedy_answers_are_those_of_transformers(base, tmp_path, capfd, source):
    prompts = [row["prompt"] for row in rows(base / "eval.jsonl")[:5]]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts[1:]) + "\n\n")
    folder = base / ("qwen2" if source == "hf_path" else "megatron")
    argv = [f"--model.{source}={folder}", "--prompt", prompts[0], "--greedy"]
    run_program(generate.main, words(base, *argv, "--file", str(tmp_path / "prompts.txt")))
    answers = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [answer["prompt"] for answer in answers] == prompts
    expected = [answer_of_transformers(base, prompt) for prompt in prompts]
    assert [answer["response"] for answer in answers] == expected
    assert len(set(expected)) > 1


def test_no_prompt_is_an_error(base, capsys):
    with pytest.raises(SystemExit) as ended:
        generate.main(words(base, f"--model.hf_path={base / 'qwen2'}"))
    assert ended.value.code == 2 and "no prompt: give --prompt" in capsys.readouterr().err


def test_evaluation_writes_a_table_and_json(base, tmp_path, capfd):
    output = tmp_path / "result.json"
    argv = words(base, f"--model.hf_path={base / 'qwen2'}", "--output", str(output))
    argv += ["--reward.functions=[tests.whole_runs:varied]", "--reward.workers=0"]
    run_program(evaluate.main, argv)
    result = json.loads(output.read_text())
    assert result["count"] == 16 and result["accuracy"] == 0.0
    first = result["samples"][0]
    assert first["response"] == answer_of_transformers(base, first["prompt"])
    assert first["score"] == sum(map(ord, first["response"])) % 10 / 10
    assert f"{result['reward']:.4f}" in capfd.readouterr().out
