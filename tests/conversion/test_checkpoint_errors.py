"""Checkpoint directories that cannot be converted: exit code 2, one line that names the file."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_rpp.config.infer_settings import HF_FOLDER
from megatron_rpp.conversion.convert import POINTER, RELEASE, to_hf, to_megatron
from tests.hf import odd
from tests.hf.models import save
from tools import convert_megatron_to_hf

COMMON, METADATA = f"{RELEASE}/common.pt", f"{RELEASE}/.metadata"
FORMAT = f"{RELEASE}/metadata.json"


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A checkpoint without a manifest, like those of Megatron."""
    folder = tmp_path_factory.mktemp("converted")
    to_megatron(save(folder, "llama2"), folder / "megatron")
    (folder / "megatron" / RELEASE / "manifest.json").unlink()
    return folder / "megatron"


def holds(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def starts(name: str, size: int) -> Callable[[Path], object]:
    """Cuts a file off after its first bytes."""
    return lambda folder: holds(name, (folder / name).read_bytes()[:size])(folder)


def lacks(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def unnamed(common: object) -> Callable[[Path], object]:
    """A checkpoint whose architecture is only in common.pt."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder / HF_FOLDER)
        torch.save(common, folder / COMMON)

    return change


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def pointer_is_a_directory(folder: Path) -> None:
    (folder / POINTER).unlink()
    (folder / POINTER).mkdir()


def no_shards(folder: Path) -> None:
    for file in (folder / RELEASE).glob("*.distcp"):
        file.write_bytes(b"")


CASES = {
    "a file": (a_file, "no checkpoint at {}"),
    "empty": (empty, "no checkpoint at {}"),
    "nothing": (shutil.rmtree, "no checkpoint at {}"),
    "a pointer in latin-1": (holds(POINTER, b"\xe9"), "{} cannot be read (UnicodeDecodeError"),
    "a pointer that is a directory": (pointer_is_a_directory, "{} cannot be read (IsADirectory"),
    "metadata cut off": (starts(METADATA, 100), "{}/release cannot be read (UnpicklingError"),
    "metadata of a list": (
        holds(METADATA, pickle.dumps([])), "{}/release cannot be read (AttributeError",
    ),
    "no format": (lacks(FORMAT), "{}/release cannot be read (FileNotFoundError"),
    "a format of a list": (holds(FORMAT, b"[]"), "{}/release cannot be read (TypeError"),
    "common.pt cut off": (starts(COMMON, 300), "{}/release/common.pt is missing or not whole"),
    "common.pt empty": (holds(COMMON, b""), "{}/release/common.pt is missing or not whole"),
    "no common.pt": (lacks(COMMON), "{}/release/common.pt is missing or not whole"),
    "a list in common.pt": (unnamed([]), "{} cannot be read (AttributeError"),
    "half an architecture": (
        unnamed({"architecture": {"layers": 4}}), "{} cannot be read (KeyError: 'qkv_bias')",
    ),
    "no architecture": (unnamed({}), "{} does not say its architecture"),
    "config.json cut off": (
        starts(f"{HF_FOLDER}/config.json", 50), "{}/hf/config.json cannot be read (JSONDecodeError",
    ),
    "empty shards": (no_shards, "in {}/release cannot be read (EOFError"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_broken_checkpoint_ends_in_one_line(converted, tmp_path, capfd, case):
    change, message = CASES[case]
    folder = shutil.copytree(converted, tmp_path / "megatron")
    change(folder)
    words = ["--megatron-path", str(folder), "--hf-path", str(tmp_path / "out")]
    assert convert_megatron_to_hf.main(words) == 2
    lines = capfd.readouterr().err.splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]  # and a progress bar
    assert message.format(folder) in error
    assert "Traceback" not in error and not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_made_is_an_error_before_the_work(converted, tmp_path):
    (tmp_path / "file").write_text("")
    message = f"{tmp_path}/file/out cannot be made: {tmp_path}/file is a file: choose another"
    with pytest.raises(ValueError, match=message):
        to_hf(converted, tmp_path / "file/out")
    with pytest.raises(ValueError, match=message):
        to_megatron(converted.parent / "llama2", tmp_path / "file/out")


def test_weight_indices_are_not_copied(tmp_path):
    """An index of pickled weights applies only to the source, and is not copied."""
    index = json.dumps({"weight_map": {}})
    change = odd.text("pytorch_model.bin.index.json", index)
    to_megatron(odd.made(tmp_path, "llama2", change), tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back")
    for folder in ("megatron/hf", "back"):
        assert not list((tmp_path / folder).glob("*.index.json"))
