"""The requirements for GPUs resolve together on Python 3.12, and never to the Megatron of Python 3.11.

pip resolves them against the registry and installs nothing. TransformerEngine's extension comes as
source. pip would set up a compilation, with another torch, to learn what it requires, so the test
reads that from the source itself.
"""

from __future__ import annotations

import email
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = "https://pypi.org/simple/transformer-engine-torch/"
PIP = "pip==26.3"
"""Reads what a wheel requires without downloading it (fast-deps)."""


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and line[0] not in "#-"]


def python_3_12() -> str | None:
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which("python3.12"), *map(str, sorted(pyenv.glob("3.12*/bin/python")))]
    for python in filter(None, found):
        if subprocess.run([python, "--version"], capture_output=True).returncode == 0:
            return python
    return None


def required_by_the_extension(version: str) -> list[str]:
    """What the source of TransformerEngine's extension requires. Raises URLError."""
    headers = {"Accept": "application/vnd.pypi.simple.v1+json"}
    request = urllib.request.Request(EXTENSION, headers=headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        files = {file["filename"]: file["url"] for file in json.load(answer)["files"]}
    name = f"transformer_engine_torch-{version}"
    with urllib.request.urlopen(files[f"{name}.tar.gz"], timeout=60) as answer:
        source = io.BytesIO(answer.read())
    with tarfile.open(fileobj=source) as archive:
        record = archive.extractfile(f"{name}/PKG-INFO")
        assert record is not None
        return email.message_from_bytes(record.read()).get_all("Requires-Dist", [])


def test_the_image_has_what_it_copies_and_installs():
    """No container engine builds it here."""
    text = (ROOT / "launch/Dockerfile").read_text()
    copied = re.findall(r"^COPY (\S+) \S+$", text, re.MULTILINE)
    assert copied and all((ROOT / name).exists() for name in copied)
    (extras,) = re.findall(r'--editable "\.\[(.+)\]"', text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    (megatron,) = re.findall(r'"(megatron-core[^"]+)"', text)
    (pinned,) = (str(r) for r in requirements("requirements-gpu.txt") if r.name == "megatron-core")
    assert Requirement(megatron) == Requirement(pinned)


@pytest.mark.parametrize(("version", "fits"), [("3.11", False), ("3.12", True)])
def test_python_decides_which_megatron_is_installed(version, fits):
    megatron = {
        name: [
            requirement.specifier
            for requirement in requirements(name)
            if requirement.name == "megatron-core"
            and (
                requirement.marker is None
                or requirement.marker.evaluate({"python_version": version})
            )
        ]
        for name in ("requirements.txt", "requirements-gpu.txt")
    }
    (pinned,), (for_gpus,) = megatron.values()
    (pin,) = pinned
    assert for_gpus.contains(pin.version) == fits


def test_the_requirements_for_gpus_resolve(tmp_path):
    python = python_3_12()
    if python is None:
        pytest.skip("there is no Python 3.12")
    engine = next(r for r in requirements("requirements-gpu.txt") if r.name.startswith("transf"))
    (version,) = engine.specifier
    try:
        extension = required_by_the_extension(version.version)
    except urllib.error.URLError as error:
        pytest.skip(f"the registry does not answer: {error}")
    gpu = (ROOT / "requirements-gpu.txt").read_text()
    assert ",pytorch]" in gpu
    gpu = gpu.replace(",pytorch]", "]").replace("-r ", f"-r {ROOT}/")
    (tmp_path / "gpu.txt").write_text("\n".join([gpu, *extension]))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "--quiet", "--target", tmp_path / "pip", PIP], check=True, timeout=120)
    assert any(line.startswith("torch") for line in extension), extension
    report = tmp_path / "report.json"
    done = subprocess.run(
        [python, "-m", *pip[2:], "--dry-run", "--ignore-installed", "--use-feature=fast-deps",
         "--report", report, "-r", tmp_path / "gpu.txt", "-r", ROOT / "requirements-gpu-build.txt"],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "pip")},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    chosen = {
        item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"]
        for item in json.loads(report.read_text())["install"]
    }
    assert chosen["megatron-core"].startswith("0.19.")
    assert chosen["transformer-engine"] == chosen["transformer-engine-cu13"] == version.version
    # The headers that the extension is compiled with are those of torch's CUDA.
    cuda = chosen["nvidia-cuda-runtime"].rsplit(".", 1)[0]
    assert {
        chosen[f"nvidia-cuda-{part}"].rsplit(".", 1)[0] for part in ("nvcc", "crt", "cccl")
    } == {cuda}
