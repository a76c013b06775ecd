"""The acceptance checks of tools/gpu_acceptance.py at full size, each as a test, on a CUDA device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from acceptance.catalog import NAMES

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.version.cuda or not torch.cuda.is_available(), reason="no CUDA"),
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
