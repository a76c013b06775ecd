"""Runs Megatron-Core on a machine without CUDA, over gloo.

Megatron-Core names its device "cuda" throughout (`device="cuda"`, `torch.cuda.current_device()`,
`tensor.cuda()`, `param.type() == "torch.cuda.FloatTensor"`). `install()` answers each of these
with the CPU. It changes torch for the whole process, so it is inert where CUDA is present, and
`parallel.device` is the only caller.

Left out: CUDA graphs, memory statistics and the fused kernels, which Megatron-Core does not use
unless they are asked for; expert parallelism (gloo has no all-to-all with uneven splits).
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
    """`function`, which makes a tensor, with a CUDA `device` answered by the CPU."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if "device" in kwargs:
            kwargs["device"] = to_cpu(kwargs["device"])
        return function(*args, **kwargs)

    return call


_LIKE = ("empty", "zeros", "ones", "full", "rand", "randn", "randint")
_NEW = ("empty", "empty_strided", "zeros", "ones", "full", "tensor")


def _replace_factories() -> None:
    """Whatever makes a tensor on the device that it is told.

    Names of torch are replaced, and no torch function mode is used, because a mode adds a call of
    Python to every operation of a run.
    """
    makers = _device_constructors()  # before they are replaced: torch keeps what it found
    for module in (torch, torch.fft, torch.nested):
        for name, function in list(vars(module).items()):
            if callable(function) and function in makers:
                setattr(module, name, _on_cpu(function))
    for name in _LIKE:
        setattr(torch, f"{name}_like", _on_cpu(getattr(torch, f"{name}_like")))
    for name in _NEW:
        setattr(torch.Tensor, f"new_{name}", _on_cpu(getattr(torch.Tensor, f"new_{name}")))
    start = DeviceContext.__init__  # of `with torch.device("cuda"):`
    DeviceContext.__init__ = lambda self, device: start(self, to_cpu(device))


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
    """A CUDA event on a device that never runs behind the host: always done, zero time apart."""

    def __init__(self, *args, **kwargs): ...

    def record(self, stream=None): ...

    def wait(self, stream=None): ...

    def synchronize(self): ...

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


class _Stream:
    """The one stream of such a device."""

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
    """Each name gets a function object of its own: torch 2.13's dynamo refuses shared ones."""
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
    """Imports Megatron-Core with its fused operations as plain Python.

    It hands them to torch.compile when they are defined, which loads torch's compiler: two seconds
    of every process, for operations that are not asked for where they would be compiled for a CPU.
    """

    def as_it_is(function=None, **options):
        return function or (lambda given: given)

    compiler, torch.compile = torch.compile, as_it_is
    try:
        import megatron.core.jit
    finally:
        torch.compile = compiler
    megatron.core.jit.disable_jit_fuser()  # for those of its modules that are imported later


def _replace_megatron_rng() -> None:
    """Megatron's tracker reads the generator of a CUDA device through these two."""
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


_installed = False


def install() -> bool:
    """Makes this process's "cuda" the CPU; call it before the first `megatron.core` import.

    Returns True where it is now in force, False where CUDA is present (nothing is changed).
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
