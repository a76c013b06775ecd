"""Output directories that appear whole or not at all, and the small files next to the weights."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rpp.hf.architecture import ADAPTER
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.parallel.ranks import rank, world_size

# config.json, generation_config.json, tokenizers of every kind, chat templates.
_SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*")
# Files about where weights are, or what goes on top of them, apply only to the source.
_LEFT_BEHIND = ("*.index.json", ADAPTER)


def check_output(output: Path, sources: list[Path], *, marker: str, overwrite: bool) -> None:
    """Raises ConfigError if writing `output` could destroy something of the user's.

    Args:
        marker: a file that every directory of this kind holds. Other directories are never
            overwritten.
    """
    for source in sources:
        inner, outer = output.resolve(), source.resolve()
        if inner == outer or inner in outer.parents or outer in inner.parents:
            raise ConfigError(f"{output} overlaps the source {source}: choose another directory")
    place = next(parent for parent in output.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        problem = "may not be written" if place.is_dir() else "is a file"
        raise ConfigError(f"{output} cannot be made: {place} {problem}: choose another directory")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{output} exists: choose another directory, or add --overwrite")
    if not (output / marker).is_file():
        raise ConfigError(
            f"{output} exists and holds no {marker}, so it is not what would be overwritten: "
            f"choose another directory, or remove it yourself"
        )


@contextlib.contextmanager
def atomic_directory(output: Path) -> Iterator[Path]:
    """A temporary directory next to `output` that replaces it when the block ends without an error.

    Only then is the old content of `output` removed; after an error nothing has changed.
    """
    output = output.absolute()
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _exchange(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def atomic_directory_for_all(output: Path) -> Iterator[Path]:
    """The same, with one directory for all ranks of the process group, if there is one.
    Collective."""
    if world_size() == 1:
        with atomic_directory(output) as partial:
            yield partial
        return
    with contextlib.ExitStack() as main:
        box: list[Any] = [main.enter_context(atomic_directory(output)) if rank() == 0 else None]
        dist.broadcast_object_list(box)
        yield box[0]
        dist.barrier()
    dist.barrier()


def _exchange(partial: Path, output: Path) -> None:
    replaced = output.with_name(f".{output.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if output.exists():
        output.rename(replaced)
    partial.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)


def copy_side_files(source: Path, destination: Path) -> None:
    """Copies all files of a model directory except weights and code."""
    destination.mkdir(parents=True, exist_ok=True)
    files = {file for pattern in _SIDE_FILES for file in source.glob(pattern)}
    files -= {file for pattern in _LEFT_BEHIND for file in source.glob(pattern)}
    for file in sorted(files):
        if file.is_file():
            shutil.copyfile(file, destination / file.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, destination / templates.name, dirs_exist_ok=True)
