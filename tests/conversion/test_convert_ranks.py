"""Both conversion tools on two ranks: the same bits, shared work, the same errors on every rank."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_rpp.conversion.convert import to_megatron
from megatron_rpp.hf.safetensors_in import INDEX, SINGLE, Weights
from tests.distributed import run_ranks
from tests.hf import odd
from tests.hf.models import save
from tools import convert_hf_to_megatron, convert_megatron_to_hf

MIXED = "model.layers.0.self_attn.k_proj.weight"


def program(main, *argv: object) -> tuple[int, str]:
    """Runs a tool; returns its exit code and its stderr without the progress bar."""
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        code = main([str(word) for word in argv])
    lines = shown.getvalue().splitlines()
    return code, "\n".join(line for line in lines if line.startswith("error: "))


def to_hf(folder: Path, source: str, target: str) -> tuple[int, str]:
    return program(
        convert_megatron_to_hf.main, "--megatron-path", folder / source, "--hf-path",
        folder / target, "--max-shard-size", "20KB",
    )  # fmt: skip


def error_of(source: Path, target: Path) -> str:
    with pytest.raises(ValueError) as error:
        to_megatron(source, target)
    return str(error.value)


def on_two_ranks(rank: int, folder: Path) -> dict:
    there = ["--hf-path", folder / "qwen2", "--megatron-path", folder / "megatron"]
    found = {"there": program(convert_hf_to_megatron.main, *there)}
    found["back"] = to_hf(folder, "megatron", "back")
    if rank == 0:
        shutil.copytree(folder / "megatron", folder / "damaged")
        flip_a_byte(next((folder / "damaged/release").glob("__1_*.distcp")))
    dist.barrier()
    found["damaged"] = to_hf(folder, "damaged", "from damaged")
    found["mixed"] = error_of(folder / "mixed", folder / "from mixed")
    found["head"] = error_of(folder / "smollm2", folder / "from head")
    # One node does not see the directory.
    found["unseen"] = error_of(folder / ("qwen2" if rank == 0 else "gone"), folder / "from unseen")
    return found


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`qwen2` in several files; `mixed`, with one tensor of another type; `smollm2`, which is tied
    but has a different head."""
    folder = tmp_path_factory.mktemp("ranks")
    source = save(folder, "qwen2")
    shutil.copytree(source, folder / "mixed", ignore=shutil.ignore_patterns("model*", INDEX))
    tensors: dict[str, torch.Tensor] = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    save_file(tensors | {MIXED: tensors[MIXED].bfloat16()}, folder / "mixed" / SINGLE)
    odd.made(folder, "smollm2", odd.tensors(lambda t: t.update({odd.HEAD: t[odd.EMBEDDING] + 1})))
    return folder


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory) -> list[dict]:
    return run_ranks(on_two_ranks, 2, tmp_path_factory.mktemp("world"), folder)


def test_two_ranks_share_the_work_and_give_the_same_bits(found, folder):
    for rank in found:
        assert rank["there"] == rank["back"] == (0, "")
    written = {path.name[:4] for path in (folder / "megatron/release").glob("*.distcp")}
    assert written == {"__0_", "__1_"}
    source, back = Weights(folder / "qwen2"), Weights(folder / "back")
    assert len(set(back.files.values())) > 3
    assert source.dtypes == back.dtypes
    assert all(torch.equal(source.read(name), back.read(name)) for name in source.shapes)
    assert not list(folder.glob(".*"))


def test_errors_are_the_same_on_every_rank(found, folder):
    messages = {
        "mixed": "are one tensor in Megatron",
        "head": "differs from model.embed_tokens.weight",
        "unseen": "gone has no config.json",
    }
    for kind, message in messages.items():
        assert found[0][kind] == found[1][kind]
        assert message in found[0][kind]
    assert [rank["damaged"][0] for rank in found] == [2, 2]
    assert "is damaged (__1_" in found[0]["damaged"][1]
    assert "has another digest than when it was written): choose another" in found[0]["damaged"][1]
    assert found[1]["damaged"][1] == "", "said once"
    assert not list(folder.glob("from *"))
