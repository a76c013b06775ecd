"""Writes a model as safetensors files of bounded size, one at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_rpp.hf.safetensors_in import INDEX, SINGLE
from megatron_rpp.lifecycle.config_error import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 200MB or 1000000. Raises ConfigError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B|)", text.strip(), re.IGNORECASE)
    size = float(found[1]) * _UNITS[found[2].upper()] if found else 0
    if size < 1:
        raise ConfigError(f"the size must be like 5GB or 200MB, got {text!r}")
    return int(size)


def plan(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """The tensors of each file, in order. A tensor larger than `limit` bytes gets a separate
    file."""
    files: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if files[-1] and used + size > limit:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files


def file_name(number: int, files: int) -> str:
    """The name of file `number`, counted from 0, out of `files`."""
    return SINGLE if files == 1 else f"model-{number + 1:05d}-of-{files:05d}.safetensors"


def write(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes one file."""
    save_file(tensors, file, metadata={"format": "pt"})


def write_index(directory: Path, files: list[list[str]], total_size: int) -> None:
    """Writes the index of several files: which one holds which tensor. `total_size` is in bytes."""
    if len(files) > 1:
        index = {
            name: file_name(number, len(files))
            for number, names in enumerate(files)
            for name in names
        }
        whole = {"metadata": {"total_size": total_size}, "weight_map": index}
        (directory / INDEX).write_text(json.dumps(whole, indent=2) + "\n")
