"""A model as either side stores it, checked against the table of its architecture.

Tensors are read one at a time, in the form of the other side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_rpp.checkpoint import store
from megatron_rpp.config.infer_settings import HF_FOLDER, side_folder
from megatron_rpp.conversion.dist_checkpoint import Checkpoint, Entry, Place, place_of
from megatron_rpp.hf.architecture import family_of, read_architecture
from megatron_rpp.hf.families import (
    CAUSAL,
    CLASSIFIER,
    EMBEDDING,
    HEAD,
    OUTPUT,
    SCORE,
    Row,
    rows_of,
)
from megatron_rpp.hf.source import check_source
from megatron_rpp.lifecycle.config_error import ConfigError, reading

Advance = Callable[[int], None]
"""Called with the number of tensors that are done since the last call."""
_GIVE = "give the directory of a run or of a converted model"


class HfModel:
    """A Hugging Face directory, checked against the table of its architecture."""

    def __init__(self, directory: str | Path):
        """Raises ConfigError if it cannot be converted as it is (source.py)."""
        source = check_source(directory)
        self.settings, self.rows, self.weights = source.settings, source.rows, source.weights
        self.notes = source.notes
        self.directory = source.weights.directory
        self.dtypes = {row.megatron: self._dtype(row) for row in self.rows}
        self._check_stacks()

    def read(self, row: Row) -> torch.Tensor:
        """Megatron's whole tensor of `row`, without padding of the vocabulary."""
        parts = [self.weights.read(name) for name in row.hf]
        return row.merge(parts, self.settings["head_dim"])

    def _dtype(self, row: Row) -> torch.dtype:
        """The type of a row. Raises ConfigError if its sources have different types."""
        kinds = {self.weights.dtypes[name] for name in row.hf}
        if len(kinds) > 1:
            raise ConfigError(
                f"{self.directory}: {', '.join(row.hf)} are one tensor in Megatron, but are stored "
                f"as {', '.join(sorted(map(str, kinds)))}: save the model in one type"
            )
        return kinds.pop()

    def _check_stacks(self) -> None:
        """Raises ConfigError unless all layers of a stacked tensor have the same type."""
        first: dict[str, Row] = {}
        for row in self.rows:
            other = first.setdefault(self._place(row).key, row)
            if self.dtypes[row.megatron] != self.dtypes[other.megatron]:
                raise ConfigError(
                    f"{self.directory}: {other.hf[0]} is stored as {self.dtypes[other.megatron]}, "
                    f"{row.hf[0]} as {self.dtypes[row.megatron]}: save the model in one type"
                )

    def _place(self, row: Row) -> Place:
        return place_of(row.megatron, row.whole_size(self.settings), self.settings["layers"])

    def entry(self, row: Row, advance: Advance) -> Entry:
        """The entry of a checkpoint for `row`. `advance` is called when it is read."""
        shape, place = row.whole_size(self.settings), self._place(row)

        def read() -> torch.Tensor:
            whole = self.read(row)
            if row.megatron in (EMBEDDING, OUTPUT):
                padding = place.shape[0] - shape[0]
                whole = torch.nn.functional.pad(whole, (0, 0, 0, padding))
            advance(1)
            return whole

        return Entry(place, self.dtypes[row.megatron], read)


def current(path: str | Path) -> Path:
    """The current checkpoint of a directory, or the directory itself if it is a checkpoint.

    Its checksums are not verified. Raises ConfigError if there is none.
    """
    with reading(f"{Path(path).absolute()}", _GIVE):
        return store.current(Path(path).absolute())


@dataclass(frozen=True)
class MegatronModel:
    """A Megatron checkpoint and its architecture."""

    checkpoint: Checkpoint
    name: str
    """The architecture, a key of families.FAMILIES."""
    settings: dict[str, Any]
    rows: list[Row]
    side_files: Path | None
    """The folder with config.json and tokenizer; None if the model did not come from a file."""

    @classmethod
    def open(cls, path: str | Path) -> MegatronModel:
        """The model of a checkpoint, or of the newest one in a directory.

        Raises ConfigError if it is not a complete checkpoint or its architecture is unknown.
        """
        path = Path(path).absolute()
        with reading(f"{path}", _GIVE):
            folder = current(path)
            checkpoint = Checkpoint(folder)
            side = side_folder(folder)
            recorded = checkpoint.common().get("architecture")
            if side is not None:
                source = read_architecture(side)
                name, settings = source.name, source.settings
                # A reward model that was trained from a language model keeps its side files.
                if SCORE in checkpoint.tensors:
                    name, settings = name.replace(CAUSAL, CLASSIFIER), settings | HEAD
            elif recorded is not None and "layers" in recorded:
                name, settings = family_of(recorded), recorded
            else:
                raise ConfigError(
                    f"{path} does not say its architecture: put the model's config.json and "
                    f"tokenizer into {folder.parent / HF_FOLDER}"
                )
            model = cls(checkpoint, name, settings, rows_of(name, settings), side)
            model.check()
        return model

    def check(self) -> None:
        """Raises ConfigError unless rows and tensors match each other and the shapes are right."""
        found = self.checkpoint.tensors
        places = {row.megatron: self.place(row) for row in self.rows}
        needed = {place.key for place in places.values()}
        wrong = {
            "lacks": needed - found.keys(),
            "also has": found.keys() - needed,
            "has in another shape": {
                place.key for place in places.values() if not self._holds(place)
            },
        }
        for problem, keys in wrong.items():
            if keys:
                raise ConfigError(
                    f"{self.checkpoint.directory} does not fit its architecture: it {problem} "
                    f"{', '.join(sorted(keys)[:3])} ({len(keys)} in all)"
                )

    def _holds(self, place: Place) -> bool:
        entry = self.checkpoint.tensors.get(place.key)
        if entry is None:
            return True  # already reported as lacking
        if place.key in (EMBEDDING, OUTPUT):  # with any padding
            return entry.size[0] >= place.shape[0] and entry.size[1:] == place.shape[1:]
        return tuple(entry.size) == place.global_shape

    def place(self, row: Row) -> Place:
        """The place of the tensor of a row, without the padding of the vocabulary."""
        shape = row.whole_size(self.settings)
        place = place_of(row.megatron, shape, self.settings["layers"])
        return replace(place, shape=shape) if row.megatron in (EMBEDDING, OUTPUT) else place

    def read(self, row: Row) -> torch.Tensor:
        """Megatron's whole tensor of `row`, without padding of the vocabulary."""
        return self.checkpoint.read(self.place(row))

    def split(self, row: Row) -> list[torch.Tensor]:
        """The Hugging Face tensors of `row`."""
        return row.split(self.read(row), self.settings["heads"], self.settings["kv_heads"])
