"""Adam on the host (optimizer.offload) updates as on the device, and resumes exactly.

Two data-parallel ranks on a pretended CUDA device: without one, Megatron's hybrid optimizer does not
run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_rpp.parallel import device as devices
from tests.distributed import run_ranks
from tests.pretend_cuda.device import pretended_cuda
from tests.small_run import config_of, make_data
from tests.whole_runs import rows, same_bits, train_run, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not devices.ON_CPU, reason="there is a CUDA device"),
]

DEVICE = {"model__dtype": "bf16", "train__steps": 2, "train__epochs": 1}
HOST = DEVICE | {"optimizer__offload": "true"}


def train_all(rank: int, base: Path) -> None:
    with pretended_cuda():
        train_run(base, base / "device", **DEVICE)
        train_run(base, base / "host", **HOST)
        train_run(base, base / "resumed", **(HOST | {"train__steps": 1}))
        train_run(base, base / "resumed", **HOST)
        # A run may change its mind: the checkpoint is the same.
        train_run(base, base / "changed", **(HOST | {"train__steps": 1}))
        train_run(base, base / "changed", **DEVICE)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("offload")
    make_data(base)
    run_ranks(train_all, 2, base, base, timeout=400)
    return base


def test_a_resume_is_exact(base: Path):
    same_bits(base / "resumed", base / "host", config_of(base, base / "host", **HOST), 2, first=2)


@pytest.mark.parametrize("name", ["host", "changed"])
def test_the_updates_are_those_of_the_device(base: Path, name: str):
    """Two implementations of Adam round differently: at most one step of bf16 apart."""
    config = config_of(base, base / "device", **DEVICE)
    expected = weights(config, base / "device/checkpoints")
    start = rows(base / "device/logs/metrics.jsonl")[0]
    assert rows(base / f"{name}/logs/metrics.jsonl")[0]["policy/loss"] == start["policy/loss"]
    for key, found in weights(config, base / f"{name}/checkpoints").items():
        torch.testing.assert_close(found, expected[key], rtol=2**-7, atol=1e-6)
