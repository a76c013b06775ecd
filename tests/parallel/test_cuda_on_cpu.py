"""If CUDA is missing, every spelling of a CUDA device means the CPU; if not, nothing changes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_rpp.parallel import cuda_on_cpu
from megatron_rpp.parallel import device as devices

pytestmark = pytest.mark.skipif(not devices.ON_CPU, reason="does nothing if CUDA is present")

DEVICES = ["cuda", "cuda:0", "cuda:7", 0, 3, torch.device("cuda"), torch.device("cuda", 1)]
ROW = torch.arange(4.0)
SPELLINGS = {
    "zeros": lambda device: torch.zeros(4, device=device),
    "tensor": lambda device: torch.tensor([1.0], device=device),
    "as_tensor": lambda device: torch.as_tensor([1.0], device=device),
    "arange": lambda device: torch.arange(4, device=device),
    "empty_like": lambda device: torch.empty_like(ROW, device=device),
    "new_zeros": lambda device: ROW.new_zeros(4, device=device),
    "to": lambda device: ROW.to(device),
    "to, keyword": lambda device: ROW.to(device=device),
    "to, with a dtype": lambda device: ROW.to(device, torch.float64),
    "to, a copy": lambda device: ROW.to(device, copy=True),
    "cuda": lambda device: ROW.cuda(device),
    # torch itself resolves a bare index in Module.to to the accelerator that it was built for.
    "module.to": lambda device: (
        torch.nn.Linear(2, 2).to(torch.device("cuda", device)).weight
        if isinstance(device, int)
        else torch.nn.Linear(2, 2).to(device).weight
    ),
    "module.cuda": lambda device: torch.nn.Linear(2, 2).cuda().weight,
    "module": lambda device: torch.nn.Linear(2, 2, device=device).weight,
}


@pytest.mark.parametrize("device", DEVICES, ids=repr)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_cpu(spelling, device):
    assert SPELLINGS[spelling](device).device.type == "cpu"


def test_values_arrive_and_dtypes_are_obeyed():
    assert torch.equal(ROW.cuda(), ROW)
    assert ROW.to("cuda", torch.float64).dtype == torch.float64
    copy = ROW.to("cuda", copy=True)
    assert torch.equal(copy, ROW) and copy.data_ptr() != ROW.data_ptr()


def test_other_devices_are_left_alone():
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert ROW.to("meta").device.type == "meta"
    assert cuda_on_cpu.to_cpu(None) is None
    assert cuda_on_cpu.to_cpu("cpu") == "cpu"
    assert ROW.to(torch.float64).dtype == torch.float64


def test_the_current_device_and_a_device_context():
    assert torch.cuda.current_device() == torch.device("cpu")
    assert devices.device() == torch.device("cpu") and devices.backend() == "gloo"
    torch.cuda.set_device(0)
    assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"
    with torch.device("cuda"):
        assert torch.zeros(1).device.type == "cpu"


def test_type_answers_what_megatron_asks_for():
    assert ROW.type() == "torch.cuda.FloatTensor"
    assert ROW.half().type() == "torch.cuda.HalfTensor"
    assert ROW.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert ROW.long().type() == "torch.LongTensor"
    assert ROW.type(torch.float64).dtype == torch.float64


class AsksForCuda(torch.autograd.Function):
    """y = 3x; records which device "cuda" means in forward and in backward."""

    seen: dict[str, set[str]] = {}

    @classmethod
    def note(cls, name):
        made = torch.ones(1, device="cuda"), torch.ones(1).cuda(), torch.ones(1).to("cuda:0")
        cls.seen[name] = {x.device.type for x in made}
        return made[0]

    @staticmethod
    def forward(ctx, x):
        return 3 * x * AsksForCuda.note("forward")

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad * AsksForCuda.note("backward")


def run_engine(loss, _):
    """Calls the engine as Megatron does for pipelined outputs (schedules.custom_backward)."""
    torch.autograd.Variable._execution_engine.run_backward(
        tensors=(loss,),
        grad_tensors=(torch.ones_like(loss),),
        keep_graph=False,
        create_graph=False,
        inputs=(),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def grad(loss, x):
    x.grad = torch.autograd.grad(loss, x)[0]


BACKWARDS = {
    "tensor.backward": lambda loss, x: loss.backward(),
    "autograd.backward": lambda loss, x: torch.autograd.backward(loss),
    "autograd.grad": grad,
    "the engine": run_engine,
}


@pytest.mark.parametrize("backward", BACKWARDS)
def test_inside_a_custom_autograd_function(backward):
    AsksForCuda.seen = {}
    x = torch.ones(2, requires_grad=True)
    BACKWARDS[backward](AsksForCuda.apply(x).sum(), x)
    assert AsksForCuda.seen == {"forward": {"cpu"}, "backward": {"cpu"}}
    assert x.grad.tolist() == [3.0, 3.0]


def test_streams_and_events():
    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        total = ROW.cuda(non_blocking=True).sum()
    with stream:
        total += 1
    event.record(stream)
    stream.wait_event(event)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.default_stream().record_event().synchronize()
    ROW.record_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    stream.synchronize()
    assert event.query() and event.elapsed_time(torch.cuda.Event()) == 0.0
    assert total == 7.0


def test_random_state_is_the_hosts():
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), first)
    assert torch.equal(torch.rand(3, generator=torch.Generator().manual_seed(5)), first)


def test_a_second_install_changes_nothing():
    names = dict(vars(torch.cuda))
    made = torch.zeros
    assert cuda_on_cpu.install() is True
    assert dict(vars(torch.cuda)) == names
    assert torch.zeros is made


INERT = """
import torch
torch.cuda.is_available = lambda: True
before, record_stream = dict(vars(torch.cuda)), torch.Tensor.record_stream
from megatron_rpp.parallel import cuda_on_cpu, device
assert cuda_on_cpu.install() is False and device.ON_CPU is False
changed = [name for name, value in before.items() if vars(torch.cuda)[name] is not value]
assert not changed, changed
assert torch.Tensor.record_stream is record_stream
assert torch.overrides._get_current_function_mode_stack() == []
assert torch.ones(1).type() == "torch.FloatTensor" and device.backend() == "nccl"
from megatron.core.jit import jit_fuser
assert jit_fuser is torch.compile
print("inert")
"""


def test_inert_where_cuda_is_present():
    done = subprocess.run([sys.executable, "-c", INERT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "inert"


UNCOMPILED = """
import sys, torch
compiler = torch.compile
import megatron_rpp.train
assert "torch._dynamo" not in sys.modules and torch.compile is compiler
from megatron.core.fusions.fused_bias_geglu import quick_gelu
print(float(quick_gelu(torch.zeros(1))))
"""


def test_the_compiler_is_not_loaded_and_left_to_others():
    done = subprocess.run([sys.executable, "-c", UNCOMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0.0"
