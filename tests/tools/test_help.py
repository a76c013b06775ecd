"""`--help` of the tools answers at once: it imports neither torch nor Megatron."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
HELP = """
import runpy, sys
for name in ("torch", "megatron", "transformers", "matplotlib"):
    sys.modules[name] = None  # importing it fails
sys.argv = [sys.argv[1], "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "name",
    [
        "convert_hf_to_megatron", "convert_megatron_to_hf", "verify_conversion", "generate",
        "evaluate", "make_task", "gguf_to_hf", "plot", "plan", "reproduce",
    ],
)  # fmt: skip
def test_help_imports_nothing_heavy(name):
    command = [sys.executable, "-c", HELP, str(TOOLS / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith(f"usage: {name}.py ") and "-h, --help" in done.stdout
