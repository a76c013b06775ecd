"""The architecture of a model in either kind of directory, for programs that build it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rpp.config.model import ModelConfig, RopeScalingConfig
from megatron_rpp.conversion.models import MegatronModel
from megatron_rpp.hf.architecture import CONFIG, read_architecture
from megatron_rpp.hf.families import HEAD, is_scalar
from megatron_rpp.hf.json_object import is_file


@dataclass(frozen=True)
class ModelSettings:
    """What a directory says about its model."""

    settings: dict[str, Any]
    """As ModelConfig.architecture. max_length is the longest context of the model, in tokens."""
    scalar: bool
    """Whether it has a score head (a reward model) instead of an output projection."""
    side_files: Path | None
    """The folder with config.json and tokenizer; None: a checkpoint that did not come from a
    file."""

    def config(self, **others: Any) -> ModelConfig:
        """The section `model` for this model. `others` are settings in addition, or instead."""
        return model_config(self.settings, **others)


def model_config(settings: dict[str, Any], **others: Any) -> ModelConfig:
    """The section `model` of an architecture's settings; their head is not part of it."""
    own = {name: value for name, value in settings.items() if name not in HEAD}
    scaling = RopeScalingConfig(**settings["rope_scaling"])
    return ModelConfig(**(own | {"rope_scaling": scaling} | others))


def model_settings(directory: str | Path) -> ModelSettings:
    """The settings of the model in a Hugging Face directory, a checkpoint, or a directory of them.

    Raises ConfigError if there is no model or its architecture is unknown.
    """
    folder = Path(directory).absolute()
    if is_file(folder / CONFIG):
        settings = read_architecture(folder).settings
        return ModelSettings(settings, is_scalar(settings), folder)
    model = MegatronModel.open(folder)
    return ModelSettings(model.settings, is_scalar(model.settings), model.side_files)
