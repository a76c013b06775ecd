"""Infers settings from the directory of the model: its architecture and its tokenizer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rpp.config.model import ModelConfig
from megatron_rpp.lifecycle.config_error import ConfigError, reading

HF_FOLDER = "hf"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def side_folder(checkpoint: str | Path) -> Path | None:
    """The folder of Hugging Face files in a checkpoint or a directory of checkpoints, if it has
    one."""
    path = Path(checkpoint)
    folders = (path / HF_FOLDER, path.parent / HF_FOLDER)
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def hf_source(hf_path: str | None, init_path: str | None) -> Path | None:
    """The Hugging Face files that belong to the weights a run starts from; None if there are
    none."""
    if hf_path is not None:
        return Path(hf_path)
    return None if init_path is None else side_folder(init_path)


def tokenizer_folder(directory: str | Path) -> Path | None:
    """The folder with the tokenizer of the model in `directory`, of either kind; None if it has none."""
    folders = [Path(directory), side_folder(directory)]
    return next(
        (folder for folder in folders if folder is not None and has_tokenizer(folder)), None
    )


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def infer_settings(
    settings: dict[str, Any], defaults: ModelConfig, *, scalar: bool = False
) -> None:
    """Fills `settings` (all sections, by name) from the directory that the weights come from.

    A setting at its default takes its value from the directory. model.max_length is left alone: it
    may be shorter than the model's context.

    Args:
        scalar: the program trains a reward model, which may start from another one.
    Raises:
        ConfigError: a setting contradicts the directory, or a policy would start from a classifier.
    """
    model = settings["model"]
    with reading(f"{model['hf_path'] or model['init_path']}", "correct the path of the model"):
        folder = hf_source(model["hf_path"], model["init_path"])
    if folder is None:
        return
    # Imported here: it loads torch.
    from megatron_rpp.hf.architecture import read_architecture
    from megatron_rpp.hf.families import HEAD, is_scalar, refuse_scalar

    theirs = dict(read_architecture(folder).settings)
    if is_scalar(theirs) and not scalar:
        refuse_scalar(folder.absolute())
    theirs = {name: value for name, value in theirs.items() if name not in HEAD}
    context = theirs.pop("max_length")
    theirs["rope_scaling"] = asdict(defaults.rope_scaling) | theirs["rope_scaling"]
    for name, value in theirs.items():
        if model[name] not in (value, asdict(defaults)[name]):
            raise ConfigError(
                f"model.{name} is {model[name]}, but the model in {folder.absolute()} has {value}: "
                f"leave it out, it is read from the directory"
            )
        model[name] = value
    if model["max_length"] > context:
        raise ConfigError(
            f"model.max_length is {model['max_length']}, the model in {folder.absolute()} reads at "
            f"most {context} tokens: lower it"
        )
    if not settings["data"]["tokenizer"] and has_tokenizer(folder):
        settings["data"]["tokenizer"] = str(folder)
