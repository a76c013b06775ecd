"""A signal ends the launcher at any moment: what it waits for, and what its ranks do, is real."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.test_single_node import LAUNCHER, ONE_NODE, ROOT, ended, start

PROMPT = 15.0
"""Seconds for what ends in two, on a machine that is busy; torch waits a minute and more."""


def after(process: subprocess.Popen, number: int) -> tuple[int, str, str]:
    """The end of `process` after a signal, which comes at once."""
    process.send_signal(number)
    before = time.monotonic()
    result = ended(process)
    assert time.monotonic() - before < PROMPT
    return result


def test_while_torch_is_imported(tmp_path):
    """Which takes seconds; here, without end."""
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(600)\n"
    (tmp_path / "torch.py").write_text(slow)
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    process = start(*LAUNCHER, *ONE_NODE, "program.py", env=env)
    assert process.stdout.readline() == "importing\n"
    code, _, errors = after(process, signal.SIGTERM)
    assert code == 75 and "Traceback" not in errors


def test_while_torch_asks_for_a_name():
    """In C++, where no handler of Python's runs, and for a minute."""
    options = ("--nnodes", "2", "--rdzv-backend", "c10d")
    words = (*LAUNCHER, *options, "--rdzv-endpoint", "no-such-node.invalid:29500", "it.py")
    expected = {signal.SIGTERM: 75, signal.SIGINT: 130}
    processes = {number: start(*words) for number in expected}
    for number, process in processes.items():
        for line in process.stderr:
            if "no-such-node.invalid" in line:  # it has asked once, and goes on
                break
        assert after(process, number)[0] == expected[number]


# The main thread waits inside torch for a program that accepts and says nothing, with a rank that
# answers SIGTERM by 75 (or without any).
WAITING = """
import subprocess, sys
from torch.distributed import TCPStore
from megatron_rpp.launcher import ending

ending.OVER_SECONDS = 0.5
signals = ending.Signals()
signals.listen()
if sys.argv[2] == "running":
    rank = "import signal as s, sys; s.signal(15, lambda *a: sys.exit(75)); print(1); s.pause()"
    child = subprocess.Popen([sys.executable, "-uc", rank], stdout=subprocess.PIPE)
    child.stdout.read(1)
    signals.starting()
    signals.running([child])
elif sys.argv[2] == "over":
    signals.over(9, seconds=600)
TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False)
"""


def test_while_another_machine_is_frozen(tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)
    expected = {"idle": 75, "running": 75, "over": 9}
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        words = (sys.executable, tmp_path / "waiting.py", frozen.getsockname()[1])
        processes = {ranks: start(*words, ranks) for ranks in expected}
        connections = [frozen.accept()[0] for _ in expected]
        codes = {ranks: after(process, signal.SIGTERM)[0] for ranks, process in processes.items()}
        for connection in connections:
            connection.close()
    assert codes == expected


# A rank that says when it runs, and saves when it is told to; "stuck": Ctrl-C does not reach it.
RANK = """
import os, signal, sys

signal.signal(signal.SIGTERM, lambda *a: sys.exit(75))
if sys.argv[1] == "stuck":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
os.write(1, f"pid {os.getpid()}\\n".encode())  # at once: two ranks share the pipe
while True:
    signal.pause()
"""


def running(tmp_path: Path, act: str, *prefix: str) -> tuple[subprocess.Popen, list[int]]:
    """A launcher whose two ranks run, and their process ids."""
    (tmp_path / "rank.py").write_text(RANK)
    process = start(*prefix, *LAUNCHER, *ONE_NODE, tmp_path / "rank.py", act)
    try:
        return process, [int(process.stdout.readline().split()[1]) for _ in "12"]
    except BaseException:
        process.kill()  # the ranks end with it
        raise


def test_nohup(tmp_path):
    """The end of the terminal is no reason to stop."""
    process, ranks = running(tmp_path, "save", "nohup")
    process.send_signal(signal.SIGHUP)
    assert after(process, signal.SIGTERM)[0] == 75
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_interrupted_twice(tmp_path):
    """Who asks again does not wait until ranks that do not answer are given up, after 30 s."""
    process, ranks = running(tmp_path, "stuck")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    assert after(process, signal.SIGINT)[0] == 130
    assert not any(os.path.exists(f"/proc/{rank}") for rank in ranks)
