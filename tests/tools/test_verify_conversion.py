"""tools/verify_conversion.py, run as users run it: it starts ranks, and fails for another model.

tests/model/test_hf_weights.py compares every family and layout with transformers.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_rpp.conversion.convert import to_hf, to_megatron
from tests.distributed import fork
from tests.hf import odd
from tests.hf.models import edit, save, set_config
from tools import verify_conversion

VLLM = Path(__file__).resolve().parents[2] / "runs/vllm/bin/python"
QKV = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A Qwen3 with its own head size, in one file, and its conversion."""
    folder = tmp_path_factory.mktemp("verify")
    path = save(folder, "qwen3", shards="1GB")
    to_megatron(path, folder / "megatron")
    return path, folder / "megatron"


@pytest.fixture
def forked(monkeypatch):
    """Forks the ranks of the tool, so that they need not import everything again.

    The test in bf16 starts them as users do.
    """
    monkeypatch.setattr("torch.multiprocessing.spawn", fork)


def verify(hf, megatron, *options):
    words = ["--hf-path", str(hf), "--megatron-path", str(megatron), *options]
    return verify_conversion.main(words)


def test_the_same_model_on_four_ranks(forked, converted, capfd):
    assert verify(*converted, "--tp", "2", "--pp", "2") == 0
    shown = capfd.readouterr().out
    assert "greedy tokens, Megatron and transformers: 64 of 64 equal" in shown
    assert "verdict: the same model" in shown
    assert "self_attention.linear_qkv.weight" in shown and "DIFFERENT" not in shown


def test_permuted_queries_fail_by_name_in_bits_and_in_logits(forked, converted, tmp_path, capfd):
    """Swaps the two query heads of each group: the same numbers in another order."""
    other = save(tmp_path, "qwen3", shards="1GB")
    tensors = load_file(other / "model.safetensors")
    heads = tensors[QKV].unflatten(0, (2, 2, -1))
    tensors[QKV] = heads.flip(1).flatten(0, 2).contiguous()
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert verify(other, converted[1], "--dtype", "bf16") == 1
    shown = capfd.readouterr().out
    (line,) = [line for line in shown.splitlines() if "DIFFERENT" in line]
    assert "decoder.layers.1.self_attention.linear_qkv.weight" in line
    assert "tolerance 5e-02: OUTSIDE" in shown and "verdict: NOT the same model" in shown


def test_bf16_stays_within_its_stated_tolerance(converted, capfd):
    assert verify(*converted, "--dtype", "bf16") == 0
    assert "tolerance 5e-02: within" in capfd.readouterr().out


def test_a_classifier_is_compared_by_its_scores(forked, tmp_path, capfd):
    path = save(tmp_path, "qwen3-score", shards="1GB")
    to_megatron(path, tmp_path / "megatron")
    assert verify(path, tmp_path / "megatron", "--tp", "2", "--pp", "2") == 0
    shown = capfd.readouterr().out
    assert "scores: largest difference" in shown and "tolerance 1e-05: within" in shown
    assert "greedy tokens: left out, because a classifier does not generate" in shown
    assert "score.weight" in shown and "verdict: the same model" in shown
    assert verify(save(tmp_path, "qwen3"), tmp_path / "megatron") == 1
    assert "head is output projection in Hugging Face, score in Megatron" in capfd.readouterr().out


def test_another_score_head_fails_in_bits_and_scores(forked, tmp_path, capfd):
    path = save(tmp_path, "llama-score", shards="1GB")
    to_megatron(path, tmp_path / "megatron")
    edit(path, lambda tensors: tensors["score.weight"].mul_(2))
    assert verify(path, tmp_path / "megatron", "--dtype", "bf16") == 1
    shown = capfd.readouterr().out
    (line,) = [line for line in shown.splitlines() if "DIFFERENT" in line]
    assert "score.weight" in line and "tolerance 5e-02: OUTSIDE" in shown


def test_a_model_of_another_shape_fails_before_anything_is_computed(converted, tmp_path, capfd):
    assert verify(save(tmp_path, "llama2"), converted[1]) == 1
    assert "head_dim is 8 in Hugging Face, 12 in Megatron" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama2", odd.older_save),
        ("llama2", odd.older_index),
        ("smollm2", odd.tensors(odd.stored_head)),
        ("llama2", partial(set_config, dtype="bfloat16", sliding_window=100)),
    ],
)
def test_odd_directories_that_are_converted_are_the_same_model(
    forked, tmp_path, capfd, family, change
):
    directory = odd.made(tmp_path, family, change)
    to_megatron(directory, tmp_path / "megatron")
    assert verify(directory, tmp_path / "megatron") == 0
    assert "verdict: the same model" in capfd.readouterr().out


def test_invalid_inputs_are_one_line(converted, tmp_path, capfd):
    """An invalid layout, a damaged checkpoint, a directory that transformers does not load."""
    whole, megatron = converted
    lacking = shutil.copytree(whole, tmp_path / "hf")
    set_config(lacking, rms_norm_eps=10**30)  # transformers does not take it for a float
    to_megatron(lacking, tmp_path / "huge")
    torn = shutil.copytree(megatron, tmp_path / "torn")
    (torn / "release/manifest.json").write_text("{")
    unsealed = shutil.copytree(megatron, tmp_path / "unsealed")
    (unsealed / "release/manifest.json").unlink()
    next((unsealed / "release").glob("*.distcp")).write_bytes(b"")
    capfd.readouterr()
    for words, message in (
        ((*converted, "--tp", "3"), "model.heads must be divisible by parallel.tensor = 3, got 4"),
        ((lacking, tmp_path / "huge"), "transformers has to load it"),
        ((whole, torn), "release is damaged (manifest.json is missing or unreadable)"),
        ((whole, unsealed), "release cannot be read (EOFError"),
    ):
        assert verify(*words) == 2
        errors = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
        assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]


@pytest.mark.parametrize("python", ["no/such/python", "false"])
def test_a_missing_vllm_is_an_error_at_once(python, capfd):
    with pytest.raises(SystemExit, match="2"):
        verify("no/such/model", "no/such/checkpoint", "--vllm", python)
    assert f"--vllm {python}: no Python that has vLLM" in capfd.readouterr().err


@pytest.mark.skipif(not VLLM.exists(), reason="no vLLM (tools/verify_conversion.py says how)")
@pytest.mark.parametrize("family", ["llama3", "qwen2-tied", "qwen3"])
def test_vllm_answers_like_transformers(family, tmp_path, capfd):
    """vLLM runs on the checkpoint converted back. Its attention needs a head size of 32."""
    source = save(tmp_path, family, shards="1GB", hidden_size=128, head_dim=32, vocab_size=128)
    to_megatron(source, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back")
    assert verify(tmp_path / "back", tmp_path / "megatron", "--vllm", str(VLLM)) == 0
    assert "greedy tokens, vLLM and transformers: 64 of 64 equal" in capfd.readouterr().out
