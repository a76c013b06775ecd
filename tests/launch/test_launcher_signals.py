"""A signal ends the launcher at any moment, whatever it waits for. Ranks and waits are real."""

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

MAX_SECONDS = 15.0
"""Time limit for an end that takes two seconds on an idle machine; torch would wait a minute."""


def end_after(process: subprocess.Popen, number: int) -> tuple[int, str, str]:
    """Sends a signal, checks that the process ends soon, and returns its result."""
    process.send_signal(number)
    before = time.monotonic()
    result = ended(process)
    assert time.monotonic() - before < MAX_SECONDS
    return result


def test_sigterm_while_torch_is_imported(tmp_path):
    """The import takes seconds; here it never ends."""
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(600)\n"
    (tmp_path / "torch.py").write_text(slow)
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    process = start(*LAUNCHER, *ONE_NODE, "program.py", env=env)
    assert process.stdout.readline() == "importing\n"
    code, _, errors = end_after(process, signal.SIGTERM)
    assert code == 75 and "Traceback" not in errors


def test_signals_while_torch_resolves_a_name():
    """The C++ code takes a minute, and no Python signal handler runs meanwhile."""
    options = ("--nnodes", "2", "--rdzv-backend", "c10d")
    words = (*LAUNCHER, *options, "--rdzv-endpoint", "no-such-node.invalid:29500", "it.py")
    expected = {signal.SIGTERM: 75, signal.SIGINT: 130}
    processes = {number: start(*words) for number in expected}
    for number, process in processes.items():
        for line in process.stderr:
            if "no-such-node.invalid" in line:  # the first attempt has failed; torch retries
                break
        assert end_after(process, number)[0] == expected[number]


# The main thread waits inside torch for a program that accepts and never answers. A rank that exits
# with 75 on SIGTERM is running, or there is none.
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


def test_sigterm_while_another_machine_is_frozen(tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)
    expected = {"idle": 75, "running": 75, "over": 9}
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        words = (sys.executable, tmp_path / "waiting.py", frozen.getsockname()[1])
        processes = {ranks: start(*words, ranks) for ranks in expected}
        connections = [frozen.accept()[0] for _ in expected]
        codes = {
            ranks: end_after(process, signal.SIGTERM)[0] for ranks, process in processes.items()
        }
        for connection in connections:
            connection.close()
    assert codes == expected


# The rank prints its process id and exits with 75 on SIGTERM; "stuck": it ignores Ctrl-C.
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
    """Starts a launcher with two ranks; returns it and the process ids of the ranks."""
    (tmp_path / "rank.py").write_text(RANK)
    process = start(*prefix, *LAUNCHER, *ONE_NODE, tmp_path / "rank.py", act)
    try:
        return process, [int(process.stdout.readline().split()[1]) for _ in "12"]
    except BaseException:
        process.kill()  # this ends the ranks, too
        raise


def test_nohup_ignores_sighup(tmp_path):
    """Closing the terminal does not stop the launcher."""
    process, ranks = running(tmp_path, "save", "nohup")
    process.send_signal(signal.SIGHUP)
    assert end_after(process, signal.SIGTERM)[0] == 75
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_a_second_interrupt_ends_at_once(tmp_path):
    """The first interrupt waits up to 30 s for ranks that do not answer; the second does not."""
    process, ranks = running(tmp_path, "stuck")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    assert end_after(process, signal.SIGINT)[0] == 130
    assert not any(os.path.exists(f"/proc/{rank}") for rank in ranks)
