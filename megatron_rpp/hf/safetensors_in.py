"""Reads tensors, or slices of them, from a directory of safetensors files, one at a time.

Files are memory-mapped and only one is open, so that memory holds what was asked for. Names come
from the index where there is one; each file is trusted for its own tensors only.

Left out: pickled weights (`pytorch_model.bin`), which run code when they are read.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Weights:
    """The tensors of a Hugging Face model directory."""

    def __init__(self, directory: str | Path):
        """Raises ValueError where the weights are missing, incomplete or of an unknown kind."""
        self.directory = Path(directory)
        self._open: tuple[Path, object] | None = None
        self.files = self._files()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in sorted(set(self.files.values())):
            self._read_header(file)

    def _files(self) -> dict[str, Path]:
        """The file of each tensor."""
        index, single = self.directory / INDEX, self.directory / SINGLE
        if index.is_file():
            names = json.loads(index.read_text())["weight_map"]
            return {name: self._inside(file) for name, file in names.items()}
        if not single.is_file():
            raise ValueError(
                f"{self.directory} holds neither {INDEX} nor {SINGLE}: give the directory of a "
                f"model saved as safetensors (save_pretrained writes them)"
            )
        return {name: single for name in self._handle(single).keys()}

    def _inside(self, file: str) -> Path:
        """The index comes from elsewhere: it may not lead out of the directory."""
        if Path(file).name != file:
            raise ValueError(f"{self.directory / INDEX} names {file!r}, which is not a file name")
        return self.directory / file

    def _handle(self, file: Path):
        if self._open is None or self._open[0] != file:
            self._open = None  # unmap the file before
            try:
                self._open = file, safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read ({error}): fetch it again") from error
        return self._open[1]

    def _read_header(self, file: Path) -> None:
        handle = self._handle(file)
        there = set(handle.keys())
        for name in (name for name, where in self.files.items() if where == file):
            if name not in there:
                raise ValueError(f"{file} does not hold {name}, which the index says it does")
            tensor = handle.get_slice(name)
            if tensor.get_dtype() not in DTYPES:
                raise ValueError(
                    f"{name} in {file} is of type {tensor.get_dtype()}: only "
                    f"{', '.join(DTYPES)} are read, dequantise the model first"
                )
            self.shapes[name] = tuple(tensor.get_shape())
            self.dtypes[name] = DTYPES[tensor.get_dtype()]

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None):
        """`name`, or its part from `start` to `stop` along `dim`; a view of the file."""
        tensor = self._handle(self.files[name]).get_slice(name)
        # What was touched of a mapped file stays in memory as long as it is open.
        self._open = None
        return tensor[(slice(None),) * dim + (slice(start, stop),)]

    @property
    def largest_file(self) -> int:
        """Bytes."""
        return max(file.stat().st_size for file in set(self.files.values()))
