"""Whole models from Hugging Face to Megatron and back, a tensor at a time, on CPUs alone.

A Megatron directory made here keeps what the weights do not say in its folder `hf`: config.json,
tokenizer, chat template, generation settings. It loads on any tensor × pipeline layout, and is
sealed like a trained one. Ranks of a process group share the tensors, or the files, between them;
a refusal is the same on every one of them.

Left out: optimizer states; casting on the way in (a weight keeps the type it is stored in).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_rpp import checkpoint_store, sealing
from megatron_rpp.checkpoint_store import POINTER
from megatron_rpp.hf import dist_checkpoint, safetensors_out
from megatron_rpp.hf.adoption import HF_FOLDER, side_folder
from megatron_rpp.hf.architecture import CONFIG, config_json, family_of, read_architecture, read_json
from megatron_rpp.hf.dist_checkpoint import Checkpoint, Entry, Place, place_of
from megatron_rpp.hf.families import EMBEDDING, OUTPUT, Row, check_tensors, rows_of
from megatron_rpp.hf.output import appearing, appearing_for_all, check_output, copy_side_files
from megatron_rpp.hf.ranks import agreed, rank, ranks
from megatron_rpp.hf.safetensors_in import Weights

RELEASE = "release"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Progress = Callable[[int], None]
"""Is told how many more tensors are done."""
Counting = Callable[[int], AbstractContextManager[Progress]]
"""Gives the progress of a number of tensors."""


def uncounted(total: int) -> AbstractContextManager[Progress]:
    """Tells nobody."""
    return nullcontext(lambda done: None)


class HfModel:
    """A Hugging Face directory, checked against the table of its architecture."""

    def __init__(self, directory: str | Path):
        """Raises ValueError where it is not a whole model of a known architecture."""
        self.directory = Path(directory)
        source = read_architecture(directory)
        self.settings = source.settings
        self.weights = Weights(directory)
        self.rows = rows_of(source.name, source.settings)
        check_tensors(self.rows, self.settings, self.weights.shapes, directory)
        self.dtypes = {row.megatron: self._dtype(row) for row in self.rows}

    def read(self, row: Row) -> torch.Tensor:
        """Megatron's whole tensor of `row`, the vocabulary not padded."""
        parts = [self.weights.read(name) for name in row.hf]
        return row.merge(parts, self.settings["head_dim"])

    def _dtype(self, row: Row) -> torch.dtype:
        """Raises ValueError where the sources of a row differ."""
        kinds = {self.weights.dtypes[name] for name in row.hf}
        if len(kinds) > 1:
            raise ValueError(
                f"{self.directory}: {', '.join(row.hf)} are one tensor in Megatron, but are stored "
                f"as {', '.join(sorted(map(str, kinds)))}: save the model in one type"
            )
        return kinds.pop()

    def entry(self, row: Row, progress: Progress) -> Entry:
        shape = row.whole_size(self.settings)
        place = place_of(row.megatron, shape, self.settings["layers"])

        def read() -> torch.Tensor:
            whole = self.read(row)
            if row.megatron in (EMBEDDING, OUTPUT):
                padding = place.shape[0] - shape[0]
                whole = torch.nn.functional.pad(whole, (0, 0, 0, padding))
            progress(1)
            return whole

        return Entry(place, self.dtypes[row.megatron], read)


def to_megatron(
    hf_path: str | Path,
    megatron_path: str | Path,
    overwrite: bool = False,
    counting: Counting = uncounted,
) -> Path:
    """Writes the checkpoint `megatron_path/release`; collective where there is a process group.

    Raises ValueError, before anything is written, where the source cannot be converted or the
    output may not be written.
    """
    source, output = agreed(lambda: HfModel(hf_path)), Path(megatron_path)
    agreed(lambda: check_output(output, [source.directory], POINTER, overwrite))
    own = source.rows[rank() :: ranks()]
    common = {"architecture": source.settings, "iteration": 0, "checkpoint_version": 3.0}
    with appearing_for_all(output) as partial, counting(len(own)) as progress:
        entries = [source.entry(row, progress) for row in own]
        dist_checkpoint.write(partial / RELEASE, entries, common)
        sealing.seal(partial / RELEASE, {"step": 0})
        if rank() == 0:
            copy_side_files(source.directory, partial / HF_FOLDER)
            (partial / POINTER).write_text(f"{RELEASE}\n")
    return output / RELEASE


@dataclass(frozen=True)
class MegatronModel:
    """A checkpoint, and what is known of its architecture."""

    checkpoint: Checkpoint
    settings: dict[str, Any]
    rows: list[Row]
    side_files: Path | None
    """The folder with config.json and tokenizer; None for a model that came from no file."""

    @classmethod
    def open(cls, path: str | Path) -> "MegatronModel":
        """The model of a checkpoint, or of the newest one in a directory.

        Raises ValueError where it is no whole checkpoint, or of unknown architecture.
        """
        folder = checkpoint_store.current(path)
        checkpoint = Checkpoint(folder)
        side = side_folder(folder)
        recorded = checkpoint.common().get("architecture")
        if side is not None:
            source = read_architecture(side)
            name, settings = source.name, source.settings
        elif recorded is not None and "layers" in recorded:
            name, settings = family_of(recorded), recorded
        else:
            raise ValueError(
                f"{path} does not say its architecture: put the model's config.json and tokenizer "
                f"into {folder.parent / HF_FOLDER}"
            )
        model = cls(checkpoint, settings, rows_of(name, settings), side)
        model.check()
        return model

    def check(self) -> None:
        """Every tensor has a row, every row its tensor, in the shape of the architecture."""
        found = self.checkpoint.tensors
        places = {row.megatron: self.place(row) for row in self.rows}
        needed = {place.key for place in places.values()}
        wrong = {
            "lacks": needed - found.keys(),
            "has besides": found.keys() - needed,
            "has in another shape": {
                place.key for place in places.values() if not self._holds(place)
            },
        }
        for problem, keys in wrong.items():
            if keys:
                raise ValueError(
                    f"{self.checkpoint.directory} does not fit its architecture: it {problem} "
                    f"{', '.join(sorted(keys)[:3])} ({len(keys)} in all)"
                )

    def _holds(self, place: Place) -> bool:
        entry = self.checkpoint.tensors.get(place.key)
        if entry is None:
            return True  # named as lacking
        if place.key in (EMBEDDING, OUTPUT):  # any padding
            return entry.size[0] >= place.shape[0] and entry.size[1:] == place.shape[1:]
        return tuple(entry.size) == place.global_shape

    def place(self, row: Row) -> Place:
        """The place of a row's tensor, without the rows that pad the vocabulary."""
        shape = row.whole_size(self.settings)
        place = place_of(row.megatron, shape, self.settings["layers"])
        return replace(place, shape=shape) if row.megatron in (EMBEDDING, OUTPUT) else place

    def read(self, row: Row) -> torch.Tensor:
        """Megatron's whole tensor of `row`, the vocabulary not padded."""
        return self.checkpoint.read(self.place(row))

    def split(self, row: Row) -> list[torch.Tensor]:
        """The Hugging Face tensors of `row`."""
        return row.split(self.read(row), self.settings["heads"], self.settings["kv_heads"])


@dataclass(frozen=True)
class _Export:
    """A checkpoint on its way to a Hugging Face directory: what goes into which file."""

    model: MegatronModel
    kinds: dict[str, torch.dtype]
    """The type of each row's tensors in the files, by its name in Megatron."""
    sizes: dict[str, int]
    """Bytes of each tensor in the files, in order."""
    files: list[list[str]]
    """The tensors of each file."""

    @classmethod
    def of(
        cls, path: str | Path, output: Path, dtype: str | None, max_shard_size: str, overwrite: bool
    ) -> "_Export":
        """Raises ValueError where there is nothing to convert, or `output` may not be written."""
        limit = safetensors_out.parse_size(max_shard_size)
        model = MegatronModel.open(path)
        check_output(output, [Path(path)], CONFIG, overwrite)
        cast = DTYPES[dtype] if dtype else None
        stored = model.checkpoint.dtype
        kinds = {row.megatron: cast or stored(model.place(row)) for row in model.rows}
        sizes = {
            name: torch.Size(shape).numel() * kinds[row.megatron].itemsize
            for row in model.rows
            for name, shape in zip(row.hf, row.sizes(model.settings))
        }
        return cls(model, kinds, sizes, safetensors_out.plan(sizes, limit))

    def write(self, directory: Path, rank: int, ranks: int, counting: Counting) -> None:
        """This rank's files, and on the first rank what goes with them."""
        with counting(sum(map(len, self.files[rank::ranks]))) as progress:
            for number in range(rank, len(self.files), ranks):
                names = self.files[number]
                file = directory / safetensors_out.file_name(number, len(self.files))
                safetensors_out.write(file, dict(self._tensors(names)))
                progress(len(names))
        if rank == 0:
            safetensors_out.write_index(directory, self.files, sum(self.sizes.values()))
            _write_side_files(self.model, directory, self.kinds)

    def _tensors(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for row in self.model.rows:
            if not set(names).isdisjoint(row.hf):
                for name, part in zip(row.hf, self.model.split(row), strict=True):
                    if name in names:
                        yield name, part.to(self.kinds[row.megatron]).contiguous()


def to_hf(
    megatron_path: str | Path,
    hf_path: str | Path,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    counting: Counting = uncounted,
) -> None:
    """Writes the Hugging Face directory `hf_path`: weights, config.json, tokenizer, template.

    Collective where there is a process group: its ranks share the files.

    Args:
        dtype: fp32, bf16 or fp16; None keeps the stored type.
    Raises ValueError, before anything is written, where the source cannot be converted or the
    output may not be written.
    """
    output = Path(hf_path)
    export = agreed(lambda: _Export.of(megatron_path, output, dtype, max_shard_size, overwrite))
    with appearing_for_all(output) as partial:
        export.write(partial, rank(), ranks(), counting)


def to_hf_alone(megatron_path: str | Path, hf_path: str | Path) -> None:
    """As `to_hf` with its defaults, over an older export, by this rank without the others."""
    output = Path(hf_path)
    export = _Export.of(megatron_path, output, None, "5GB", overwrite=True)
    with appearing(output) as partial:
        export.write(partial, 0, 1, uncounted)


def _write_side_files(model: MegatronModel, output: Path, kinds: dict[str, torch.dtype]) -> None:
    """Tokenizer and settings as they came; config.json with the type of the weights."""
    if model.side_files is None:
        content = config_json(model.settings)
    else:
        copy_side_files(model.side_files, output)
        content = read_json(output / CONFIG)
    key = "torch_dtype" if "torch_dtype" in content else "dtype"
    content[key] = str(kinds[EMBEDDING]).removeprefix("torch.")
    (output / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
