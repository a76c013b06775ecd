"""config.json: absent keys have the defaults of transformers, in both spellings of rotary
positions.

Impossible values, and models that the settings cannot express, are errors that name file and key.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from megatron_rpp.config import ModelConfig, cli
from megatron_rpp.config.model import RopeScalingConfig
from megatron_rpp.hf.architecture import read_architecture
from megatron_rpp.hf.families import FAMILIES
from megatron_rpp.model.rotary import inverse_frequencies
from tests.hf.models import ABSENT, LLAMA3
from tools import convert_hf_to_megatron

NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""The model_type of each family, by which transformers finds its class, and the class's name."""
SIZES = {
    "vocab_size": 101,
    "hidden_size": 256,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "max_position_embeddings": 8192,
}


def write(folder: Path, kind: str = "llama", **values) -> Path:
    """A directory with only a config.json, of the sizes and these values."""
    content = {"architectures": [f"{NAMES[kind]}ForCausalLM"], "model_type": kind} | SIZES | values
    content = {key: value for key, value in content.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def theirs(folder: Path):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def test_every_family_is_here():
    kinds = "ForCausalLM", "ForSequenceClassification"
    assert {f"{name}{kind}" for name in NAMES.values() for kind in kinds} == set(FAMILIES)


@pytest.mark.parametrize("kind", NAMES)
def test_absent_keys_have_the_defaults_of_the_class(tmp_path, kind):
    ours, config = read_architecture(write(tmp_path, kind)).settings, theirs(tmp_path)
    assert ours["kv_heads"] == config.num_key_value_heads == (8 if kind == "mistral" else 32)
    assert ours["head_dim"] == (128 if kind == "qwen3" else 8)
    assert kind == "qwen2" or (config.head_dim or 8) == ours["head_dim"]
    assert ours["norm_eps"] == config.rms_norm_eps == 1e-6
    assert ours["tied_embeddings"] is config.tie_word_embeddings is False
    assert config.hidden_act == "silu"
    # The window is 4096 by default in Mistral's class, and off in Qwen's.
    assert ours["max_length"] == (config.to_dict().get("sliding_window") or 8192)
    assert ours["max_length"] == (4096 if kind == "mistral" else 8192)
    assert ours["rope_theta"] == 10000.0 and ours["rope_scaling"] == {"kind": "none"}


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("llama", {"num_key_value_heads": None, "head_dim": None}, {"kv_heads": 32, "head_dim": 8}),
        ("mistral", {"head_dim": None}, {"kv_heads": 8, "head_dim": 8}),
        ("mistral", {"sliding_window": None}, {"max_length": 8192}),
        ("mistral", {"sliding_window": 100}, {"max_length": 100}),
        ("mistral", {"sliding_window": 9000}, {"max_length": 8192}),
        # The class does not know the key, but the key-value cache of transformers uses it.
        ("llama", {"sliding_window": 100}, {"max_length": 100}),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": False}, {"max_length": 8192}),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, {"max_length": 8192}),
        ("qwen2", {"attention_bias": True}, {"qkv_bias": True}),  # without effect
        ("llama", {"hidden_act": "swish"}, {"qkv_bias": False}),  # another name of silu
        ("llama", {"pretraining_tp": 4, "attention_dropout": 0.1, "mystery": 1}, {"layers": 2}),
        ("llama", {"architectures": ["LlamaForCausalLM", "Other"]}, {"layers": 2}),
        ("qwen2", {"architectures": None}, {"qkv_bias": True}),
        ("qwen3", {"architectures": ABSENT}, {"qk_norm": True}),
        ("qwen3", {"model_type": ABSENT}, {"qk_norm": True}),
        ("llama", {"quantization_config": None, "rope_scaling": None}, {"layers": 2}),
    ],
)
def test_values_that_are_read(tmp_path, kind, values, expected):
    settings = read_architecture(write(tmp_path, kind, **values)).settings
    assert {name: settings[name] for name in expected} == expected


SCALING = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
OLD_TYPE = {"type" if name == "rope_type" else name: value for name, value in SCALING.items()}
V4, V5 = {"rope_theta": 500.0, "rope_scaling": SCALING}, {"rope_parameters": LLAMA3}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"rope_theta": 500},
        {"rope_theta": 500.0, "rope_scaling": {"type": "default", "factor": 1.0}},
        {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 1.0}},
        V4,
        {"rope_theta": 500.0, "rope_scaling": OLD_TYPE},
        {"rope_theta": 500.0, "rope_scaling": SCALING | {"type": "llama3"}},
        V4 | {"original_max_position_embeddings": 64},
        V4 | V5,
        V5,
    ],
)  # fmt: skip
def test_rotary_positions_are_those_of_transformers(tmp_path, values):
    from transformers import AutoModelForCausalLM, __version__

    if "rope_parameters" in values and __version__ < "5":
        pytest.skip("transformers 4 passes over what 5 writes")
    settings = read_architecture(write(tmp_path, **values)).settings
    scaling = RopeScalingConfig(**settings["rope_scaling"])
    model = ModelConfig(head_dim=8, rope_theta=settings["rope_theta"], rope_scaling=scaling)
    expected = AutoModelForCausalLM.from_config(theirs(tmp_path)).model.rotary_emb.inv_freq
    assert torch.equal(inverse_frequencies(model), expected)


def without(key: str) -> dict:
    return {name: value for name, value in SCALING.items() if name != key}


def rope(theta=500.0, **scaling) -> dict:
    return {"rope_theta": theta, "rope_scaling": SCALING | scaling}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rope_scaling": without("original_max_position_embeddings")},
            "has no key 'rope_scaling.original_max_position_embeddings': add it",
        ),
        ({"rope_scaling": without("factor")}, "has no key 'rope_scaling.factor'"),
        (rope(factor="8"), 'rope_scaling.factor must be a finite number above 0, got "8"'),
        (rope(factor=True), "rope_scaling.factor must be .* got true"),
        (rope(low_freq_factor=float("nan")), "rope_scaling.low_freq_factor must be .* got NaN"),
        (rope(high_freq_factor=1.0), "high_freq_factor must be above .* = 1.0, got 1.0"),
        (rope(original_max_position_embeddings=64.0), "must be a whole number .* got 64.0"),
        # transformers 4 prefers the inner one, 5 the outer one.
        (
            rope() | {"original_max_position_embeddings": 32},
            "rope_scaling.original_max_position_embeddings is 64, but .* is 32: remove the wrong",
        ),
        (
            rope(rope_theta=600.0), "rope_scaling.rope_theta is 600.0, but rope_theta is 500.0",
        ),
        (rope(type="default"), 'rope_scaling.rope_type is "llama3", but type is "default"'),
        # transformers prefers the first one, vLLM the second one.
        (
            rope() | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            "rope_scaling and rope_parameters describe other positions",
        ),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor is there, but no rope_type"),
        ({"rope_scaling": {"rope_type": None}}, "rope scaling None is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear' is not"),
        ({"rope_scaling": "linear"}, 'rope_scaling must be an object .* got "linear"'),
        ({"rope_scaling": [1]}, r"rope_scaling must be an object .* got \[1\]"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters.full_attention is there, but no rope_type",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor is 0.5, only 1.0",
        ),
        ({"rope_theta": None}, "rope_theta must be a finite number above 0, got null"),
        ({"rope_theta": "1e4"}, 'rope_theta must be a finite number above 0, got "1e4"'),
        ({"rope_theta": float("inf")}, "rope_theta must be .* got Infinity"),
        ({"rope_theta": -1}, "rope_theta must be .* got -1"),
    ],
)  # fmt: skip
def test_incomplete_rotary_settings_are_errors(tmp_path, values, message):
    with pytest.raises(ValueError, match=message) as refused:
        read_architecture(write(tmp_path, **values))
    assert str(refused.value).startswith(str(tmp_path / "config.json"))


@pytest.mark.parametrize("value", [None, "32", [32], {}, True, 32.0, -32, 0, 10**30, float("nan")])
@pytest.mark.parametrize("key", SIZES)
def test_a_size_is_a_whole_number(tmp_path, key, value):
    with pytest.raises(ValueError, match=f"config.json: {key} must be a whole number from 1 to"):
        read_architecture(write(tmp_path, **{key: value}))


@pytest.mark.parametrize("key", SIZES)
def test_a_size_must_be_there(tmp_path, key):
    with pytest.raises(ValueError, match=f"config.json has no key '{key}': add it"):
        read_architecture(write(tmp_path, **{key: ABSENT}))


OTHERS = [
    ("llama", {"tie_word_embeddings": None}, "tie_word_embeddings must be true or false, got null"),
    ("llama", {"tie_word_embeddings": "true"}, 'tie_word_embeddings must be .* got "true"'),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings must be .* got 1"),
    ("llama", {"rms_norm_eps": None}, "rms_norm_eps must be a finite number above 0, got null"),
    ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a finite number"),
    ("llama", {"num_attention_heads": 24}, "hidden_size must be divisible by .* = 24, got 256"),
    ("llama", {"num_key_value_heads": 5}, "num_key_value_heads must divide .* = 32, got 5"),
    ("llama", {"num_key_value_heads": 0}, "num_key_value_heads must be a whole number"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers must be .* from 1 to 10000"),
    ("llama", {"head_dim": 7}, "head_dim .* must be even, got 7"),
    ("qwen2", {"head_dim": None}, "head_dim must be a whole number"),  # fails in transformers
    ("qwen3", {"head_dim": None}, "head_dim must be a whole number"),
    ("llama", {"hidden_act": None}, "hidden_act is None, only 'silu'"),
    ("llama", {"attention_bias": True}, "attention_bias is True, only False"),
    ("qwen3", {"attention_bias": True}, "attention_bias is True, only False"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True, only False"),
    ("llama", {"is_causal": False}, "is_causal is False, only True"),
    ("llama", {"attention_chunk_size": 8}, "attention_chunk_size is 8, only None"),
    ("llama", {"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config is {'0'"),
    ("llama", {"compression_config": {"bits": 4}}, "compression_config is {'bits': 4}"),
    ("llama", {"transformers_weights": "a.safetensors"}, "transformers_weights is 'a.safetensors'"),
    ("llama", {"configuration_files": ["config.4.0.0.json"]}, "configuration_files is"),
    ("mistral", {"sliding_window": 0}, "sliding_window must be a whole number"),
    ("mistral", {"sliding_window": "4096"}, "sliding_window must be a whole number"),
    ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types makes it a Ministral"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types is .*'sliding_attention'"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types is .* for each of 2 layers"),
    ("qwen2", {"layer_types": 2}, "layer_types is 2"),
    ("llama", {"model_type": "mistral"}, "model_type is 'mistral', .* architectures names Llama"),
    ("llama", {"model_type": ["llama"]}, "model_type is "),
    ("llama", {"model_type": ABSENT, "architectures": ABSENT}, "model_type is null: known are"),
    ("llama", {"architectures": "LlamaForCausalLM"}, "architectures must be a list of names"),
    ("llama", {"architectures": {"a": 1}}, "architectures must be a list of names"),
    ("llama", {"architectures": ["LlamaForTokenClassification"]}, "no table for the arch"),
    ("mistral", {"architectures": ["LlamaForSequenceClassification"]}, "model_type is 'mistral'"),
    ("llama", {"dtype": "banana"}, "dtype must be a floating-point type of torch .* got \"banana\""),
    ("llama", {"torch_dtype": {}}, "torch_dtype must be a floating-point type of torch"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "values", "message"), OTHERS)
def test_other_functions_and_no_functions_are_errors(tmp_path, kind, values, message):
    with pytest.raises(ValueError, match=message) as refused:
        read_architecture(write(tmp_path, kind, **values))
    assert str(refused.value).startswith(str(tmp_path / "config.json"))


FILES = {
    "a list": (b"[]", r"must hold a JSON object \{...\}, got list"),
    "null": (b"null", r"must hold a JSON object \{...\}, got NoneType"),
    "cut off": (b'{"model_type": "lla', r"cannot be read \(JSONDecodeError"),
    "empty": (b"", r"cannot be read \(JSONDecodeError"),
    "latin-1": ('{"a": "é"}'.encode("latin-1"), r"cannot be read \(UnicodeDecodeError"),
    "too deep": (b"[" * 100_000, r"cannot be read \(RecursionError"),
    "a number too long": (b'{"hidden_size": ' + b"9" * 5000 + b"}", r"cannot be read \(ValueError"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_broken_file_ends_in_one_line(tmp_path, capfd, case):
    """The converter, and a run that starts from the directory, exit with code 2 and name the
    file."""
    (tmp_path / "config.json").write_bytes(FILES[case][0])
    words = ["--hf-path", str(tmp_path), "--megatron-path", str(tmp_path.with_name("out"))]
    assert convert_hf_to_megatron.main(words) == 2
    assert_one_line(capfd, f"{tmp_path}/config.json", FILES[case][1])
    with pytest.raises(SystemExit, match="2"):
        cli.parse([f"--model.hf_path={tmp_path}"])
    assert_one_line(capfd, f"{tmp_path}/config.json", FILES[case][1])


def assert_one_line(capfd, file: str, message: str) -> None:
    shown = capfd.readouterr().err
    assert shown.startswith(f"error: {file} ") and shown.count("\n") == 1
    assert re.search(message, shown), shown


def test_a_directory_without_the_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no config.json: give the directory of a Hugging"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match="has no config.json: give the directory of a Hugging"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").rmdir()
    (tmp_path / "config.json").symlink_to("/nowhere/config.json")
    with pytest.raises(ValueError, match="has no config.json: config.json is a broken link"):
        read_architecture(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be read \(OSError.*File name too long"):
        read_architecture("a" * 5000)
