"""What launch/install.sh would install, on machines with and without a GPU and a Python 3.12.

`nvidia-smi` and the interpreters are programs of the test; nothing is installed.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = "#!/bin/sh\n[ {minor} -ge $(echo \"$2\" | sed 's/.*(3, //; s/).*//') ]\n"
"""An interpreter that answers only how new it is."""


class Machine:
    """A copy of the files that install.sh reads, and a PATH with these programs alone."""

    def __init__(self, folder: Path, *, gpu: bool = False, minors: tuple[int, ...] = (11,)):
        self.repository, self.programs = folder / "repository", folder / "bin"
        (self.repository / "launch").mkdir(parents=True)
        self.programs.mkdir()
        shutil.copy(ROOT / "launch/install.sh", self.repository / "launch")
        for name in ("requirements.txt", "requirements-gpu.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.repository)
        for name in ("bash", "cat", "dirname", "grep", "sed", "sh"):
            (self.programs / name).symlink_to(shutil.which(name))
        if gpu:
            self.program("nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-0)'\n")
        for minor in minors:
            self.program(f"python3.{minor}", PYTHON.format(minor=minor))

    def program(self, name: str, text: str) -> None:
        path = self.programs / name
        path.write_text(text)
        path.chmod(0o755)

    def environment(self, kind: str | None) -> None:
        """A .venv that is there already; None: made before there were kinds."""
        (self.repository / ".venv/bin").mkdir(parents=True)
        (self.repository / ".venv/bin/python").symlink_to(self.programs / "python3.11")
        if kind is not None:
            (self.repository / ".venv/kind").write_text(f"{kind}\n")

    def install(self, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
        command = [self.programs / "bash", "launch/install.sh", "--dry-run", *words]
        env = {"PATH": str(self.programs), "HOME": str(self.repository)} | settings
        return subprocess.run(
            command, cwd=self.repository, env=env, capture_output=True, text=True, timeout=60
        )


def plan(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


CPU = {"kind": "cpu", "python": "python3.11", "files": "requirements.txt"}
GPU = {"kind": "gpu", "python": "python3.12", "files": "requirements-gpu.txt"}


@pytest.mark.parametrize(
    ("gpu", "words", "expected"),
    [(False, [], CPU), (True, [], GPU), (False, ["--gpu"], GPU), (True, ["--cpu"], CPU)],
    ids=["no GPU", "a GPU", "asked for the GPU", "asked for the CPU"],
)
def test_what_is_chosen(gpu, words, expected, tmp_path):
    assert plan(Machine(tmp_path, gpu=gpu, minors=(11, 12)).install(*words)) == expected


def test_the_gpu_requirements_take_the_place_of_the_others(tmp_path):
    machine = Machine(tmp_path, gpu=True, minors=(12,))
    words = ["requirements.txt", "requirements-dev.txt"]
    assert plan(machine.install(*words))["files"] == "requirements-gpu.txt requirements-dev.txt"


def test_a_driver_without_a_gpu_is_no_gpu(tmp_path):
    machine = Machine(tmp_path)
    machine.program("nvidia-smi", "#!/bin/sh\necho 'No devices found.'\nexit 6\n")
    assert plan(machine.install()) == CPU


def test_a_gpu_machine_without_python_3_12_is_refused(tmp_path):
    done = Machine(tmp_path, gpu=True, minors=(11,)).install()
    assert done.returncode == 2 and done.stdout == ""
    assert "needs Python 3.12 or newer, and none was found" in done.stderr
    assert "launch/Dockerfile" in done.stderr and "--cpu" in done.stderr


def test_the_interpreter_that_is_named(tmp_path):
    machine = Machine(tmp_path, gpu=True, minors=(11, 12, 13))
    named = str(machine.programs / "python3.13")
    assert plan(machine.install(PYTHON=named))["python"] == named
    done = machine.install(PYTHON="python3.11")  # not replaced by another
    assert done.returncode == 2 and "and PYTHON=python3.11 is not" in done.stderr


def test_an_interpreter_of_pyenv_is_found(tmp_path):
    machine = Machine(tmp_path, gpu=True)
    folder = machine.repository / ".pyenv/versions/3.12.1/bin"
    folder.mkdir(parents=True)
    machine.program("python3.12", PYTHON.format(minor=12))
    (machine.programs / "python3.12").rename(folder / "python")
    assert plan(machine.install())["python"] == str(folder / "python")


@pytest.mark.parametrize("kind", [None, "cpu"])
def test_an_environment_stays_what_it_is(kind, tmp_path):
    machine = Machine(tmp_path, gpu=True, minors=(11, 12))
    machine.environment(kind)
    done = machine.install()
    assert plan(done) == CPU | {"python": ".venv/bin/python"}
    assert "for the CPU, though this is a machine for the GPU" in done.stderr
    refused = machine.install("--gpu")
    assert refused.returncode == 2 and "rm -r .venv" in refused.stderr


def test_an_unknown_option_is_refused(tmp_path):
    done = Machine(tmp_path).install("--cuda")
    assert done.returncode == 2 and "--cuda" in done.stderr


@pytest.mark.parametrize(
    ("reached", "words"),
    [("true", "--extra-index-url https://download.pytorch.org/whl/cpu"), ("false", "")],
)
def test_pytorchs_own_index_is_named_only_if_it_answers(reached, words):
    """`true` and `false` stand for an interpreter that reaches it and one that does not."""
    command = ["bash", "launch/cpu_index.sh", reached]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() == words
    for script in ("launch/install.sh", "tests/vllm.sh"):
        text = (ROOT / script).read_text()
        assert "launch/cpu_index.sh" in text and "download.pytorch.org" not in text
