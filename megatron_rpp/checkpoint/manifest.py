"""Manifests: whether a directory is complete and undamaged.

The manifest is written last and names every file with its size and checksum. Everything is on the
disk before a rename makes the directory visible. The ranks share the work on many files: each
computes the checksums of every world-size-th file. A process without a process group is a world of
one.

Left out: signatures. A checksum shows damage, not intent.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.atomic_files import sync_directory, write_atomic
from megatron_rpp.parallel import ranks

MANIFEST = "manifest.json"
_ALGORITHM = "blake2b"


def _share_of_this_rank(names: list[str]) -> list[str]:
    alone = not dist.is_initialized()
    return names if alone else names[dist.get_rank() :: dist.get_world_size()]


def describe(path: Path, to_disk: bool = False) -> dict[str, Any]:
    """A file's entry in the manifest: size in bytes and checksum. to_disk: flush it to the disk.

    A sign of life.
    """
    heartbeat.current.beat()
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, _ALGORITHM).hexdigest()
        if to_disk:
            os.fsync(file.fileno())
        return {"size": os.fstat(file.fileno()).st_size, _ALGORITHM: digest}


def write_manifest(
    directory: str | Path,
    notes: dict[str, Any] | None = None,
    described: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Writes the manifest of `directory`, whose files are complete by now. Collective.

    Args:
        notes: JSON values that the manifest holds too.
        described: entries, by name, of files that are on the disk already and are not read again;
            the same on every rank.
    Raises:
        OSError: on every rank, if the file system fails on any.
    """
    directory = Path(directory)
    known = described or {}
    names = [name for name in ranks.on_main_rank(partial(_files, directory)) if name not in known]
    shares = ranks.on_every_rank(
        lambda: {
            name: describe(directory / name, to_disk=True) for name in _share_of_this_rank(names)
        }
    )
    files = known | {name: entry for share in shares for name, entry in share.items()}
    ranks.on_main_rank(partial(_write_file, directory, notes or {}, files))


def _files(directory: Path) -> list[str]:
    found = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
    return sorted(str(name) for name in found if str(name) != MANIFEST)


def _write_file(directory: Path, notes: dict[str, Any], files: dict[str, dict]) -> None:
    for folder in {(directory / name).parent for name in files} | {directory}:
        sync_directory(folder)
    content = {"notes": notes, "files": dict(sorted(files.items()))}
    write_atomic(directory / MANIFEST, json.dumps(content, indent=1).encode())


def _first_damage(directory: Path, files: dict[str, dict], names: list[str]) -> str | None:
    for name in names:
        try:
            size = (directory / name).stat().st_size
            if size != files[name]["size"]:
                return f"{name} has {size} bytes, not {files[name]['size']}"
            if describe(directory / name) != files[name]:
                return f"{name} has another digest than when it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def read_manifest(directory: str | Path) -> dict[str, Any] | None:
    """The manifest of a directory; None if there is none or it cannot be read."""
    try:
        content = json.loads((Path(directory) / MANIFEST).read_text())
        return content if isinstance(content["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def damage(directory: str | Path) -> str | None:
    """What is wrong with a directory, the same on every rank; None: nothing. Collective."""
    heartbeat.enter("check a checkpoint")
    directory = Path(directory)
    manifest = ranks.gathered(read_manifest(directory))[0]
    if manifest is None:
        return f"{MANIFEST} is missing or unreadable"
    files = manifest["files"]
    found = ranks.gathered(_first_damage(directory, files, _share_of_this_rank(sorted(files))))
    return next((text for text in found if text is not None), None)
