"""Writes a model as safetensors files of a bounded size, holding one file's tensors at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_rpp.hf.safetensors_in import INDEX, SINGLE

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 200MB or 1000000; raises ValueError otherwise."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B|)", text.strip(), re.IGNORECASE)
    size = float(found[1]) * _UNITS[found[2].upper()] if found else 0
    if size < 1:
        raise ValueError(f"the size must be like 5GB or 200MB, got {text!r}")
    return int(size)


def plan(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """The names of each file, in order; a tensor above `limit` bytes gets a file of its own."""
    files: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if files[-1] and used + size > limit:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files


def write(
    directory: Path,
    sizes: dict[str, int],
    tensors: Iterable[tuple[str, torch.Tensor]],
    limit: int,
) -> None:
    """Writes `tensors`, which come in the order of `sizes` (bytes by name), and their index."""
    files = plan(sizes, limit)
    stream: Iterator[tuple[str, torch.Tensor]] = iter(tensors)
    index: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        content = dict(next(stream) for _ in names)
        assert list(content) == names
        save_file(content, directory / file, metadata={"format": "pt"})
        del content
        index |= dict.fromkeys(names, file)
    if len(files) > 1:
        whole = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
        (directory / INDEX).write_text(json.dumps(whole, indent=2) + "\n")
