"""Converts whole models from Hugging Face to Megatron and back, a tensor at a time, on CPUs alone.

A Megatron directory made here has a folder `hf` for what the weights do not contain: config.json,
tokenizer, chat template, generation settings. It loads on any tensor × pipeline layout and has a
manifest like a trained checkpoint. The ranks of a process group share the tensors, or the files;
all of them raise the same ConfigError.

Left out: optimizer states; casting on the way in (a weight keeps the type it is stored in).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rpp.checkpoint import manifest
from megatron_rpp.checkpoint.store import POINTER
from megatron_rpp.config.infer_settings import HF_FOLDER
from megatron_rpp.conversion import DTYPE_NAMES, dist_checkpoint
from megatron_rpp.conversion.models import Advance, HfModel, MegatronModel
from megatron_rpp.conversion.output_dir import (
    atomic_directory,
    atomic_directory_for_all,
    check_output,
    copy_side_files,
)
from megatron_rpp.hf import safetensors_out
from megatron_rpp.hf.architecture import CONFIG, config_json, read_architecture
from megatron_rpp.hf.classifier import labels_json, padding_json
from megatron_rpp.hf.families import EMBEDDING
from megatron_rpp.hf.json_object import read_json
from megatron_rpp.parallel.ranks import raise_on_all_ranks, rank, world_size

RELEASE = "release"
DTYPES = dict(zip(DTYPE_NAMES, (torch.float32, torch.bfloat16, torch.float16), strict=True))
Counting = Callable[[int], AbstractContextManager[Advance]]
"""Number of tensors -> a context that counts them, for a progress bar."""


def uncounted(total: int) -> AbstractContextManager[Advance]:
    """Shows no progress."""
    return nullcontext(lambda done: None)


def unlogged(note: str) -> None:
    """Drops a note."""


def to_megatron(
    hf_path: str | Path,
    megatron_path: str | Path,
    overwrite: bool = False,
    *,
    counting: Counting = uncounted,
    log: Callable[[str], None] = unlogged,
) -> Path:
    """Writes the checkpoint `megatron_path/release`. Collective if there is a process group.

    Args:
        counting: opens a progress bar.
        log: called with each note about what may differ from what the user expects (source.py).

    Raises ConfigError, before anything is written, if the source cannot be converted or the output
    must not be written.
    """
    source, output = raise_on_all_ranks(lambda: HfModel(hf_path)), Path(megatron_path)
    raise_on_all_ranks(
        lambda: check_output(output, [source.directory], marker=POINTER, overwrite=overwrite)
    )
    for note in source.notes:
        log(note)
    rows = source.rows[rank() :: world_size()]
    common = {"architecture": source.settings, "iteration": 0, "checkpoint_version": 3.0}
    with atomic_directory_for_all(output) as partial, counting(len(rows)) as advance:
        entries = [source.entry(row, advance) for row in rows]
        dist_checkpoint.write(partial / RELEASE, entries, common)
        manifest.write_manifest(partial / RELEASE, {"step": 0})
        if rank() == 0:
            copy_side_files(source.directory, partial / HF_FOLDER)
            (partial / POINTER).write_text(f"{RELEASE}\n")
    return output / RELEASE


@dataclass(frozen=True)
class _Export:
    """The plan of an export to a Hugging Face directory: which tensor goes into which file."""

    model: MegatronModel
    kinds: dict[str, torch.dtype]
    """The type of the tensors of each row in the files, by the name of the row in Megatron."""
    sizes: dict[str, int]
    """Bytes of each tensor in the files, in order."""
    files: list[list[str]]
    """The tensors of each file."""
    config: dict[str, Any]
    """The content of config.json."""

    @classmethod
    def of(
        cls,
        path: str | Path,
        output: Path,
        *,
        dtype: str | None,
        max_shard_size: str,
        overwrite: bool,
    ) -> _Export:
        """Raises ConfigError if there is nothing to convert or `output` must not be written."""
        limit = safetensors_out.parse_size(max_shard_size)
        model = MegatronModel.open(path)
        check_output(output, [Path(path)], marker=CONFIG, overwrite=overwrite)
        cast = DTYPES[dtype] if dtype else None
        stored = model.checkpoint.dtype
        kinds = {row.megatron: cast or stored(model.place(row)) for row in model.rows}
        sizes = {
            name: torch.Size(shape).numel() * kinds[row.megatron].itemsize
            for row in model.rows
            for name, shape in zip(row.hf, row.sizes(model.settings))
        }
        config = _config_json(model, kinds[EMBEDDING])
        return cls(model, kinds, sizes, safetensors_out.plan(sizes, limit), config)

    def write(self, directory: Path, *, rank: int, ranks: int, counting: Counting) -> None:
        """Writes the files of this rank, and on the first rank also the index and the side
        files."""
        with counting(sum(map(len, self.files[rank::ranks]))) as advance:
            for number in range(rank, len(self.files), ranks):
                names = self.files[number]
                file = directory / safetensors_out.file_name(number, len(self.files))
                safetensors_out.write(file, dict(self._tensors(names)))
                advance(len(names))
        if rank == 0:
            safetensors_out.write_index(directory, self.files, sum(self.sizes.values()))
            if self.model.side_files is not None:
                copy_side_files(self.model.side_files, directory)
            (directory / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n")

    def _tensors(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for row in self.model.rows:
            if not set(names).isdisjoint(row.hf):
                for name, part in zip(row.hf, self.model.split(row), strict=True):
                    if name in names:
                        yield name, part.to(self.kinds[row.megatron]).contiguous()


def to_hf(
    megatron_path: str | Path,
    hf_path: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    counting: Counting = uncounted,
) -> None:
    """Writes the Hugging Face directory `hf_path`: weights, config.json, tokenizer, template.

    Collective if there is a process group: its ranks share the files.

    Args:
        dtype: fp32, bf16 or fp16; None keeps the stored type.

    Raises ConfigError, before anything is written, if the source cannot be converted or the output
    must not be written.
    """
    output = Path(hf_path)
    export = raise_on_all_ranks(
        lambda: _Export.of(
            megatron_path, output, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite
        )
    )
    with atomic_directory_for_all(output) as partial:
        export.write(partial, rank=rank(), ranks=world_size(), counting=counting)


def to_hf_alone(megatron_path: str | Path, hf_path: str | Path) -> None:
    """Does the same as `to_hf` on this rank alone, with its defaults, and replaces an older
    export."""
    output = Path(hf_path)
    export = _Export.of(megatron_path, output, dtype=None, max_shard_size="5GB", overwrite=True)
    with atomic_directory(output) as partial:
        export.write(partial, rank=0, ranks=1, counting=uncounted)


def _config_json(model: MegatronModel, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json: that of the side files, with the type of the weights.

    For a reward model that was trained from a language model, it also has what makes it a
    classifier.
    """
    side = model.side_files
    if side is None:
        content = config_json(model.settings)
    else:
        content = read_json(side / CONFIG)
        if read_architecture(side).name != model.name:
            content |= padding_json(side, content) | labels_json() | {"architectures": [model.name]}
    # If both keys are present, transformers prefers `dtype`.
    for key in content.keys() & {"dtype", "torch_dtype"} or {"dtype"}:
        content[key] = str(dtype).removeprefix("torch.")
    return content
