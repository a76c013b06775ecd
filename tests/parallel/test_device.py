"""What is set on GPUs before CUDA starts, and which of PyTorch's kernels are found. No GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_rpp.parallel import accelerators, determinism
from megatron_rpp.parallel import device as devices

ROOT = Path(__file__).resolve().parents[2]
SET_HERE = (
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "NCCL_GRAPH_REGISTER",
    "TORCHINDUCTOR_COMPILE_THREADS", *determinism.VARIABLES,
)  # fmt: skip


@pytest.fixture
def allocator(monkeypatch) -> Iterator[list[str]]:
    """A host with 8 GPUs and 64 cores whose user has set nothing; what the allocator is told."""
    told: list[str] = []
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in SET_HERE})
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64))
    monkeypatch.setattr(devices, "ON_CPU", False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", told.append)
    monkeypatch.setattr(devices.determinism, "set_up", lambda deterministic: None)
    yield told
    torch.backends.cuda.enable_cudnn_sdp(True)


def variables() -> dict[str, str]:
    return {name: os.environ[name] for name in SET_HERE if name in os.environ}


def test_what_is_set_on_gpus(allocator):
    assert torch.backends.cuda.cudnn_sdp_enabled()
    devices.set_up(0, 8)
    assert allocator == ["expandable_segments:True"]
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert variables() == {"NCCL_GRAPH_REGISTER": "0", "TORCHINDUCTOR_COMPILE_THREADS": "8"}


def test_the_compiler_processes_of_all_ranks_fit_the_cores(allocator, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(12))
    devices.set_up(0, 4)
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "3"
    del os.environ["TORCHINDUCTOR_COMPILE_THREADS"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(2))
    devices.set_up(0, 4)
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "1"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_users_own_values_win(allocator, name):
    own = {name: "max_split_size_mb:64", "NCCL_GRAPH_REGISTER": "1"}
    own["TORCHINDUCTOR_COMPILE_THREADS"] = "5"
    os.environ.update(own)
    devices.set_up(0, 8)
    assert allocator == [] and variables() == own


def test_a_deterministic_run_sets_its_variables(allocator):
    devices.set_up(0, 8, deterministic=True)
    assert determinism.VARIABLES.keys() <= variables().keys()


def test_pytorchs_compiler_reads_the_variable_after_the_start():
    """It reads the environment once, when it is imported, which must not be before `set_up`."""
    script = "import sys, megatron_rpp.train; print('torch._inductor.config' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.stdout.split()[-1:] == ["False"], done.stderr[-2000:]


@pytest.mark.parametrize("on_cpu", [True, False], ids=["CPU", "GPU"])
@pytest.mark.parametrize("has", [devices.has_varlen_attention, devices.has_paged_attention])
def test_this_pytorchs_kernels_take_what_attention_gives_them(has, on_cpu, monkeypatch):
    """By the signature of the real function. model/ calls a stand-in in its tests (varlen_kernel.py)."""
    monkeypatch.setattr(devices, "ON_CPU", on_cpu)
    for cached in (devices.has_varlen_attention, devices.has_paged_attention):
        monkeypatch.setattr(devices, cached.__name__, cached.__wrapped__)
    assert has.__wrapped__() == (not on_cpu)


@pytest.mark.parametrize(
    ("modules", "usable"),
    [([], False), (["amp_C"], False), (["fused_weight_gradient_mlp_cuda"], True)],
    ids=["the registry's apex", "Apex without the kernel", "Apex"],
)
def test_apex_is_told_by_the_kernel_that_megatron_uses(modules, usable, tmp_path, monkeypatch):
    for module in ["apex", *modules]:
        (tmp_path / f"{module}.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(devices, "ON_CPU", False)
    accelerators.find.cache_clear()
    assert devices.has_apex() == usable
    accelerators.find.cache_clear()
    for module in ["apex", *modules]:
        sys.modules.pop(module, None)
    monkeypatch.setattr(devices, "ON_CPU", True)
    assert not devices.has_apex()
