"""Writes and reads Megatron's sharded checkpoint format, one tensor at a time.

It is the format of torch.distributed.checkpoint plus two files (`metadata.json`, `common.pt`; Megatron
0.19 itself writes the content of `common.pt` into a shard).
Layers are stacked: `decoder.layers.3.x` is row 3 of the tensor `decoder.layers.x`. Megatron's own
writer needs the whole state in memory; here each tensor is made when it is written.

Left out: optimizer states, objects (`_extra_state`), formats other than `torch_dist`.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_rpp.config.model import padded_vocab_size
from megatron_rpp.hf.families import EMBEDDING, OUTPUT, canonical
from megatron_rpp.lifecycle.config_error import ConfigError, reading

_STACKED = "decoder.layers."
_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.", "score.")
_COMMON_FILE = "common.pt"
_COMMON_OBJECT = "common_state/shard_0_1"
_COMMON_ITEM = ReadItem(
    type=LoadItemType.BYTE_IO,
    dest_index=MetadataIndex(_COMMON_OBJECT),
    dest_offsets=torch.Size((0,)),
    storage_index=MetadataIndex(_COMMON_OBJECT),
    storage_offsets=torch.Size((0,)),
    lengths=torch.Size((0,)),
)
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Place:
    """Where a parameter is stored: a part of one of the tensors of a checkpoint."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    """Shape of the part. In a stacked tensor its first dimension is 1."""


def place_of(name: str, shape: tuple[int, ...], layers: int) -> Place:
    """The place of the parameter `name` of a row; its `shape` is without padding."""
    found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if found:
        offset = (int(found[1]),) + (0,) * len(shape)
        return Place(_STACKED + found[2], (layers, *shape), offset, (1, *shape))
    if name in (EMBEDDING, OUTPUT):
        shape = (padded_vocab_size(shape[0], 1), *shape[1:])
    return Place(name, shape, (0,) * len(shape), shape)


@dataclass(frozen=True)
class Entry:
    """A tensor to write. `read` makes it when its turn comes."""

    place: Place
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


class _WritePlan(DefaultSavePlanner):
    """Hands one entry after another to the writer."""

    def __init__(self, entries: list[Entry]):
        super().__init__(flatten_state_dict=False)
        self.entries = {(e.place.key, torch.Size(e.place.offset)): e for e in entries}

    def create_local_plan(self) -> SavePlan:
        return SavePlan([self._item(entry) for entry in self.entries.values()])

    @staticmethod
    def _item(entry: Entry) -> WriteItem:
        place = entry.place
        offset, size = torch.Size(place.offset), torch.Size(place.shape)
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offset, size),
            properties=TensorProperties(dtype=entry.dtype),
            size=torch.Size(place.global_shape),
        )
        return WriteItem(MetadataIndex(place.key, offset), WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        assert write_item.index.offset is not None
        entry = self.entries[write_item.index.fqn, write_item.index.offset]
        data = entry.read().reshape(entry.place.shape)
        assert data.dtype == entry.dtype, (entry.place, data.dtype)
        return data


def write(directory: Path, entries: list[Entry], common: dict[str, Any]) -> None:
    """Writes a checkpoint; `entries` are those of this rank. Collective if there is a process
    group.

    Raises RuntimeError if the entries of all ranks do not fill their tensors.
    """
    writer = dcp.FileSystemWriter(directory, single_file_per_rank=False, overwrite=False)
    alone = not dist.is_initialized()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as intended
        dcp.save({}, storage_writer=writer, planner=_WritePlan(entries), no_dist=alone)
    if alone or dist.get_rank() == 0:
        torch.save(common, directory / _COMMON_FILE)
        (directory / "metadata.json").write_text(json.dumps(_FORMAT))


class _ReadPlan(DefaultLoadPlanner):
    """Reads one place into `target`."""

    def __init__(self, target: torch.Tensor):
        super().__init__(flatten_state_dict=False)
        self.target = target

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.target


class _ReadObject(DefaultLoadPlanner):
    """Reads one object into `content`."""

    content: Any = None

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.content = torch.load(value, weights_only=True)


class Checkpoint:
    """The tensors of the model in a checkpoint, read one place at a time."""

    def __init__(self, directory: Path):
        """Raises ConfigError if `directory` is not a checkpoint of this format."""
        self.directory = directory.absolute()
        self._reader = dcp.FileSystemReader(directory)
        with reading(f"{self.directory}", "it is not a whole checkpoint; choose another"):
            kind = json.loads((directory / "metadata.json").read_text())["sharded_backend"]
            if kind != _FORMAT["sharded_backend"]:
                raise ConfigError(
                    f"{self.directory} is of format {kind!r}: only torch_dist is read"
                )
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._stored: dict[str, str] = {}
        """The name of each tensor in the files, which may use either naming of the norms."""
        self.tensors: dict[str, TensorStorageMetadata] = {}
        shards = {index.fqn: info.relative_path for index, info in metadata.storage_data.items()}
        self._common_shard: str | None = shards.get(_COMMON_OBJECT)
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata) and key.startswith(_MODEL_PREFIXES):
                self._stored[canonical(key)] = key
                self.tensors[canonical(key)] = entry

    @property
    def common_file(self) -> Path:
        """The file that holds the common state: `common.pt` or, from Megatron 0.19 on, a shard."""
        separate = self.directory / _COMMON_FILE
        if self._common_shard is None or separate.exists():
            return separate
        return self.directory / self._common_shard

    def common(self) -> dict[str, Any]:
        """The state that is stored next to the tensors; {} if it contains code of another program.

        Raises ConfigError if it is missing or damaged.
        """
        file = self.common_file
        separate = file.name == _COMMON_FILE
        if separate and not zipfile.is_zipfile(file):
            raise ConfigError(f"{file} is missing or not whole: choose another checkpoint")
        with reading(f"{file}", "it is not whole; choose another checkpoint"):
            try:
                if separate:
                    return torch.load(file, weights_only=True)
                planner = _ReadObject()
                self._reader.read_data(LoadPlan([_COMMON_ITEM]), planner).wait()
                return planner.content[0]
            except pickle.UnpicklingError:
                return {}

    def dtype(self, place: Place) -> torch.dtype:
        return self.tensors[place.key].properties.dtype

    def read(self, place: Place) -> torch.Tensor:
        """The part at `place`, in its stored type, without the dimension of stacked layers."""
        target = torch.empty(place.shape, dtype=self.dtype(place))
        chunk = ChunkStorageMetadata(torch.Size(place.offset), torch.Size(place.shape))
        items = create_read_items_for_chunk_list(
            self._stored[place.key], self.tensors[place.key], [chunk]
        )
        with reading(f"{place.key} in {self.directory}", "choose another checkpoint"):
            self._reader.read_data(LoadPlan(items), _ReadPlan(target)).wait()
        return target[0] if place.key.startswith(_STACKED) else target
