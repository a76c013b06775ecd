"""The only module that knows whether this process computes on a GPU or on the CPU.

All other code calls `device()` to find out where its tensors belong. Importing this module installs
`cuda_on_cpu` if CUDA is missing, so every module that imports `megatron.core` imports it first.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import resource
import warnings
from functools import cache
from typing import Literal

import psutil
import torch

from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.parallel import accelerators, cuda_on_cpu, determinism

# Every rank of Megatron-Core warns about each missing accelerator (`describe()` lists them in one
# line), and Megatron-Core calls collectives by names that torch has deprecated.
warnings.filterwarnings("ignore", module="megatron")
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
logging.getLogger("megatron.core").setLevel(logging.ERROR)

ON_CPU = cuda_on_cpu.install()
ALLOCATOR = "expandable_segments:True"
"""Settings of PyTorch's allocator, unless the user has own ones."""


def device() -> torch.device:
    """The device that holds this rank's tensors."""
    return cuda_on_cpu.CPU if ON_CPU else torch.device("cuda", torch.cuda.current_device())


def backend() -> str:
    """The torch.distributed backend for `device()`."""
    return "gloo" if ON_CPU else "nccl"


def set_up(local_rank: int, local_world_size: int, deterministic: bool = False) -> None:
    """Binds this rank to its GPU, or to its fair share of the host's cores.

    Call it before anything else uses the GPU.

    deterministic: train.deterministic.
    """
    determinism.set_up(deterministic)
    if ON_CPU:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // local_world_size))
        return
    count = torch.cuda.device_count()
    if local_world_size > count:
        raise ConfigError(
            f"{local_world_size} processes on a host with {count} GPUs: start at most {count} "
            f"per node (--nproc-per-node)"
        )
    if deterministic:
        determinism.set_variables(os.environ)
    _tune_cuda(local_world_size)
    torch.cuda.set_device(local_rank)


def _tune_cuda(local_world_size: int) -> None:
    """Sets what PyTorch reads when CUDA starts and when it compiles; the user's own values win."""
    # Rows vary in length. Without this, the allocator keeps blocks of every size that occurred.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        torch.cuda.memory._set_allocator_settings(ALLOCATOR)
    # With such segments, NCCL must not register the buffers of collectives in CUDA graphs.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    # Every rank would start a compiler process per core.
    cores = len(os.sched_getaffinity(0))
    threads = max(1, min(8, cores // local_world_size))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
    # cuDNN plans attention anew for every length, and never forgets a plan. Rows vary in length.
    torch.backends.cuda.enable_cudnn_sdp(False)


def scans_cache() -> bool:
    """Whether attention reads the blocks of the cache in their order, so that gaps take time. A GPU's
    kernel finds them by a table."""
    return ON_CPU


def fuses_rms_norm() -> bool:
    """Whether PyTorch's RMSNorm is one kernel."""
    return not ON_CPU


def tokens_per_sync() -> int:
    """How many tokens of each sequence are generated before the host reads them. A GPU waits while
    the host reads; on a CPU the host does the work itself."""
    return 1 if ON_CPU else 16


def padded_batch(sequences: int) -> int:
    """The rows of a batch of generation. A GPU sees few sizes: 16, 32, 64, 128, 192, 256, ..."""
    if ON_CPU:
        return sequences
    if sequences > 128:
        return -(-sequences // 64) * 64
    return max(16, 1 << (sequences - 1).bit_length())


@cache
def has_varlen_attention() -> bool:
    """Whether PyTorch has an attention kernel for packed rows of 16-bit numbers."""
    if ON_CPU or importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"window_size", "enable_gqa", "scale"} <= inspect.signature(
        varlen_attn
    ).parameters.keys()


def has_cuda_graphs() -> bool:
    """Whether kernels can be recorded in CUDA graphs."""
    return not ON_CPU


@cache
def has_paged_attention() -> bool:
    """Whether PyTorch has an attention kernel for a cache of 16-bit numbers in blocks."""
    if not has_varlen_attention():
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"seqused_k", "block_table", "num_splits"} <= inspect.signature(
        varlen_attn
    ).parameters.keys()


def upload(values: torch.Tensor, target: torch.device) -> torch.Tensor:
    """Copies a tensor of the host to `target`. The host does not wait for the GPU.

    A copy from pageable memory would wait until the GPU has done all its queued work.
    """
    if target.type == "cpu":
        return values
    return values.pin_memory().to(target, non_blocking=True)


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, pinned for copies from and to a GPU that do not make the host wait."""
    copy = tensor.detach().to("cpu", copy=True)
    return copy if ON_CPU else copy.pin_memory()


def synchronize() -> None:
    """Waits until the GPU has done all its queued work."""
    if not ON_CPU:
        torch.cuda.synchronize()


def peak_memory_gb() -> float:
    """This rank's peak memory so far in GB (1e9 bytes): GPU memory, or the resident set on a CPU."""
    if ON_CPU:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return torch.cuda.max_memory_allocated() / 1e9


# Dense bf16 peak in TFLOP/s by words of the device name that CUDA reports, from NVIDIA's data sheets
# (their figures "with sparsity" are twice these). The first match counts.
_PEAKS = {
    "B300": 2250.0,
    "GB300": 2500.0,
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.4,
    "GH200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
}


def peak_flops_of(name: str) -> float | None:
    """Dense bf16 FLOP/s of the GPU of this name; None if it is not in the table."""
    words = name.replace("-", " ").split()
    for known, peak in _PEAKS.items():
        if all(word in words for word in known.split()):
            return peak * 1e12
    return None


def peak_flops() -> float | None:
    """Dense bf16 FLOP/s of this rank's GPU; None on a CPU or a GPU that is not in the table."""
    return None if ON_CPU else peak_flops_of(torch.cuda.get_device_name())


def free_memory() -> int:
    """Free bytes: of this rank's GPU, or of the host's memory, which its ranks share."""
    if ON_CPU:
        return free_host_memory()
    return torch.cuda.mem_get_info()[0]


def total_memory_of_rank() -> int:
    """All bytes that this rank can have: its GPU's, or its share of the host's memory."""
    if ON_CPU:
        return psutil.virtual_memory().total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return total_memory()


def total_memory() -> int:
    """All bytes of this rank's GPU."""
    return torch.cuda.mem_get_info()[1]


def free_host_memory() -> int:
    """Free bytes of the host's memory, which its ranks share."""
    return psutil.virtual_memory().available


def has_transformer_engine() -> bool:
    """Whether TransformerEngine can be used, and with it Megatron's fused modules."""
    return not ON_CPU and accelerators.TRANSFORMER_ENGINE.usable


def transformer_impl(setting: accelerators.Setting) -> Literal["transformer_engine", "local"]:
    """Megatron's name of the modules that model.transformer_impl stands for on this device."""
    if setting != "auto":
        return setting
    return "transformer_engine" if has_transformer_engine() else "local"


def has_apex() -> bool:
    """Whether Apex's kernel for weight gradients can be used."""
    return not ON_CPU and accelerators.weight_gradient_kernel().usable


def has_bf16() -> bool:
    """Whether the device computes in bf16 by itself; a CPU does."""
    return ON_CPU or torch.cuda.is_bf16_supported(including_emulation=False)


def check_model(
    dtype: str, transformer_impl: accelerators.Setting, deterministic: bool = False
) -> None:
    """Raises ConfigError if models of these settings cannot be built on this device.

    Args:
        dtype: model.dtype.
        transformer_impl: model.transformer_impl.
        deterministic: train.deterministic.
    """
    engine = accelerators.TRANSFORMER_ENGINE
    accelerators.check_transformer_impl(transformer_impl, engine, on_gpu=not ON_CPU)
    if not ON_CPU:
        accelerators.check_dtype(dtype, torch.cuda.get_device_name(), has_bf16())
    if deterministic:
        fused = has_transformer_engine() and transformer_impl != "local"
        flash_attention = accelerators.find("flash_attn")
        determinism.check_attention(dtype, fused=fused, flash_attention=flash_attention)


def describe() -> str:
    """One line for the start-up log: device, threads, versions, optional accelerators."""
    import megatron.core

    threads = f"CPU, {torch.get_num_threads()} thread(s) a rank"
    name = threads if ON_CPU else torch.cuda.get_device_name()
    packages = {
        "TransformerEngine": accelerators.TRANSFORMER_ENGINE,
        "Apex": accelerators.weight_gradient_kernel(),
    }
    mode = "; deterministic" if torch.are_deterministic_algorithms_enabled() else ""
    found = ", ".join(f"{n} {'absent' if ON_CPU else package}" for n, package in packages.items())
    return (
        f"{name}; {backend()}; torch {torch.__version__}; "
        f"megatron-core {megatron.core.__version__}; {found}{mode}"
    )
