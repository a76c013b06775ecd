"""Hugging Face directories that differ from what save_pretrained writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_rpp.hf.safetensors_in import INDEX, SINGLE
from tests.hf.models import edit, save

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Tensors = dict[str, torch.Tensor]
Change = Callable[[Path], object]
"""Changes the directory that it is given."""


def made(folder: Path, family: str, change: Change, shards: str = "1GB") -> Path:
    """A directory of `family` in files of up to `shards`, changed."""
    directory = save(folder, family, shards)
    change(directory)
    return directory


def tensors(change: Callable[[Tensors], object]) -> Change:
    """Changes the tensors of a directory with one file."""
    return partial(edit, change=change)


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def index(change: Callable[[dict[str, str]], object]) -> Change:
    """Changes the files that the index names."""

    def rewrite(directory: Path) -> None:
        path = directory / INDEX
        content = json.loads(path.read_text())
        change(content["weight_map"])
        path.write_text(json.dumps(content))

    return rewrite


def older_save(directory: Path) -> None:
    """Adds the index and shards of an earlier save, which differ, next to the whole file."""
    older = save(directory.with_name("older"), directory.name, "30KB", seed=4)
    for file in older.glob("model*"):
        shutil.copy(file, directory)


def older_index(directory: Path) -> None:
    """Leaves the index of an earlier save, whose shards save_pretrained removes."""
    older_save(directory)
    for file in shards(directory):
        file.unlink()


def in_two_shards(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Adds a changed copy of the embedding to the last shard."""

    def repeat(directory: Path) -> None:
        (embedding,) = (t[EMBEDDING] for t in map(load_file, shards(directory)) if EMBEDDING in t)
        file = shards(directory)[-1]
        save_file(load_file(file) | {EMBEDDING: change(embedding)}, file, {"format": "pt"})

    return repeat


def stored_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def beside(name: str) -> Change:
    """Adds another file of weights."""
    return lambda directory: save_file({HEAD: torch.zeros(3)}, directory / name)


def pickled(directory: Path) -> None:
    torch.save({HEAD: torch.zeros(3)}, directory / "pytorch_model.bin")


def text(name: str, content: str) -> Change:
    """Adds or replaces a file."""
    return lambda directory: (directory / name).write_text(content)


def renamed(name: str) -> Change:
    return lambda directory: (directory / SINGLE).rename(directory / name)


def half(tensors: Tensors) -> None:
    """Applies to everything except the norms."""
    tensors |= {name: value.bfloat16() for name, value in tensors.items() if "norm" not in name}
