"""config.json of Hugging Face, read into the settings of ModelConfig and written from them.

Both spellings of rotary positions are read: `rope_theta` with `rope_scaling` (transformers 4) and
`rope_parameters` (transformers 5). The first is written, which both of them and vLLM read.

What would make another function of the same weights (another activation, biases that the families
do not have, other rope scalings, quantised weights) is refused by name, never ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rpp.hf.families import FAMILIES

CONFIG = "config.json"
# Where config.json says nothing, the classes of transformers take these.
_HEAD_DIM = {"Qwen3ForCausalLM": 128}
_ROPE_THETA = 10000.0
# Keys that must have this value, or be absent.
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
}
_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_length": "original_max_position_embeddings",
}


@dataclass(frozen=True)
class HfArchitecture:
    """What config.json says of a model."""

    name: str
    """The architecture, a key of families.FAMILIES."""
    settings: dict[str, Any]
    """As ModelConfig.architecture gives it; max_length is the longest context, in tokens, in which
    the model is what config.json describes."""


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError where `path` is not a JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def read_architecture(directory: str | Path) -> HfArchitecture:
    """The architecture of a Hugging Face model directory.

    Raises ValueError for an unknown architecture or a feature that would be lost, by its name.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise ValueError(f"{directory} has no {CONFIG}: give the directory of a Hugging Face model")
    content = read_json(path)
    names = content.get("architectures") or ["none"]
    if names[0] not in FAMILIES:
        raise ValueError(
            f"{path}: no table for the architecture {names[0]!r}: known are "
            f"{', '.join(FAMILIES)}; add it to megatron_rpp/hf/families.py"
        )
    for key, value in _ONLY.items():
        if content.get(key, value) != value:
            raise ValueError(
                f"{path}: {key} is {content[key]!r}, only {value!r} is supported: choose a model "
                f"without it"
            )
    rope = _rope(content, path)
    try:
        return HfArchitecture(names[0], _settings(names[0], content, rope))
    except KeyError as error:
        raise ValueError(f"{path} has no key {error}") from error


def _rope(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """theta and scaling, from either spelling."""
    parameters = content.get("rope_parameters") or content.get("rope_scaling") or {}
    theta = parameters.get("rope_theta", content.get("rope_theta", _ROPE_THETA))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return {"rope_theta": float(theta), "rope_scaling": {"kind": "none"}}
    if kind != "llama3":
        raise ValueError(
            f"{path}: rope scaling {kind!r} is not supported, only 'default' and 'llama3': choose "
            f"a model without it"
        )
    scaling = {ours: parameters[theirs] for ours, theirs in _LLAMA3.items()}
    return {"rope_theta": float(theta), "rope_scaling": {"kind": "llama3"} | scaling}


def _settings(name: str, content: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    heads, hidden = content["num_attention_heads"], content["hidden_size"]
    positions = content["max_position_embeddings"]
    # A sliding window that is never left is no window (Mistral 7B v0.1).
    window = content.get("sliding_window") if name == "MistralForCausalLM" else None
    rows = " ".join(row.megatron for row in FAMILIES[name])
    return rope | {
        "layers": content["num_hidden_layers"],
        "hidden": hidden,
        "ffn_hidden": content["intermediate_size"],
        "heads": heads,
        "kv_heads": content.get("num_key_value_heads") or heads,
        "head_dim": content.get("head_dim") or _HEAD_DIM.get(name) or hidden // heads,
        "qkv_bias": "linear_qkv.bias" in rows,
        "qk_norm": "q_layernorm" in rows,
        "norm_eps": content["rms_norm_eps"],
        "tied_embeddings": content.get("tie_word_embeddings", False),
        "vocab_size": content["vocab_size"],
        "max_length": min(positions, window or positions),
    }


def family_of(settings: dict[str, Any]) -> str:
    """The architecture that has exactly these features, for a model that came from no file."""
    features = settings["qkv_bias"], settings["qk_norm"]
    names = {
        (False, False): "LlamaForCausalLM",
        (True, False): "Qwen2ForCausalLM",
        (False, True): "Qwen3ForCausalLM",
    }
    if features not in names:
        raise ValueError(
            "model.qkv_bias and model.qk_norm together are no known Hugging Face architecture: "
            "turn one of them off to export"
        )
    return names[features]


def config_json(settings: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json for a model that came from no file."""
    name = family_of(settings)
    scaling = settings["rope_scaling"]
    rope = None
    if scaling["kind"] == "llama3":
        rope = {"rope_type": "llama3"}
        rope |= {theirs: scaling[ours] for ours, theirs in _LLAMA3.items()}
    return {
        "architectures": [name],
        "model_type": name.removesuffix("ForCausalLM").lower(),
        "num_hidden_layers": settings["layers"],
        "hidden_size": settings["hidden"],
        "intermediate_size": settings["ffn_hidden"],
        "num_attention_heads": settings["heads"],
        "num_key_value_heads": settings["kv_heads"],
        "head_dim": settings["head_dim"],
        "hidden_act": "silu",
        "rms_norm_eps": settings["norm_eps"],
        "rope_theta": settings["rope_theta"],
        "rope_scaling": rope,
        "tie_word_embeddings": settings["tied_embeddings"],
        "max_position_embeddings": settings["max_length"],
        "vocab_size": settings["vocab_size"],
    }
