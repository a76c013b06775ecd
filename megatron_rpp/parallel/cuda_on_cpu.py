"""Runs Megatron-Core on a machine without CUDA, over gloo.

Megatron-Core names its device "cuda" throughout (`device="cuda"`, `torch.cuda.current_device()`,
`tensor.cuda()`, `param.type() == "torch.cuda.FloatTensor"`). `install()` answers each of these
with the CPU. It changes torch for the whole process, so it does nothing if CUDA is present, and
only `parallel.device` calls it.

Left out: CUDA graphs, memory statistics and the fused kernels, which Megatron-Core does not use by
default; expert parallelism (gloo has no all-to-all with uneven splits).
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch.utils._device import DeviceContext, _device_constructors

CPU = torch.device("cpu")
# What `tensor.type()` must answer so that Megatron's optimizers accept a CPU parameter.
_CUDA_TYPE_NAMES = {
    f"torch.{kind}Tensor": f"torch.cuda.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")
}


def to_cpu(device):
    """The CPU for any spelling of a CUDA device (object, string or index), else `device` itself."""
    if isinstance(device, torch.device):
        return CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return CPU if device.startswith("cuda") else device
    if isinstance(device, int) and not isinstance(device, bool):
        return CPU
    return device


def _on_cpu(function):
    """Wraps a function that creates a tensor: a CUDA `device` argument becomes the CPU."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if "device" in kwargs:
            kwargs["device"] = to_cpu(kwargs["device"])
        return function(*args, **kwargs)

    return call


_LIKE = ("empty", "zeros", "ones", "full", "rand", "randn", "randint")
_NEW = ("empty", "empty_strided", "zeros", "ones", "full", "tensor")


def _replace_factories() -> None:
    """Wraps every function that creates a tensor on a given device.

    It replaces torch's functions and does not use a torch function mode, because a mode adds a
    Python call to every operation of a run.
    """
    makers = _device_constructors()  # torch caches this set, so ask before replacing anything
    for module in (torch, torch.fft, torch.nested):
        for name, function in list(vars(module).items()):
            if callable(function) and function in makers:
                setattr(module, name, _on_cpu(function))
    for name in _LIKE:
        setattr(torch, f"{name}_like", _on_cpu(getattr(torch, f"{name}_like")))
    for name in _NEW:
        setattr(torch.Tensor, f"new_{name}", _on_cpu(getattr(torch.Tensor, f"new_{name}")))
    original_init = DeviceContext.__init__  # `with torch.device("cuda"):` calls it
    DeviceContext.__init__ = lambda self, device: original_init(self, to_cpu(device))


def _replace_tensor_methods() -> None:
    move, kind = _on_cpu(torch.Tensor.to), torch.Tensor.type

    def to(self, *args, **kwargs):
        return move(self, *map(to_cpu, args[:1]), *args[1:], **kwargs)

    def type_(self, *args, **kwargs):
        result = kind(self, *args, **kwargs)
        return result if args or kwargs else _CUDA_TYPE_NAMES.get(result, result)

    torch.Tensor.to = to
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.type = type_
    torch.Tensor.record_stream = lambda self, chosen: None


class _Event:
    """A CUDA event for a device that runs in step with the host: always done, no time elapsed."""

    def __init__(self, *args, **kwargs): ...

    def record(self, stream=None): ...

    def wait(self, stream=None): ...

    def synchronize(self): ...

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


class _Stream:
    """The only stream of such a device; its operations have finished when they return."""

    cuda_stream = 0

    def __init__(self, *args, **kwargs): ...

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False

    def wait_stream(self, stream): ...

    def wait_event(self, event): ...

    def record_event(self, event=None):
        return _Event()

    def synchronize(self): ...


def _replace_torch_cuda() -> None:
    """Gives each name its own function object, because dynamo of torch 2.13 rejects shared ones."""
    cuda, stream = torch.cuda, _Stream()
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda *args, **kwargs: None
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.random.get_rng_state = cuda.get_rng_state
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = lambda *args, **kwargs: stream
    cuda.default_stream = lambda *args, **kwargs: stream
    cuda.stream = lambda chosen: contextlib.nullcontext()


def _import_megatron_uncompiled() -> None:
    """Imports Megatron-Core with its fused operations left as plain Python.

    Megatron passes them to torch.compile when it defines them. That loads torch's compiler, which
    costs every process two seconds, and a run on the CPU does not use these operations.
    """

    def return_uncompiled(function=None, **options):
        return function or (lambda given: given)

    compiler, torch.compile = torch.compile, return_uncompiled
    try:
        import megatron.core.jit
    finally:
        torch.compile = compiler
    megatron.core.jit.disable_jit_fuser()  # for its modules that are imported later


def _replace_megatron_rng() -> None:
    """Replaces the functions through which Megatron's tracker accesses a CUDA random generator."""
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


_installed = False


def install() -> bool:
    """Makes "cuda" mean the CPU in this process; call it before `megatron.core` is imported.

    Returns True if "cuda" now means the CPU, and False if CUDA is present; then nothing is changed.
    A second call changes nothing.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if not _installed:
        _installed = True
        _replace_torch_cuda()
        _replace_factories()
        _replace_tensor_methods()
        _import_megatron_uncompiled()
        _replace_megatron_rng()
    return True
