"""What preflight wants to know of a GPU and its node: read here, judged in runtime/preflight_gpu.py.

Left out: the health of GPUs and links (NVIDIA's dcgmi tests them).
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_rpp.lifecycle.config_error import reason
from megatron_rpp.parallel import accelerators
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel.accelerators import Package

_SECONDS = 30
"""How long nvidia-smi may take; on a node whose driver hangs it never ends."""


@dataclass(frozen=True)
class NodeFacts:
    """What a node has, whether or not torch can use it."""

    driver: str | None
    """Version of NVIDIA's driver; None if no GPU is listed."""
    hidden: bool
    """Whether CUDA_VISIBLE_DEVICES hides all GPUs."""
    torch: str
    cuda: str | None
    """The version of CUDA that torch is built with; None for its CPU build."""


@dataclass(frozen=True)
class GpuFacts:
    """What a rank's GPU, its libraries and the links of its node are."""

    name: str
    has_bf16: bool
    cudnn: int | None
    """As cuDNN counts: 92000 is 9.20.0; None if torch finds none."""
    nccl: tuple[int, ...] | None
    """None if torch was built without it."""
    transformer_engine: Package
    weight_gradients: Package
    flash_attention: Package
    compile_error: str | None
    """What torch.compile raised for a small function."""
    gpus: int
    """Number of GPUs of the node that this process sees."""
    nvlinks: int | None
    """The least number of NVLinks between two GPUs of the node; None if it cannot be told."""
    infiniband: list[str]
    """The active ports: device and rate."""


def node_facts() -> NodeFacts:
    lines = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").split()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return NodeFacts(
        driver=lines[0] if lines and re.fullmatch(r"[\d.]+", lines[0]) else None,
        hidden=visible is not None and visible.strip() in ("", "-1"),
        torch=torch.__version__,
        cuda=torch.version.cuda,
    )


def gpu_facts(tries_compiler: bool) -> GpuFacts | None:
    """The facts of this rank's GPU; None on a CPU.

    Args:
        tries_compiler: whether to compile a function; one rank of a node is enough.
    """
    if devices.ON_CPU:
        return None
    return GpuFacts(
        name=torch.cuda.get_device_name(),
        has_bf16=devices.has_bf16(),
        cudnn=torch.backends.cudnn.version(),
        nccl=torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None,
        transformer_engine=accelerators.TRANSFORMER_ENGINE,
        weight_gradients=accelerators.weight_gradient_kernel(),
        flash_attention=accelerators.find("flash_attn"),
        compile_error=compile_error(devices.device()) if tries_compiler else None,
        gpus=torch.cuda.device_count(),
        nvlinks=least_nvlinks(_nvidia_smi("topo", "-m")),
        infiniband=active_ports(Path("/sys/class/infiniband")),
    )


def _nvidia_smi(*words: str) -> str:
    """What nvidia-smi prints; "" if it is not there, fails, or does not end."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *words], capture_output=True, text=True, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def least_nvlinks(topology: str) -> int | None:
    """The least number of NVLinks between two GPUs in the table of `nvidia-smi topo -m`.

    0 if two GPUs have none; None if there are not two GPUs.
    """
    text = re.sub(r"\x1b\[[\d;]*m", "", topology)
    rows = [line.split() for line in text.splitlines()]
    gpus = [row for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row]
    cells = [cell for row in gpus for cell in row[1 : 1 + len(gpus)] if cell != "X"]
    counts = [int(cell[2:]) if re.fullmatch(r"NV\d+", cell) else 0 for cell in cells]
    return min(counts, default=None)


def active_ports(folder: Path) -> list[str]:
    """Device and rate of the active InfiniBand ports in /sys/class/infiniband, or `folder`."""
    found = []
    for state in sorted(folder.glob("*/ports/*/state")):
        if "ACTIVE" in state.read_text():
            rate = (state.parent / "rate").read_text().strip()
            found.append(f"{state.parts[-4]} {rate}")
    return found


def compile_error(device: torch.device) -> str | None:
    """What torch.compile raises for a small function on `device`; None if it works."""
    try:
        torch.compile(_probe)(torch.ones(16, device=device))
    except Exception as error:  # the compiler raises errors of many types
        return reason(error)
    return None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)
