"""train.deterministic: what it sets, for whom, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.model.build import transformer_config
from megatron_rpp.parallel import determinism, groups
from megatron_rpp.parallel.accelerators import Package
from megatron_rpp.parallel.device import describe
from tests.small_run import config_of


@pytest.fixture
def environment() -> dict[str, str]:
    return {"NCCL_DEBUG": "WARN"}


def test_the_variables_that_the_libraries_read(environment):
    determinism.set_variables(environment)
    assert environment == {
        "NCCL_DEBUG": "WARN",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "Ring",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }


def test_the_users_own_value_stays_if_it_is_deterministic(environment):
    environment["NCCL_ALGO"] = "Tree"
    determinism.set_variables(environment)
    assert environment["NCCL_ALGO"] == "Tree"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"),
        ("NCCL_ALGO", "NVLS"),
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0"),
    ],
)
def test_a_value_that_is_not_deterministic_is_refused(name, value, environment):
    environment[name] = value
    with pytest.raises(ConfigError, match=f"the environment has {name}={value}: unset it"):
        determinism.set_variables(environment)


@pytest.mark.parametrize("found", [Package(), Package("2.8", "undefined symbol")])
def test_fused_attention_in_bf16_needs_flash_attn(found):
    with pytest.raises(ConfigError, match="needs flash-attn, which is (absent|2.8, broken)"):
        determinism.check_attention("bf16", fused=True, flash_attention=found)
    for dtype, fused, flash_attention in (
        ("fp32", True, found),
        ("bf16", False, found),
        ("bf16", True, Package("2.8")),
    ):
        determinism.check_attention(dtype, fused=fused, flash_attention=flash_attention)


@pytest.mark.parametrize("deterministic", [True, False])
def test_pytorch_and_megatron_are_told(deterministic, tmp_path):
    config = config_of(tmp_path, tmp_path, train__deterministic=str(deterministic).lower())
    groups.start(1, 1, seed=1, deterministic=config.train.deterministic)
    try:
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert (
            transformer_config(config.model, config.parallel, config.train).deterministic_mode
            == deterministic
        )
        assert ("; deterministic" in describe()) == deterministic
    finally:
        groups.stop()
        determinism.set_up(False)
