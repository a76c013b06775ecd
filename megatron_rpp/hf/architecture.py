"""Reads config.json of Hugging Face into the settings of ModelConfig, and writes it from them.

A key that would make the same weights another function (another activation, biases that the family
does not have, other rope scalings, quantised weights) is an error that names the key. It is never
ignored. An absent key has the default of the family's configuration class in transformers; the
sizes must be present.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rpp.hf.classifier import check_one_label, labels_json
from megatron_rpp.hf.families import CAUSAL, CLASSIFIER, FAMILIES, HEAD, is_scalar
from megatron_rpp.hf.json_object import JsonObject, is_file, shown
from megatron_rpp.hf.rope import read_rope, rope_json
from megatron_rpp.lifecycle.config_error import ConfigError

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
_MOST_LAYERS = 10_000
_DTYPES = frozenset({
    "float64", "double", "float32", "float", "float16", "half", "bfloat16",
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
})  # fmt: skip
"""The floating-point types of torch."""
_NORM_EPS = 1e-6  # The default of every configuration class in FAMILIES.
# Keys that must be absent or have one of these values.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names for the same function
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
    "compression_config": (None,),
    "use_sliding_window": (False,),
    "attention_chunk_size": (None,),
    "partial_rotary_factor": (1.0, None),
    "is_causal": (True,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "fusion_config": (None,),
}
# Keys that make transformers read files that are not read here.
_ELSEWHERE = ("transformers_weights", "configuration_files")


@dataclass(frozen=True)
class _Class:
    """What the configuration class of a family does in transformers; the same in 4.57 and 5."""

    model_type: str
    """Its name in config.json. It does not follow from the architecture's: DeepseekV3ForCausalLM is
    deepseek_v3."""
    kv_heads: int | None
    """Default of num_key_value_heads; None = as many as query heads."""
    head_dim: int | None = None
    """Default of head_dim; None = hidden / heads."""
    head_dim_null: bool = False
    """Whether null in head_dim means the default."""
    windows: bool = False
    """Whether sliding_window applies without use_sliding_window. Llama's class does not know the
    key, but the key-value cache of transformers does."""
    window: int | None = None
    """Default of sliding_window."""
    ignores: tuple[str, ...] = ()
    """Keys of _ONLY that have no effect in this family."""


_CLASSES = {
    f"{family}{kind}": configuration
    for family, configuration in {
        "Llama": _Class("llama", None, head_dim_null=True, windows=True),
        "Mistral": _Class("mistral", 8, head_dim_null=True, windows=True, window=4096),
        "Qwen2": _Class("qwen2", 32, ignores=("attention_bias",)),  # its biases are always there
        "Qwen3": _Class("qwen3", 32, head_dim=128),
    }.items()
    for kind in (CAUSAL, CLASSIFIER)  # a language model and its classifier share the class
}


@dataclass(frozen=True)
class HfArchitecture:
    """What config.json says about a model."""

    name: str
    """The architecture, a key of families.FAMILIES."""
    settings: dict[str, Any]
    """The same settings as ModelConfig.architecture, and HEAD if it is a classifier. max_length is
    the longest context, in tokens, in which the model is what config.json describes."""
    dtype: str | None
    """The type to which transformers 5 casts the weights as it loads them. Here they keep
    theirs."""


def read_architecture(directory: str | Path) -> HfArchitecture:
    """The architecture of a Hugging Face model directory.

    Raises a ConfigError that names the key for an unknown architecture, a feature that would be
    lost, or an impossible value.
    """
    folder = Path(directory).absolute()
    if not is_file(folder / CONFIG):
        raise ConfigError(f"{folder} has no {CONFIG}: {_instead(folder)}")
    return architecture_of(JsonObject.read(folder / CONFIG))


def architecture_of(config: JsonObject) -> HfArchitecture:
    """The architecture that the content of a config.json describes. Raises ConfigError as above."""
    name = _name(config)
    for key, values in _ONLY.items():
        if key not in _CLASSES[name].ignores and config.get(key, values[0]) not in values:
            config.refuse(
                key,
                f"is {reprlib.repr(config[key])}, only {values[0]!r} is supported: choose a model "
                f"without it",
            )
    for key in _ELSEWHERE:
        if config.get(key) is not None:
            config.refuse(
                key,
                f"is {reprlib.repr(config[key])}, files that are not read: load the model with "
                f"transformers and save it with save_pretrained",
            )
    settings = _settings(name, config)
    if name.endswith(CLASSIFIER):
        check_one_label(config)
        settings |= HEAD
    return HfArchitecture(name, settings, _dtype(config))


def _instead(folder: Path) -> str:
    if is_file(folder / ADAPTER):
        return f"it holds an adapter ({ADAPTER}): merge it into its model and give that directory"
    if (folder / CONFIG).is_symlink():
        return f"{CONFIG} is a broken link: fetch the model again"
    return "give the directory of a Hugging Face model"


def _name(config: JsonObject) -> str:
    """The architecture. transformers reads model_type and vLLM architectures, so they must
    agree. A language model and its classifier have the same model_type; without architectures it
    is the language model."""
    names, kind = config.get("architectures") or [], config.get("model_type")
    if not isinstance(names, list) or not all(type(name) is str for name in names):
        config.refuse("architectures", f"must be a list of names, got {shown(names)}")
    kinds = {family.model_type: n for n, family in _CLASSES.items() if n.endswith(CAUSAL)}
    if names and names[0] not in FAMILIES:
        raise ConfigError(
            f"{config.path}: no table for the architecture {names[0]!r}: known are "
            f"{', '.join(FAMILIES)}; CONTRIBUTING.md says how to add one"
        )
    if kind is None and names:
        return names[0]
    if type(kind) is not str or kind not in kinds:
        config.refuse("model_type", f"is {shown(kind)}: known are {', '.join(kinds)}")
    if names and _CLASSES[names[0]].model_type != kind:
        config.refuse(
            "model_type",
            f"is {kind!r}, which is {kinds[kind]}, but architectures names {names[0]}: correct "
            f"the wrong one",
        )
    return names[0] if names else kinds[kind]


def _dtype(config: JsonObject) -> str | None:
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        if value is not None:
            if type(value) is not str or value not in _DTYPES:
                problem = (
                    f"must be a floating-point type of torch such as 'bfloat16', got {shown(value)}"
                )
                config.refuse(key, problem)
            return value
    return None


def _settings(name: str, config: JsonObject) -> dict[str, Any]:
    layers = config.integer("num_hidden_layers", at_most=_MOST_LAYERS)
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    _check_layer_types(name, config, layers)
    rows = " ".join(row.megatron for row in FAMILIES[name])
    return read_rope(config) | {
        "layers": layers,
        "hidden": hidden,
        "ffn_hidden": config.integer("intermediate_size"),
        "heads": heads,
        "kv_heads": _kv_heads(_CLASSES[name], config, heads),
        "head_dim": _head_dim(_CLASSES[name], config, hidden=hidden, heads=heads),
        "qkv_bias": "linear_qkv.bias" in rows,
        "qk_norm": "q_layernorm" in rows,
        "norm_eps": float(config.number("rms_norm_eps", _NORM_EPS)),
        "tied_embeddings": config.truth("tie_word_embeddings", False),
        "vocab_size": config.integer("vocab_size"),
        "max_length": _context(_CLASSES[name], config),
    }


def _kv_heads(family: _Class, config: JsonObject, heads: int) -> int:
    found = heads
    if config.get("num_key_value_heads", family.kv_heads) is not None:
        found = config.integer("num_key_value_heads", family.kv_heads)
    if heads % found:
        config.refuse(
            "num_key_value_heads", f"must divide num_attention_heads = {heads}, got {found}"
        )
    return found


def _head_dim(family: _Class, config: JsonObject, *, hidden: int, heads: int) -> int:
    if config.get("head_dim") is not None or ("head_dim" in config and not family.head_dim_null):
        found = config.integer("head_dim")
    elif family.head_dim is not None:
        found = family.head_dim
    elif hidden % heads:
        config.refuse(
            "hidden_size", f"must be divisible by num_attention_heads = {heads}, got {hidden}"
        )
    else:
        found = hidden // heads
    if found % 2:
        config.refuse("head_dim", f"(hidden_size / num_attention_heads) must be even, got {found}")
    return found


def _context(family: _Class, config: JsonObject) -> int:
    """The context in tokens. Within its window, a sliding window has no effect (Mistral 7B
    v0.1)."""
    positions = config.integer("max_position_embeddings")
    if not family.windows or config.get("sliding_window", family.window) is None:
        return positions
    return min(positions, config.integer("sliding_window", family.window))


def _check_layer_types(name: str, config: JsonObject, layers: int) -> None:
    """Raises ConfigError unless all layers have full attention."""
    if "layer_types" not in config:
        return
    if _CLASSES[name].model_type == "mistral":
        config.refuse("layer_types", "makes it a Ministral for transformers: choose another model")
    if config["layer_types"] not in (None, ["full_attention"] * layers):
        config.refuse(
            "layer_types",
            f"is {reprlib.repr(config['layer_types'])}, only 'full_attention' for each of "
            f"{layers} layers is supported: choose a model without it",
        )


def family_of(settings: dict[str, Any]) -> str:
    """The architecture with exactly these features, for a model that did not come from a file."""
    features = settings["qkv_bias"], settings["qk_norm"]
    names = {
        (False, False): "Llama",
        (True, False): "Qwen2",
        (False, True): "Qwen3",
    }
    if features not in names:
        raise ConfigError(
            "model.qkv_bias and model.qk_norm together are no known Hugging Face architecture: "
            "turn one of them off to export"
        )
    return names[features] + (CLASSIFIER if is_scalar(settings) else CAUSAL)


def config_json(settings: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json for a model that did not come from a file."""
    name = family_of(settings)
    content = rope_json(settings) | {
        "architectures": [name],
        "model_type": _CLASSES[name].model_type,
        "num_hidden_layers": settings["layers"],
        "hidden_size": settings["hidden"],
        "intermediate_size": settings["ffn_hidden"],
        "num_attention_heads": settings["heads"],
        "num_key_value_heads": settings["kv_heads"],
        "head_dim": settings["head_dim"],
        "hidden_act": "silu",
        "rms_norm_eps": settings["norm_eps"],
        "tie_word_embeddings": settings["tied_embeddings"],
        "max_position_embeddings": settings["max_length"],
        "vocab_size": settings["vocab_size"],
    }
    return content | (labels_json() if is_scalar(settings) else {})
