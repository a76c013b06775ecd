"""TransformerEngine that is broken in several ways, as a real import in a process of its own, and
the refusals of what a device cannot run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.parallel import accelerators
from megatron_rpp.parallel.accelerators import Package, check_dtype, check_transformer_impl

ROOT = Path(__file__).resolve().parents[2]
HERE, ABSENT, BROKEN = Package("2.20.2"), Package(), Package("2.20.2", "OSError: libcublas.so.13")
SCRIPT = """
from megatron_rpp.parallel import accelerators, device
from megatron.core.extensions.transformer_engine import HAVE_TE
print(HAVE_TE, accelerators.TRANSFORMER_ENGINE)
print(accelerators.TRANSFORMER_ENGINE.error)
"""


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("raise OSError('libcublas.so.13: cannot open shared object file')",
         "OSError: libcublas.so.13: cannot open shared object file"),
        ("import transformer_engine_torch_",
         "ModuleNotFoundError: No module named 'transformer_engine_torch_'"),
        ("raise RuntimeError('undefined\\n  symbol')", "RuntimeError: undefined symbol"),
    ],
    ids=["a library is missing", "the extension is missing", "another torch"],
)  # fmt: skip
def test_a_broken_transformer_engine_is_kept_from_megatron_and_reported(line, error, tmp_path):
    package = tmp_path / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "pytorch/__init__.py").write_text(line + "\n")
    record = tmp_path / "transformer_engine-2.20.2.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformer_engine\nVersion: 2.20.2\n"
    )
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-2:] == ["False 2.20.2, broken", error]


@pytest.mark.parametrize("setting", ["auto", "transformer_engine"])
def test_a_broken_transformer_engine_is_refused_with_its_error_and_the_switch(setting):
    with pytest.raises(ConfigError) as refusal:
        check_transformer_impl(setting, BROKEN, on_gpu=True)
    assert str(refusal.value) == (
        "TransformerEngine 2.20.2 is installed but does not import (OSError: libcublas.so.13): "
        "repair it, or set model.transformer_impl to local to go without"
    )


@pytest.mark.parametrize(
    ("setting", "engine", "on_gpu"),
    [("local", BROKEN, True), ("local", HERE, True), ("auto", ABSENT, True), ("auto", HERE, True),
     ("auto", BROKEN, False), ("auto", ABSENT, False), ("transformer_engine", HERE, True)],
)  # fmt: skip
def test_what_can_be_used_passes(setting, engine, on_gpu):
    check_transformer_impl(setting, engine, on_gpu)


@pytest.mark.parametrize(
    ("engine", "on_gpu", "words"),
    [(ABSENT, True, "not installed: bash launch/install.sh --gpu"), (HERE, False, "no GPU")],
)
def test_a_transformer_engine_that_is_asked_for_must_be_there(engine, on_gpu, words):
    with pytest.raises(ConfigError, match=words):
        check_transformer_impl("transformer_engine", engine, on_gpu)


def test_a_gpu_without_bf16_is_refused_under_bf16_alone():
    with pytest.raises(ConfigError, match="model.dtype is bf16, but Tesla V100 has no bf16"):
        check_dtype("bf16", "Tesla V100", has_bf16=False)
    check_dtype("fp32", "Tesla V100", has_bf16=False)
    check_dtype("bf16", "NVIDIA H100", has_bf16=True)


def test_packages_are_found():
    assert accelerators.find("packaging").usable
    assert accelerators.find("no_such_package_here") == ABSENT
