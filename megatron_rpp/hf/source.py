"""A Hugging Face directory as a source of weights, checked before any model is built.

A directory gives the same function as in transformers, or an error that names what is different.
Only headers and small files are read, and whole tensors only if two of them claim one place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rpp.hf.architecture import ADAPTER, CONFIG, read_architecture
from megatron_rpp.hf.families import Row, check_tensors, rows_of
from megatron_rpp.hf.json_object import is_file, read_json
from megatron_rpp.hf.safetensors_in import INDEX, SINGLE, Weights
from megatron_rpp.lifecycle.config_error import ConfigError

GENERATION = "generation_config.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Source:
    """A directory whose files match its config.json."""

    settings: dict[str, Any]
    """The same settings as ModelConfig.architecture, and HEAD if it is a classifier."""
    rows: list[Row]
    weights: Weights
    notes: list[str]
    """Sentences about what may differ from what the user expects."""


def check_source(directory: str | Path) -> Source:
    """The model of a Hugging Face directory.

    Raises ConfigError if it is not a complete model of a known architecture, or if the result in
    transformers would depend on its version or on other installed packages.
    """
    architecture = read_architecture(directory)
    folder = Path(directory).absolute()
    if is_file(folder / ADAPTER):
        raise ConfigError(
            f"{folder / ADAPTER}: with peft installed transformers loads this adapter on top of "
            f"the weights: merge it into them, or move it out of the directory"
        )
    if is_file(folder / GENERATION):
        read_json(folder / GENERATION)
    weights = Weights(folder)
    rows = rows_of(architecture.name, architecture.settings)
    check_tensors(rows, architecture.settings, weights.shapes, directory=folder)
    if architecture.settings["tied_embeddings"]:
        _check_tied(weights, folder)
    return Source(architecture.settings, rows, weights, _notes(architecture.dtype, weights))


def _notes(dtype: str | None, weights: Weights) -> list[str]:
    notes = []
    stored = sorted({str(kind).removeprefix("torch.") for kind in weights.dtypes.values()})
    if dtype is not None and stored != [dtype]:
        notes.append(
            f"{weights.directory / CONFIG} says {dtype}, the files hold {', '.join(stored)}: each "
            f"weight keeps the type it is stored in"
        )
    single, index = weights.directory / SINGLE, weights.directory / INDEX
    if set(weights.files.values()) == {single} and is_file(index):
        notes.append(
            f"{single} is read, as transformers does, and not the files that {INDEX} beside it "
            "names"
        )
    return notes


def _check_tied(weights: Weights, folder: Path) -> None:
    """Raises ConfigError if a stored head differs from the embedding it is tied to.

    transformers 4 drops such a head, transformers 5 keeps it.
    """
    if _HEAD in weights.files and not weights.same(_EMBEDDING, _HEAD):
        raise ConfigError(
            f"{folder / CONFIG} ties the embeddings, but {_HEAD} in {weights.files[_HEAD]} differs "
            f"from {_EMBEDDING}: set tie_word_embeddings to false to keep both, or save the model "
            f"without {_HEAD}"
        )
