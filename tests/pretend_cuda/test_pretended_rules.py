"""What the pretended device refuses and where it says that the host waits, operation by operation.

On a machine with CUDA the same tables are run against torch itself: mixes must raise, and
`torch.cuda.set_sync_debug_mode` must find the same waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from megatron_rpp.parallel import device as devices
from tests.pretend_cuda import rules
from tests.pretend_cuda.device import pretended_cuda

Work = Callable[[Tensor, Tensor], object]  # of a tensor on CUDA and its copy on the host

REFUSED: dict[str, Work] = {
    "a sum": lambda cuda, host: cuda + host,
    "a product": lambda cuda, host: cuda @ host,
    "parts that are joined": lambda cuda, host: torch.cat([cuda, host]),
    "scalars that are joined": lambda cuda, host: torch.stack([cuda.sum(), host.sum()]),
    "a vector of the host and a scalar": lambda cuda, host: host * cuda.sum(),
    "a result in host memory": lambda cuda, host: torch.add(cuda, cuda, out=host),
    "a scalar of the host that is changed": lambda cuda, host: host.sum().add_(cuda.sum()),
    "an index on CUDA into the host": lambda cuda, host: host[cuda.argsort(0)],
    "gather by the host": lambda cuda, host: cuda.gather(0, host.argsort(0)),
    "values of the host at an index": lambda cuda, host: cuda.index_put_(
        (torch.arange(3, device="cuda"),), host
    ),
    "a list of operands": lambda cuda, host: torch._foreach_add([cuda], [host]),
    "numpy": lambda cuda, host: cuda.numpy(),
}

NO_WAIT: dict[str, Work] = {
    "a scalar of the host": lambda cuda, host: cuda + host.sum(),
    "a number": lambda cuda, host: torch.where(cuda > 1, cuda, 0.0),
    "a fill by a mask": lambda cuda, host: cuda.masked_fill_(cuda > 1, 0.0),
    "a number at a mask": lambda cuda, host: cuda.__setitem__(cuda > 1, 0.0),
    "a number in a column": lambda cuda, host: cuda.__setitem__((slice(None), 1), 0.0),
    "gather": lambda cuda, host: cuda.gather(0, torch.zeros(3, 3, dtype=torch.long, device="cuda")),
    "an index on CUDA": lambda cuda, host: cuda[torch.arange(2, device="cuda")],
    "a new tensor": lambda cuda, host: torch.zeros(3, device="cuda") + cuda.new_ones(3),
    "a pinned copy": lambda cuda, host: cuda.copy_(host.pin_memory(), non_blocking=True),
    "an upload": lambda cuda, host: devices.upload(host, cuda.device) + cuda,
    "a copy that does not wait": lambda cuda, host: cuda.to("cpu", non_blocking=True),
    "a copy on the device": lambda cuda, host: torch.empty_like(cuda).copy_(cuda),
    "a read of the host": lambda cuda, host: host.tolist(),
}

WAITS: dict[str, tuple[Work, str]] = {
    "item": (lambda cuda, host: cuda.sum().item(), rules.READS),
    "int": (lambda cuda, host: int(cuda.sum()), rules.READS),
    "bool": (lambda cuda, host: bool((cuda > 0).all()), rules.READS),
    "tolist": (lambda cuda, host: cuda.tolist(), rules.READS),
    "equal": (lambda cuda, host: torch.equal(cuda, cuda), rules.READS),
    "nonzero": (lambda cuda, host: cuda.nonzero(), rules.SHAPE),
    "a mask as an index": (lambda cuda, host: cuda[cuda > 1], rules.SHAPE),
    "rows at a mask": (
        lambda cuda, host: cuda.__setitem__(cuda > 1, cuda[cuda > 1]),
        rules.SHAPE,
    ),
    "counts to repeat by": (
        lambda cuda, host: torch.repeat_interleave(cuda[0].long()),
        rules.SHAPE,
    ),
    "cpu": (lambda cuda, host: cuda.cpu(), rules.TO_HOST),
    "to cpu": (lambda cuda, host: cuda.to("cpu"), rules.TO_HOST),
    "copy_ to the host": (lambda cuda, host: host.copy_(cuda), rules.TO_HOST),
    "cuda": (lambda cuda, host: host.cuda(), rules.TO_DEVICE),
    "to cuda": (lambda cuda, host: host.to("cuda"), rules.TO_DEVICE),
    "from pageable memory": (
        lambda cuda, host: host.to("cuda", non_blocking=True),
        rules.TO_DEVICE,
    ),
    "from pinned memory, waiting": (lambda cuda, host: host.pin_memory().cuda(), rules.TO_DEVICE),
    "a list": (lambda cuda, host: torch.tensor([1, 2], device="cuda"), rules.TO_DEVICE),
    "an index of the host": (lambda cuda, host: cuda[torch.arange(2)], rules.TO_DEVICE),
    "one element": (lambda cuda, host: cuda.__setitem__((0, 0), 1.0), rules.TO_DEVICE),
    "synchronize": (lambda cuda, host: torch.cuda.synchronize(), rules.SYNCHRONIZE),
}
# torch does not warn at these; they wait all the same.
UNWARNED = {"from pageable memory", "synchronize"}


def tensors() -> tuple[Tensor, Tensor]:
    host = torch.arange(9.0).view(3, 3)
    return host.to("cuda"), host


@contextmanager
def real_cuda() -> Iterator[None]:
    """Raises RuntimeError where torch would warn that the host waits."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kinds(work: Work) -> set[str]:
    """The kinds of waits of `work` on the pretended device."""
    with pretended_cuda() as watch:
        operands = tensors()
        watch.syncs.clear()
        work(*operands)
    return {sync.kind for sync in watch.syncs}


@pytest.mark.parametrize("name", REFUSED)
def test_mixes_are_refused(name: str) -> None:
    if not devices.ON_CPU:
        with pytest.raises((RuntimeError, TypeError)):
            REFUSED[name](*tensors())
        return
    with pretended_cuda() as watch:
        operands = tensors()
        with pytest.raises(RuntimeError, match=r"test_pretended_rules.py:\d+ in "):
            REFUSED[name](*operands)
    assert len(watch.mixes) == 1


@pytest.mark.parametrize("name", NO_WAIT)
def test_the_host_goes_on(name: str) -> None:
    if devices.ON_CPU:
        assert kinds(NO_WAIT[name]) == set()
        return
    operands = tensors()
    with real_cuda():
        NO_WAIT[name](*operands)


@pytest.mark.parametrize("name", WAITS)
def test_the_host_waits(name: str) -> None:
    work, kind = WAITS[name]
    if devices.ON_CPU:
        assert kinds(work) == {kind}
    elif name not in UNWARNED:
        operands = tensors()
        with real_cuda(), pytest.raises(RuntimeError, match="synchroniz"):
            work(*operands)


pretence = pytest.mark.skipif(not devices.ON_CPU, reason="there is a CUDA device")


@pretence
def test_places_follow_the_tensors() -> None:
    with pretended_cuda():
        cuda, host = tensors()
        assert cuda.device == torch.device("cuda", 0) and cuda.is_cuda and cuda.get_device() == 0
        assert host.device == torch.device("cpu") and not host.is_cuda
        layer = torch.nn.Linear(3, 3).to(devices.device())
        assert (
            layer.weight.device.type == "cuda" and layer.weight.type() == "torch.cuda.FloatTensor"
        )
        layer(cuda).sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.is_cuda
        assert cuda[0].detach().view(3, 1).is_cuda and not cuda.cpu().is_cuda
        assert host.pin_memory().is_pinned() and not host.is_pinned()
        assert torch.equal(cuda.cpu(), host)


@pretence
def test_nothing_is_left_afterwards() -> None:
    names = ("device", "is_cuda", "to", "cuda", "cpu", "tolist", "numpy", "type", "pin_memory")
    before = [getattr(torch.Tensor, name) for name in names], dict(vars(torch)), devices.device()
    with pretended_cuda():
        assert not devices.ON_CPU and devices.device().type == "cuda"
    assert devices.ON_CPU
    after = [getattr(torch.Tensor, name) for name in names], dict(vars(torch)), devices.device()
    assert after == before
