"""The part of preflight about GPUs: judges what parallel/gpu_facts.py has read.

What keeps a run from starting fails. What makes it slower passes, and says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.parallel import accelerators
from megatron_rpp.parallel.gpu_facts import GpuFacts, NodeFacts
from megatron_rpp.runtime.host_memory import HostMemory

LEAST_CUDNN = 90300
"""TransformerEngine needs cuDNN 9.3."""
_LEAST_DRIVERS = {"13": 580, "12": 525}
"""The oldest driver for each CUDA, by NVIDIA's table of minor version compatibility."""


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    found: str
    """What was found and, if that is not enough, what to do."""


def judge_node(node: NodeFacts, on_gpu: bool) -> Check:
    """Fails if there is a GPU that torch cannot use: the run would silently use the CPU."""
    build = "a build for the CPU" if node.cuda is None else f"a build for CUDA {node.cuda}"
    software = f"torch {node.torch} is {build}"
    if on_gpu:
        return Check("driver", True, f"{node.driver or 'version unknown'}; {software}")
    if node.driver is None:
        return Check("driver", True, "no GPU is listed: the run uses the CPU")
    if node.hidden:
        return Check("driver", True, "CUDA_VISIBLE_DEVICES hides the GPUs: the run uses the CPU")
    return Check(
        "driver",
        False,
        f"{node.driver}, but torch sees no GPU: {software}; {_driver_remedy(node)}, or hide the "
        f"GPUs with CUDA_VISIBLE_DEVICES= to use the CPU",
    )


def _driver_remedy(node: NodeFacts) -> str:
    if node.cuda is None:
        return "remove .venv and run bash launch/install.sh --gpu"
    assert node.driver is not None
    least = _LEAST_DRIVERS.get(node.cuda.split(".")[0])
    if least is not None and int(node.driver.split(".")[0]) < least:
        return f"update the driver to {least} or newer"
    return 'python -c "import torch; torch.cuda.init()" says why'


def judge_host_memory(need: HostMemory, free: list[tuple[str, int]]) -> Check:
    """Compares what the ranks of each host keep and copy there with the memory that is free.

    Args:
        need: bytes of one rank.
        free: host and its free bytes, of each rank.
    """
    ranks = Counter(host for host, _ in free)
    short = sorted({host for host, size in free if size < ranks[host] * need.total})
    parts = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in asdict(need).items() if size)
    text = (
        f"{need.total / 1e9:.3g} GB a rank ({parts}), {max(ranks.values())} rank(s) a host, "
        f"{min(size for _, size in free) / 1e9:.3g} GB free"
    )
    if short:
        text += (
            f", too little on {', '.join(short)}: add memory or nodes, or turn off "
            "optimizer.offload, reference.placement or reward.model_placement offload"
        )
    return Check("host memory", not short, text)


def judge_gpu(
    gpu: GpuFacts, *, dtype: str, transformer_impl: accelerators.Setting, several_nodes: bool
) -> list[Check]:
    """The checks of one rank's GPU.

    Args:
        dtype: model.dtype.
        transformer_impl: model.transformer_impl.
        several_nodes: whether the run spans nodes.
    """
    return [
        _precision(gpu, dtype),
        _libraries(gpu, gpu.transformer_engine.usable and transformer_impl != "local"),
        _transformer_engine(gpu, transformer_impl),
        _optional_kernels(gpu),
        _compiler(gpu),
        _links(gpu, several_nodes),
    ]


def _precision(gpu: GpuFacts, dtype: str) -> Check:
    try:
        accelerators.check_dtype(dtype, gpu.name, gpu.has_bf16)
    except ConfigError as error:
        return Check("precision", False, str(error))
    return Check("precision", True, f"{dtype}; bf16 {'yes' if gpu.has_bf16 else 'no'}")


def _libraries(gpu: GpuFacts, uses_transformer_engine: bool) -> Check:
    cudnn = "absent" if gpu.cudnn is None else _cudnn_version(gpu.cudnn)
    nccl = "absent" if gpu.nccl is None else ".".join(map(str, gpu.nccl))
    text = f"cuDNN {cudnn}, NCCL {nccl}"
    if gpu.nccl is None:
        return Check("libraries", False, f"{text}: torch was built without NCCL, reinstall it")
    if uses_transformer_engine and (gpu.cudnn is None or gpu.cudnn < LEAST_CUDNN):
        least = _cudnn_version(LEAST_CUDNN)
        remedy = f"TransformerEngine needs cuDNN {least}: reinstall torch, which brings its own"
        return Check("libraries", False, f"{text}: {remedy}")
    return Check("libraries", True, text)


def _cudnn_version(number: int) -> str:
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _transformer_engine(gpu: GpuFacts, setting: accelerators.Setting) -> Check:
    name, engine = "TransformerEngine", gpu.transformer_engine
    try:
        accelerators.check_transformer_impl(setting, engine, on_gpu=True)
    except ConfigError as error:
        return Check(name, False, str(error))
    if setting == "local":
        return Check(name, True, f"{engine}; not used: model.transformer_impl is local")
    if not engine.usable:
        remedy = "layers and packed attention are slower: bash launch/install.sh --gpu installs it"
        return Check(name, True, f"absent; {remedy}")
    return Check(name, True, str(engine))


def _optional_kernels(gpu: GpuFacts) -> Check:
    """Apex's kernel and flash-attn: a run is slower without them, or not reproducible."""
    text = f"Apex's weight gradients {gpu.weight_gradients}, flash-attn {gpu.flash_attention}"
    remedies = [f"{p.error}: build it anew" for p in _optional(gpu) if p.error is not None]
    if gpu.weight_gradients.version is None:
        remedies.append(
            "without Apex each weight gradient is added in a second pass: requirements-gpu.txt "
            "says how it is built"
        )
    if gpu.flash_attention.version is None:
        remedies.append(
            "flash-attn is needed only for attention that is bit for bit the same in two runs: "
            "pip install --no-build-isolation flash-attn"
        )
    return Check("optional kernels", True, "; ".join([text, *remedies]))


def _optional(gpu: GpuFacts) -> Iterable[accelerators.Package]:
    return gpu.weight_gradients, gpu.flash_attention


def _compiler(gpu: GpuFacts) -> Check:
    if gpu.compile_error is None:
        return Check("torch.compile", True, "compiles")
    return Check(
        "torch.compile",
        False,
        f"{gpu.compile_error}: Megatron's fused operations need a C compiler, install gcc (or name "
        f"one by CC) and Python's headers",
    )


def _links(gpu: GpuFacts, several_nodes: bool) -> Check:
    """What tensor-parallel groups use on a node, and all groups between nodes."""
    if gpu.gpus == 1:
        parts = ["one GPU is visible on the node"]
    elif gpu.nvlinks:
        parts = [f"at least {gpu.nvlinks} NVLinks between two GPUs"]
    elif gpu.nvlinks == 0:
        parts = ["no NVLink between some GPUs, so tensor parallelism is slow: nvidia-smi topo -m"]
    else:
        parts = ["NVLink unknown: nvidia-smi topo -m shows it"]
    if gpu.infiniband:
        parts.append(f"InfiniBand {', '.join(gpu.infiniband)}")
    elif several_nodes:
        parts.append(
            "no active InfiniBand port, so nodes talk over TCP: NCCL_DEBUG=INFO says what NCCL "
            "uses, and a container needs /dev/infiniband"
        )
    return Check("links", True, "; ".join(parts))


def merge(ranks: list[tuple[str, list[Check]]]) -> list[Check]:
    """One check of each name: the first that failed, with its host, else what all ranks found.

    Args:
        ranks: host and checks of each rank.
    """
    names = list(dict.fromkeys(check.name for _, checks in ranks for check in checks))
    return [_merged(name, ranks) for name in names]


def _merged(name: str, ranks: list[tuple[str, list[Check]]]) -> Check:
    found = [(host, c) for host, checks in ranks for c in checks if c.name == name]
    for host, check in found:
        if not check.passed:
            return Check(name, False, f"{host}: {check.found}")
    return Check(name, True, " | ".join(dict.fromkeys(check.found for _, check in found)))
