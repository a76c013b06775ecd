"""What config.json says about a classifier in addition: its labels, and the token that pads.

A classifier of transformers reads the score of a sequence at its last token that is not
`pad_token_id`, and refuses batches if it has none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rpp.hf.json_object import JsonObject, is_file, read_json, shown
from megatron_rpp.lifecycle.config_error import reading

_DEFAULT_LABELS = 2
"""What transformers takes if config.json says nothing."""
_ONLY_ONE = "only classifiers with one label (reward models) are supported, choose such a model"


def check_one_label(config: JsonObject) -> None:
    """Raises ConfigError unless the classifier of a config.json has one label (a reward model).

    Like transformers, it counts `id2label` and, without that, reads `num_labels`.
    """
    names = config.section("id2label")
    number = config.get("num_labels")
    if names is not None:
        if len(names.content) != 1:
            config.refuse("id2label", f"names {len(names.content)} labels: {_ONLY_ONE}")
        if number not in (None, 1):
            config.refuse(
                "num_labels", f"is {shown(number)}, but id2label names 1: correct the wrong one"
            )
    elif number is None:
        config.refuse(
            "num_labels",
            f"is absent, and so is id2label, which means {_DEFAULT_LABELS} labels: set num_labels "
            f"to 1 if score.weight has one row. {_ONLY_ONE}",
        )
    elif type(number) is not int or number != 1:
        config.refuse("num_labels", f"is {shown(number)}: {_ONLY_ONE}")


def labels_json() -> dict[str, Any]:
    """The keys of config.json for one label, under the names that transformers gives by default."""
    return {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def padding_json(folder: Path, content: dict[str, Any]) -> dict[str, int]:
    """`pad_token_id` for the config.json of a classifier, as its language model pads; {} if unknown.

    It is unknown too if it would be the token that ends a sequence, because transformers would
    then read the score before that token.

    Args:
        folder: the side files of the language model.
        content: its config.json, which is preferred to generation_config.json and tokenizer.
    """
    for found in (content.get("pad_token_id"), _of_generation(folder), _of_tokenizer(folder)):
        if type(found) is int and found >= 0:
            ends = content.get("eos_token_id")
            ends = ends if isinstance(ends, list) else [ends]
            return {} if found in ends else {"pad_token_id": found}
    return {}


def _of_generation(folder: Path) -> Any:
    file = folder / "generation_config.json"
    return read_json(file).get("pad_token_id") if is_file(file) else None


def _of_tokenizer(folder: Path) -> Any:
    settings, tokenizer = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not (is_file(settings) and is_file(tokenizer)):
        return None
    name = read_json(settings).get("pad_token")
    if isinstance(name, dict):  # older files store the token with its flags
        name = name.get("content")
    with reading(f"{tokenizer}", "fetch or write it again"):
        added = read_json(tokenizer).get("added_tokens") or []
        return next((token["id"] for token in added if token["content"] == name), None)
