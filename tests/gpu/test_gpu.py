"""The acceptance checks of tools/gpu_acceptance.py at full size, each as a test, on a CUDA device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from acceptance.catalog import NAMES

from megatron_rpp.parallel import device as devices

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(devices.ON_CPU, reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", NAMES)
def test_the_check_passes(name, tmp_path):
    output = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "tools/gpu_acceptance.py"), "--output", str(output)]
    done = subprocess.run([*command, "--only", name], capture_output=True, text=True, cwd=ROOT)
    (check,) = json.loads(output.read_text())["checks"]
    if check["status"] == "skipped":
        pytest.skip(done.stdout)
    assert done.returncode == 0 and check["status"] == "passed", done.stdout + done.stderr
