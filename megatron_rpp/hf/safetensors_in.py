"""Reads tensors, or slices of them, from a directory of safetensors files, one at a time.

Files are memory-mapped and only one is open at a time, so memory holds only what was asked for. The
choice of files is that of transformers: `model.safetensors` alone if it exists (an index next to it
is left from an earlier save), else the files that the index names. transformers takes a tensor from
any file that holds it, so if two files hold one tensor, they must agree.

Left out: pickled weights (`pytorch_model.bin`), which run code when they are read.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_rpp.hf.json_object import JsonObject, is_file, shown
from megatron_rpp.lifecycle.config_error import ConfigError, reading

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Files of a distributed save of transformers 5, which prefers them to all others.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_COMPARED = 64 * 2**20  # Bytes of a tensor that are compared with another at a time.


class Weights:
    """The tensors of a Hugging Face model directory."""

    def __init__(self, directory: str | Path):
        """Raises ConfigError if the weights are missing, incomplete or of an unknown kind, or if
        two files hold one tensor with different values."""
        self.directory = Path(directory).absolute()
        self._open: tuple[Path, safe_open] | None = None
        self.files: dict[str, Path] = {}
        """The file of each tensor."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        listed = self._listed()
        for file in sorted(set(listed.values())):
            self._read_header(file)
        for name in sorted(listed.keys() - self.files.keys()):
            raise ConfigError(
                f"{listed[name]} does not hold {name}, which {INDEX} says it does: fetch both again"
            )
        for name in sorted(self.files.keys() - listed.keys()):
            # transformers 5 reads this tensor, transformers 4 does not.
            raise ConfigError(
                f"{self.files[name]} holds {name}, which {INDEX} does not list: fetch both again"
            )

    def _listed(self) -> dict[str, Path]:
        """Names of tensors, each with its file. Every file that is read appears at least once."""
        index, single = self.directory / INDEX, self.directory / SINGLE
        with reading(f"{self.directory}", "correct the path, or its permissions"):
            names = sorted(path.name for path in self.directory.iterdir())
        distributed = [name for name in names if _DISTRIBUTED.fullmatch(name)]
        if distributed:
            raise ConfigError(
                f"{self.directory / distributed[0]} is part of a distributed checkpoint, which is "
                f"not read: load the model with transformers and save it with save_pretrained"
            )
        if is_file(single):
            with reading(f"{single}", "fetch it again"):
                return dict.fromkeys(self._handle(single).keys(), single)
        if not is_file(index):
            found = _instead(names)
            raise ConfigError(f"{self.directory} holds neither {SINGLE} nor {INDEX}{found}")
        files = JsonObject.read(index).section("weight_map")
        if files is None:
            raise ConfigError(f"{index} has no 'weight_map' that names files: fetch it again")
        return {name: self._inside(files, name) for name in files.content}

    def _inside(self, files: JsonObject, name: str) -> Path:
        """The path of a file in the index, which must not lead out of the directory."""
        file = files[name]
        if type(file) is not str or Path(file).name != file or "\0" in file:
            files.refuse(name, f"is {shown(file)}, which is not a file name: fetch the index again")
        return self.directory / file

    def _handle(self, file: Path) -> safe_open:
        if self._open is None or self._open[0] != file:
            self._open = None  # unmap the other file first
            with file.open("rb"):
                pass  # raises if it may not be read; safe_open would call it missing
            self._open = file, safe_open(file, framework="pt", device="cpu")
        return self._open[1]

    def _read_header(self, file: Path) -> None:
        with reading(f"{file}", "fetch it again"):
            handle = self._handle(file)
            names = list(handle.keys())  # a handle is no mapping
            found = {name: handle.get_slice(name) for name in names}
            shapes = {name: tuple(tensor.get_shape()) for name, tensor in found.items()}
            kinds = {name: tensor.get_dtype() for name, tensor in found.items()}
        for name, kind in kinds.items():
            if kind not in DTYPES:
                raise ConfigError(
                    f"{name} in {file} is of type {kind}: only {', '.join(DTYPES)} are read, "
                    f"dequantise the model first"
                )
            if name in self.files and not self.same(name, name, other=file):
                raise ConfigError(
                    f"{self.files[name]} and {file} both hold {name}, with different values: "
                    f"remove the one from another save"
                )
            self.files[name], self.shapes[name] = file, shapes[name]
            self.dtypes[name] = DTYPES[kind]

    def read(
        self, name: str, *, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """The tensor `name`, or its part from `start` to `stop` along `dim`, as a view of the
        file."""
        return self._part(self.files[name], name, dim=dim, start=start, stop=stop)

    def _part(
        self, file: Path, name: str, *, dim: int, start: int, stop: int | None
    ) -> torch.Tensor:
        with reading(f"{name} in {file}", "fetch the file again"):
            tensor = self._handle(file).get_slice(name)
            # Pages that were read from a mapped file stay in memory as long as it is open.
            self._open = None
            return tensor[(slice(None),) * dim + (slice(start, stop),)]

    def same(self, one: str, two: str, other: Path | None = None) -> bool:
        """Whether two tensors have the same shape and values, whatever their types.

        Args:
            other: the file to read `two` from; None = the file that is used for it.
        """
        files = self.files[one], other or self.files[two]
        with reading(f"{two} in {files[1]}", "fetch the file again"):
            shape = tuple(self._handle(files[1]).get_slice(two).get_shape())
        if shape != self.shapes[one]:
            return False
        rows = max(1, _COMPARED // (4 * max(1, torch.Size(shape[1:]).numel())))
        for start in range(0, shape[0] if shape else 1, rows):
            first, second = (
                self._part(file, name, dim=0, start=start, stop=start + rows).float()
                for file, name in zip(files, (one, two))
            )
            if not torch.equal(first, second):
                return False
        return True


def _instead(names: list[str]) -> str:
    """What else the directory holds, and what to do about it, in words."""
    remedies = {
        re.escape(SINGLE): "it is a broken link, or not a file: fetch it again",
        r".*-\d{5}-of-\d{5}\.safetensors": "fetch the index that belongs to it",
        r".*\.safetensors": "only files named as save_pretrained names them are read: rename it",
        r".*\.(bin|pt|pth|ckpt)": "pickled weights are not read: load the model with transformers "
        "and save it with save_pretrained",
        r".*\.gguf": "convert it with tools/gguf_to_hf.py",
    }
    for pattern, remedy in remedies.items():
        for name in names:
            if re.fullmatch(pattern, name):
                return f", but {name}: {remedy}"
    return ": give the directory of a model saved as safetensors (save_pretrained writes them)"
