"""The checks of GPUs, from facts that are written down here: no GPU is needed.

The compiler is the real one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.parallel.accelerators import Package
from megatron_rpp.parallel.gpu_facts import (
    GpuFacts,
    NodeFacts,
    active_ports,
    compile_error,
    gpu_facts,
    least_nvlinks,
)
from megatron_rpp.runtime import preflight
from megatron_rpp.runtime.host_memory import HostMemory
from megatron_rpp.runtime.policy import build_policy
from megatron_rpp.runtime.preflight_gpu import (
    Check,
    judge_gpu,
    judge_host_memory,
    judge_node,
    merge,
)
from tests.small_run import config_of, make_data
from tests.whole_runs import layout

HERE = Package("2.20.2")
ABSENT = Package()
BROKEN = Package("2.20.2", "OSError: libcublas.so.13: cannot open shared object file")
GOOD = GpuFacts(
    name="NVIDIA H100 80GB HBM3",
    has_bf16=True,
    cudnn=92000,
    nccl=(2, 29, 7),
    transformer_engine=HERE,
    weight_gradients=Package("0.1"),
    flash_attention=Package("2.8.3"),
    compile_error=None,
    gpus=8,
    nvlinks=18,
    infiniband=["mlx5_0 400 Gb/sec (4X NDR)"],
)
NODE = NodeFacts(driver="580.65.06", hidden=False, torch="2.13.0", cuda="13.0")


def judged(dtype="bf16", transformer_impl="auto", **facts) -> dict[str, Check]:
    checks = judge_gpu(
        replace(GOOD, **facts), dtype=dtype, transformer_impl=transformer_impl, several_nodes=True
    )
    return {check.name: check for check in checks}


def test_a_good_gpu_passes_and_is_described():
    checks = judged()
    assert all(check.passed for check in checks.values())
    assert {name: check.found for name, check in checks.items()} == {
        "precision": "bf16; bf16 yes",
        "libraries": "cuDNN 9.20.0, NCCL 2.29.7",
        "TransformerEngine": "2.20.2",
        "optional kernels": "Apex's weight gradients 0.1, flash-attn 2.8.3",
        "torch.compile": "compiles",
        "links": "at least 18 NVLinks between two GPUs; InfiniBand mlx5_0 400 Gb/sec (4X NDR)",
    }


@pytest.mark.parametrize(
    ("name", "facts", "words"),
    [
        ("precision", {"has_bf16": False, "name": "Tesla V100"}, "Tesla V100 has no bf16"),
        ("libraries", {"nccl": None}, "without NCCL"),
        ("libraries", {"cudnn": 90100}, "cuDNN 9.1.0, NCCL 2.29.7: TransformerEngine needs cuDNN 9.3.0"),
        ("libraries", {"cudnn": None}, "cuDNN absent"),
        ("TransformerEngine", {"transformer_engine": BROKEN}, "libcublas.so.13"),
        ("TransformerEngine", {"transformer_engine": BROKEN}, "model.transformer_impl to local"),
        ("torch.compile", {"compile_error": "RuntimeError: no gcc"}, "no gcc: .*install gcc"),
    ],
)  # fmt: skip
def test_what_keeps_a_run_from_starting_fails_with_its_remedy(name, facts, words):
    checks = judged(**facts)
    assert [check.name for check in checks.values() if not check.passed] == [name]
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(checks[name].found)


@pytest.mark.parametrize(
    ("name", "facts", "words"),
    [
        ("TransformerEngine", {"transformer_engine": ABSENT}, "install.sh --gpu"),
        ("optional kernels", {"weight_gradients": ABSENT}, "requirements-gpu.txt"),
        ("optional kernels", {"flash_attention": ABSENT}, "pip install"),
        ("optional kernels", {"flash_attention": BROKEN}, "libcublas.so.13: .*build it anew"),
        ("links", {"nvlinks": 0}, "tensor parallelism is slow"),
        ("links", {"nvlinks": None}, "NVLink unknown"),
        ("links", {"infiniband": []}, "nodes talk over TCP"),
        ("links", {"gpus": 1, "nvlinks": None}, "one GPU is visible"),
    ],
)
def test_what_makes_a_run_slower_passes_and_is_said(name, facts, words):
    check = judged(**facts)[name]
    assert check.passed
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(check.found)


def test_settings_go_without():
    assert judged("fp32", has_bf16=False)["precision"].passed
    local = judged(transformer_impl="local", transformer_engine=BROKEN, cudnn=None)
    assert local["TransformerEngine"].passed and local["libraries"].passed
    assert "model.transformer_impl is local" in local["TransformerEngine"].found
    asked = judged(transformer_impl="transformer_engine", transformer_engine=ABSENT)
    assert not asked["TransformerEngine"].passed


def test_one_node_needs_no_infiniband():
    facts = replace(GOOD, infiniband=[])
    checks = judge_gpu(facts, dtype="bf16", transformer_impl="auto", several_nodes=False)
    links = checks[-1]
    assert links.found == "at least 18 NVLinks between two GPUs"


@pytest.mark.parametrize(
    ("node", "on_gpu", "passed", "words"),
    [
        (NODE, True, True, "580.65.06; torch 2.13.0 is a build for CUDA 13.0"),
        (replace(NODE, driver=None), False, True, "the run uses the CPU"),
        (replace(NODE, hidden=True), False, True, "hides the GPUs"),
        (NODE, False, False, "torch.cuda.init"),
        (replace(NODE, driver="535.10"), False, False, "update the driver to 580 or newer"),
        (replace(NODE, cuda=None), False, False, "a build for the CPU; .*install.sh --gpu"),
    ],
    ids=["good", "no GPU", "hidden", "unknown", "old driver", "CPU build"],
)
def test_a_gpu_that_torch_cannot_use_is_no_cpu_run(node, on_gpu, passed, words):
    check = judge_node(node, on_gpu)
    assert check.passed == passed
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(check.found)


def test_ranks_are_merged():
    ranks = [
        ("a", [Check("x", True, "1"), Check("y", True, "1")]),
        ("b", [Check("x", True, "1"), Check("y", False, "bad")]),
        ("c", [Check("x", True, "2")]),
    ]
    assert merge(ranks) == [Check("x", True, "1 | 2"), Check("y", False, "b: bad")]


TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tNV12\tPIX\t0-31\t0
GPU1\tNV18\t X \t{}\tSYS\t0-31\t0
GPU2\tNV12\t{}\t X \tSYS\t0-31\t0
NIC0\tPIX\tSYS\tSYS\t X

Legend:
  X    = Self
"""


@pytest.mark.parametrize(
    ("topology", "least"),
    [(TOPOLOGY.replace("{}", "NV18"), 12), (TOPOLOGY.replace("{}", "SYS"), 0), ("", None),
     ("\tGPU0\tCPU Affinity\nGPU0\t X \t0-31\n", None)],
    ids=["linked", "one pair by PCIe", "no nvidia-smi", "one GPU"],
)  # fmt: skip
def test_nvlinks_are_read(topology, least):
    assert least_nvlinks(topology) == least


def test_infiniband_ports_are_read(tmp_path):
    assert active_ports(tmp_path) == []
    for device, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / device / "ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert active_ports(tmp_path) == ["mlx5_0 400 Gb/sec (4X NDR)"]


def test_there_are_no_facts_on_a_cpu():
    assert gpu_facts(tries_compiler=True) is None


def test_the_compiler_is_tried(tmp_path):
    """For the CPU, for which torch.compile needs a C++ compiler."""
    root = Path(__file__).resolve().parents[2]
    script = (
        "import torch\nfrom megatron_rpp.parallel.gpu_facts import compile_error\n"
        "print(compile_error(torch.device('cpu')))\n"
    )
    env = os.environ | {
        "CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(root),
    }  # fmt: skip
    command = [sys.executable, "-c", script]
    without = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert "no-compiler" in without.stdout, without.stderr[-2000:]
    assert compile_error(torch.device("cpu")) is None


def test_host_memory():
    """Two ranks of 30 GB on one host, one on another."""
    need = HostMemory(reference=10_000_000_000, reward=0, optimizer=0, save=20_000_000_000)
    room = [("a", 61_000_000_000)] * 2 + [("b", 31_000_000_000)]
    check = judge_host_memory(need, room)
    assert check.passed and "30 GB a rank (reference 10 GB, save 20 GB), 2 rank(s)" in check.found
    check = judge_host_memory(need, [("a", 59_000_000_000)] * 2 + room[2:])
    assert not check.passed and "too little on a: add memory" in check.found


def test_offload_without_host_memory_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    make_data(tmp_path)
    plain, offloaded = (
        config_of(tmp_path, tmp_path, reference__placement=placement)
        for placement in ("resident", "offload")
    )
    with layout(plain):
        monkeypatch.setattr(preflight.devices, "ON_CPU", False)
        monkeypatch.setattr(preflight.devices, "free_host_memory", lambda: 1000)
        preflight.check_host_memory(plain, 64)
        with pytest.raises(ConfigError, match=r"host memory: .* too little on .*: add memory"):
            build_policy(offloaded, offloaded.optimizer, 64)
        monkeypatch.setattr(preflight.devices, "ON_CPU", True)
