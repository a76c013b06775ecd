"""Rotary positions in config.json, in both spellings.

transformers 4 writes `rope_theta` with `rope_scaling`, transformers 5 writes `rope_parameters`. We
read both and write the first, which all versions and vLLM read. If a file holds both, or says one
thing twice, the two must agree, because versions of transformers prefer different ones.
"""

from __future__ import annotations

from typing import Any

from megatron_rpp.hf.json_object import JsonObject, shown
from megatron_rpp.lifecycle.config_error import ConfigError

_THETA = 10000.0  # The default of every configuration class in families.FAMILIES.
_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_length": "original_max_position_embeddings",
}
_SPELLINGS = ("rope_scaling", "rope_parameters")


def read_rope(config: JsonObject) -> dict[str, Any]:
    """The settings rope_theta and rope_scaling.

    Raises ConfigError if the scaling is not supported or not given in full.
    """
    sections = [config.section(key) for key in _SPELLINGS]
    found = [_settings(config, section) for section in sections if section is not None]
    if not found:
        return _plain(config.number("rope_theta", _THETA))
    if any(settings != found[0] for settings in found):
        config.refuse("rope_scaling", "and rope_parameters describe other positions: remove one")
    return found[0]


def _settings(config: JsonObject, section: JsonObject) -> dict[str, Any]:
    theta, kind = _theta(config, section), _kind(section)
    if section.get("partial_rotary_factor") not in (None, 1):
        section.refuse(
            "partial_rotary_factor",
            f"is {shown(section['partial_rotary_factor'])}, only 1.0 is supported: choose a model "
            f"without it",
        )
    if kind == "default":
        return _plain(theta)
    if kind != "llama3":
        raise ConfigError(
            f"{config.path}: rope scaling {kind!r} is not supported, only 'default' and 'llama3': "
            f"choose a model without it"
        )
    return {"rope_theta": theta, "rope_scaling": {"kind": "llama3"} | _llama3(config, section)}


def _plain(theta: float) -> dict[str, Any]:
    return {"rope_theta": float(theta), "rope_scaling": {"kind": "none"}}


def _theta(config: JsonObject, section: JsonObject) -> float:
    places = [place for place in (section, config) if "rope_theta" in place]
    values = [place.number("rope_theta") for place in places]
    if len(set(values)) > 1:
        section.refuse(
            "rope_theta", f"is {values[0]}, but rope_theta is {values[1]}: remove the wrong one"
        )
    return float(values[0]) if values else _THETA


def _kind(section: JsonObject) -> Any:
    """The kind of scaling, `rope_type`; older files call it `type`."""
    kinds = [section[key] for key in ("rope_type", "type") if key in section]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        found = f"is {shown(kinds[0])}, but type is {shown(kinds[1])}"
        section.refuse("rope_type", f"{found}: remove the wrong one")
    others = section.content.keys() - {"rope_theta", "partial_rotary_factor"}
    if not kinds and others:
        section.refuse(min(others), "is there, but no rope_type that says what it is for: add it")
    return kinds[0] if kinds else "default"


def _llama3(config: JsonObject, section: JsonObject) -> dict[str, Any]:
    """The scaling of Llama 3 as transformers 4 reads it.

    transformers 5 replaces a missing original length by max_position_embeddings, and prefers one
    outside the section to the one inside.
    """
    scaling: dict[str, Any] = {ours: section.number(key) for ours, key in _LLAMA3.items()}
    original = _LLAMA3["original_max_length"]
    scaling["original_max_length"] = section.integer(original)
    if original in config and config[original] != section[original]:
        section.refuse(
            original,
            f"is {section[original]}, but {original} is {shown(config[original])}: remove the "
            f"wrong one",
        )
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if high <= low:
        section.refuse("high_freq_factor", f"must be above low_freq_factor = {low}, got {high}")
    return scaling


def rope_json(settings: dict[str, Any]) -> dict[str, Any]:
    """The keys of config.json for these settings."""
    scaling, written = settings["rope_scaling"], None
    if scaling["kind"] == "llama3":
        written = {"rope_type": "llama3"}
        written |= {theirs: scaling[ours] for ours, theirs in _LLAMA3.items()}
    return {"rope_theta": settings["rope_theta"], "rope_scaling": written}
