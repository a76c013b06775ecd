"""What a run checks on a GPU before it builds a model, on a pretended one: the real readers of facts run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rpp import train
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.model import build
from megatron_rpp.parallel import accelerators, gpu_facts
from megatron_rpp.parallel import device as devices
from megatron_rpp.reporting.console import Console
from megatron_rpp.runtime import preflight
from megatron_rpp.runtime.inputs import check_writable, load_inputs
from tests.pretend_cuda.device import pretended_cuda
from tests.runtime.test_preflight_gpu import ABSENT, BROKEN, GOOD, NODE, TOPOLOGY
from tests.small_run import config_of, make_data
from tests.whole_runs import layout

pytestmark = pytest.mark.skipif(not devices.ON_CPU, reason="there is a CUDA device")


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """The settings of a run in bf16 with an offloaded reference, on a pretended GPU of a node with a
    driver, in groups of one rank."""
    make_data(tmp_path)
    config = config_of(tmp_path, tmp_path, model__dtype="bf16", reference__placement="offload")
    for name in ("checkpoint", "logging"):
        check_writable(f"{name}.dir", getattr(config, name).dir)
    monkeypatch.setattr(gpu_facts, "node_facts", lambda: NODE)
    monkeypatch.setattr(gpu_facts, "_nvidia_smi", lambda *words: TOPOLOGY.replace("{}", "NV18"))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    with layout(config), pretended_cuda():
        yield config


def test_the_facts_of_a_gpu_are_read(pretended):
    facts = gpu_facts.gpu_facts(tries_compiler=False)
    expected = replace(
        GOOD, nccl=(2, 27, 3), nvlinks=12, infiniband=gpu_facts.active_ports(Path("/sys/class/infiniband")),
        transformer_engine=facts.transformer_engine, weight_gradients=facts.weight_gradients,
        flash_attention=facts.flash_attention,
    )  # fmt: skip
    assert facts == expected


def test_all_checks_of_a_gpu_run(pretended, monkeypatch, capsys):
    preflight.run(pretended, 64, Console(True))
    printed = " ".join(capsys.readouterr().out.split())
    assert "NVIDIA H100 80GB HBM3" in printed and "a rank of 80 GB free" in printed
    assert "host memory" in printed and "1 rank(s) a host" in printed
    assert "preflight: all " in printed and "FAILED" not in printed
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: False)
    monkeypatch.setattr(devices, "free_host_memory", lambda: 1000)
    with pytest.raises(ConfigError) as refusal:
        preflight.run(pretended, 64, Console(True))
    assert "2 of " in str(refusal.value) and "has no bf16" in str(refusal.value)
    assert "too little on" in str(refusal.value)


@pytest.mark.parametrize(
    ("bf16", "engine", "words"),
    [(False, ABSENT, "H100 80GB HBM3 has no bf16 .*: set model.dtype to fp32"),
     (True, BROKEN, "libcublas.so.13.*: repair it, or set model.transformer_impl to local")],
    ids=["no bf16", "broken TransformerEngine"],
)  # fmt: skip
def test_a_gpu_that_cannot_run_the_model_ends_the_run_before_one_is_built(
    bf16, engine, words, pretended, monkeypatch
):
    inputs = load_inputs(pretended)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: bf16)
    monkeypatch.setattr(accelerators, "TRANSFORMER_ENGINE", engine)
    built = []
    monkeypatch.setattr(build, "build_model", lambda *args, **kwargs: built.append(args))
    with pytest.raises(ConfigError, match=words):
        train.train(pretended, inputs)
    assert not built
