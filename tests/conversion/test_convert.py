"""Hugging Face to Megatron and back: the same bits and side files, errors, and memory.

tests/model/test_hf_weights.py loads the checkpoints on every layout and compares with transformers.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_rpp.checkpoint import manifest, store
from megatron_rpp.conversion.convert import HF_FOLDER, POINTER, to_hf, to_megatron
from megatron_rpp.hf import safetensors_out
from megatron_rpp.hf.architecture import config_json, read_architecture
from megatron_rpp.hf.families import rows_of
from megatron_rpp.hf.safetensors_in import INDEX, SINGLE, Weights
from megatron_rpp.hf.safetensors_out import parse_size, plan
from tests.hf.models import CLASSIFIERS, FAMILIES, LLAMA3, positions, save
from tools import convert_hf_to_megatron, convert_megatron_to_hf

ROOT = Path(__file__).resolve().parents[2]
SIDE_FILES = {
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": '{"eos_token": "</s>"}',
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": '{"eos_token_id": [2, 3]}',
}


def weights(directory):
    files = Weights(directory)
    return {name: files.read(name).clone() for name in files.shapes}


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Qwen2 in several files with a tokenizer; tests do not change it."""
    path = save(tmp_path_factory.mktemp("source"), "qwen2")
    for name, content in SIDE_FILES.items():
        (path / name).write_text(content)
    (path / "modeling_evil.py").write_text("print('code')")
    return path


@pytest.fixture(scope="module")
def converted(source):
    to_megatron(source, source.parent / "megatron")
    return source.parent / "megatron"


@pytest.fixture
def copy(source, tmp_path):
    """The source in one file, for tests that damage it: its directory and its tensors."""
    shutil.copytree(source, tmp_path / "model", ignore=shutil.ignore_patterns("model*", INDEX))
    tensors = weights(source)
    save_file(tensors, tmp_path / "model" / SINGLE)
    return tmp_path / "model", tensors


@pytest.mark.parametrize("family", FAMILIES | CLASSIFIERS)
def test_there_and_back_gives_the_same_bits(tmp_path, family):
    path = save(tmp_path, family)
    to_megatron(path, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_size="20KB")
    assert_same_bits(weights(tmp_path / "back"), weights(path))
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 3


def test_the_tree_is_megatrons_and_side_files_are_copied(source, converted, tmp_path):
    assert (converted / POINTER).read_text() == "release\n"
    assert {".metadata", "metadata.json", "common.pt"} <= {
        path.name for path in (converted / "release").iterdir()
    }
    to_hf(converted, tmp_path / "back")
    for folder in (converted / HF_FOLDER, tmp_path / "back"):
        for name, content in SIDE_FILES.items():
            assert (folder / name).read_text() == content
        assert not (folder / "modeling_evil.py").exists()
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


def test_types_stay_unless_configured(source, tmp_path):
    half = {name: value.bfloat16() for name, value in weights(source).items()}
    shutil.copytree(source, tmp_path / "half", ignore=shutil.ignore_patterns("model*", INDEX))
    save_file(half, tmp_path / "half" / SINGLE)
    to_megatron(tmp_path / "half", tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "kept")
    assert_same_bits(weights(tmp_path / "kept"), half)
    to_hf(tmp_path / "megatron", tmp_path / "cast", dtype="fp32")
    assert_same_bits(weights(tmp_path / "cast"), {n: value.float() for n, value in half.items()})
    kinds = [
        json.loads((tmp_path / n / "config.json").read_text())["dtype"] for n in ("kept", "cast")
    ]
    assert kinds == ["bfloat16", "float32"]


def test_existing_outputs_are_errors_and_replaced_whole(source, converted, tmp_path, capsys):
    there = ["--hf-path", str(source), "--megatron-path", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    assert convert_hf_to_megatron.main(there) == 0  # an empty directory does not count as existing
    assert convert_hf_to_megatron.main(there) == 2
    assert "exists: choose another directory, or add --overwrite" in capsys.readouterr().err
    (tmp_path / "out/old").write_text("")
    assert convert_hf_to_megatron.main([*there, "--overwrite"]) == 0
    assert not (tmp_path / "out/old").exists()
    back = ["--megatron-path", str(converted), "--hf-path", str(tmp_path / "home"), "--overwrite"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("")
    assert convert_megatron_to_hf.main(back) == 2
    assert "holds no config.json" in capsys.readouterr().err
    assert (tmp_path / "home/thesis.tex").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("inside", [".", "below", ".."])
def test_the_output_must_not_be_inside_the_source(source, inside):
    before = sorted(source.rglob("*"))
    with pytest.raises(ValueError, match="overlaps the source"):
        to_megatron(source, source / inside, overwrite=True)
    assert sorted(source.rglob("*")) == before


def set_config(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "no table for the architecture 'MambaForCausalLM'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling 'yarn' is not supported"),
        ({"num_hidden_layers": 5, "layer_types": None}, r"lacks model.layers.4.*\(12 in all\)"),
        ({"num_hidden_layers": 3, "layer_types": None}, r"also has model.layers.3"),
        ({"hidden_size": 64}, "has in another shape lm_head.weight"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
         "also has model.layers.0.self_attn.k_proj.bias"),
    ],
)  # fmt: skip
def test_unsupported_values_are_errors_that_name_them(copy, tmp_path, values, message):
    set_config(copy[0], **values)
    with pytest.raises(ValueError, match=message):
        to_megatron(copy[0], tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("family", ["llama2", "llama3"])
def test_both_spellings_of_rotary_positions_are_one(tmp_path, family):
    """transformers 5 writes `rope_parameters`; transformers 4 and we write `rope_theta` and
    `rope_scaling`. transformers reads both, and so do we."""
    from transformers import AutoConfig

    def rope(directory) -> dict:
        content = AutoConfig.from_pretrained(directory).to_dict()
        return {name: value for name, value in content.items() if name.startswith("rope_")}

    path = save(tmp_path, family)
    settings = read_architecture(path).settings
    theirs = rope(path)
    content = json.loads((path / "config.json").read_text())
    assert {n for n in content if n.startswith("rope_")} == positions(LLAMA3).keys()
    ours = config_json(settings)
    assert ours["rope_theta"] == 500.0 and "rope_parameters" not in ours
    (path / "config.json").write_text(json.dumps(ours))
    assert read_architecture(path).settings == settings
    assert rope(path) == theirs


def test_broken_files_are_errors(copy, tmp_path):
    folder, tensors = copy
    mixed = "model.layers.0.self_attn.k_proj.weight"
    save_file(tensors | {mixed: tensors[mixed].bfloat16()}, folder / SINGLE)
    with pytest.raises(ValueError, match="one tensor in Megatron, but are stored as"):
        to_megatron(folder, tmp_path / "out")
    save_file(tensors | {mixed: tensors[mixed].to(torch.int8)}, folder / SINGLE)
    with pytest.raises(ValueError, match="of type I8: only F32, BF16, F16"):
        to_megatron(folder, tmp_path / "out")
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be read"):
        to_megatron(folder, tmp_path / "out")
    (folder / SINGLE).unlink()
    with pytest.raises(ValueError, match="holds neither"):
        to_megatron(folder, tmp_path / "out")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "../secret"}}))
    with pytest.raises(ValueError, match="not a file name"):
        to_megatron(folder, tmp_path / "out")


def test_a_torn_checkpoint_is_an_error(converted, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint at"):
        to_hf(tmp_path, tmp_path / "out")
    shutil.copytree(converted, tmp_path / "torn")
    (tmp_path / "torn/release/.metadata").write_bytes(b"")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        to_hf(tmp_path / "torn", tmp_path / "out")


def test_a_converted_checkpoint_has_a_manifest(converted, tmp_path, capsys):
    """Loading the checkpoint and converting it back both detect one flipped bit."""
    assert store.require(converted) == converted / "release"
    assert manifest.damage(converted / "release") is None
    shutil.copytree(converted, tmp_path / "damaged")
    file = next((tmp_path / "damaged/release").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file.name} has another digest"):
        store.require(tmp_path / "damaged")
    back = ["--megatron-path", str(tmp_path / "damaged"), "--hf-path", str(tmp_path / "back")]
    assert convert_megatron_to_hf.main(back) == 2
    assert f"is damaged ({file.name} has another digest" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_files_are_filled_up_to_their_size():
    assert [parse_size(text) for text in ("5GB", "200 mb", "1.5KB", "7")] == [5 * 10**9, 2 * 10**8, 1500, 7]  # fmt: skip
    with pytest.raises(ValueError, match="like 5GB or 200MB, got '5 TB'"):
        parse_size("5 TB")
    sizes = {"a": 4, "b": 6, "c": 1, "d": 20, "e": 10}
    assert plan(sizes, 10) == [["a", "b"], ["c"], ["d"], ["e"]]


_MEASURE = """
from pathlib import Path
from megatron_rpp.conversion.convert import to_hf, to_megatron
def added(work):
    # Bytes by which the resident set grew at most, mapped files included.
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = held("VmRSS")
    work()
    return held("VmHWM") - before
def held(name):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024
to_megatron({small!r}, {small!r} + "-m")  # what the code itself takes
to_hf({small!r} + "-m", {small!r} + "-b")
print(
    added(lambda: to_megatron({source!r}, {megatron!r})),
    added(lambda: to_hf({megatron!r}, {back!r}, max_shard_size="64MB")),
)
"""


def test_memory_stays_under_one_and_a_half_files(tmp_path):
    """A model of five 64 MB files; each direction may add at most 96 MB to the resident set."""
    path, small = save(tmp_path, "llama2"), save(tmp_path, "smollm2")
    for file in path.glob("model*"):
        file.unlink()
    set_config(path, hidden_size=512, head_dim=128, intermediate_size=2048, num_hidden_layers=16,
               vocab_size=8000)  # fmt: skip
    model = read_architecture(path)
    shapes = {
        name: size
        for row in rows_of(model.name, model.settings)
        for name, size in zip(row.hf, row.sizes(model.settings))
    }
    sizes = {name: 4 * torch.Size(size).numel() for name, size in shapes.items()}
    files = plan(sizes, 64 * 10**6)
    for number, names in enumerate(files):
        content = {name: torch.rand(shapes[name]) for name in names}
        safetensors_out.write(path / safetensors_out.file_name(number, len(files)), content)
    safetensors_out.write_index(path, files, sum(sizes.values()))
    files = set(Weights(path).files.values())
    largest, limit = max(file.stat().st_size for file in files), 96 * 10**6
    assert largest > 60 * 10**6 and len(set(Weights(path).files.values())) >= 5
    code = _MEASURE.format(
        source=str(path), megatron=str(tmp_path / "m"), back=str(tmp_path / "b"), small=str(small)
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for way, added in zip(("there", "back"), map(int, done.stdout.split())):
        assert largest / 4 < added < limit, (
            way,
            added,
        )  # the lower bound proves that it measures
    assert_same_bits(weights(tmp_path / "b"), weights(path))
