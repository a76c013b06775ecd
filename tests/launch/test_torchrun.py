"""The launcher passes on codes and signals, on one node and on two; launch/torchrun.sh trains.

The ranks are small scripts if only the launcher is tested, and the real program if two nodes train:
first two launchers on this machine, then two network namespaces with their own addresses.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rpp.lifecycle.exit_codes import REFUSED
from megatron_rpp.torchrun import exit_code
from tests.distributed import run_ranks
from tests.launch.namespaces import two_namespaces
from tests.ports import free_port
from tests.small_run import arguments, config_of, make_data
from tests.whole_runs import VARIED, same_bits, train_run

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240.0

# The rank records its start and does what its argument says; only rank 0 fails.
RANK = """
import os, signal, sys, time
from pathlib import Path

folder, act = Path(sys.argv[1]), sys.argv[2]
rank, start = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]

def save(signum, frame):
    time.sleep(1)
    (folder / f"saved.{rank}").write_text(signal.Signals(signum).name)
    sys.exit(75)

if act == "save":
    signal.signal(signal.SIGTERM, save)
    signal.signal(signal.SIGUSR1, save)
(folder / f"start.{rank}.{start}").touch()
while not (folder / f"start.1.{start}").exists():  # else rank 1 may be stopped before it has started
    time.sleep(0.05)
if act in ("save", "unprepared"):
    time.sleep(60)
elif act == "crash once" and start == "0" and rank == "0":
    os.kill(os.getpid(), signal.SIGKILL)
elif act.isdigit():
    sys.exit(int(act)) if rank == "0" else time.sleep(60)
"""


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([], 0),
        ([1, 1], 1),
        ([1, 75], 75),
        ([-signal.SIGTERM, 2], 2),
        ([1, -signal.SIGKILL], 137),
        ([-signal.SIGTERM, 1], 1),
        ([-signal.SIGTERM], 143),
    ],
)
def test_the_most_telling_code(codes, expected):
    assert exit_code(codes) == expected


class Launchers:
    """Starts launchers for a test; none outlives it."""

    def __init__(self):
        self.started: list[subprocess.Popen] = []

    def start(self, *words: str | Path, **env: str) -> subprocess.Popen:
        process = subprocess.Popen([*map(str, words)], cwd=ROOT, env=os.environ | env)
        self.started.append(process)
        return process

    def node(self, core: int, *words: str | Path, **env: str) -> subprocess.Popen:
        """Starts a launcher on one core, or two nodes would each take threads for all cores."""
        cores = sorted(os.sched_getaffinity(0))
        return self.start("taskset", "-c", cores[core % len(cores)], *words, **env)

    def scripted(self, folder: Path, act: str, *options: str) -> subprocess.Popen:
        """Starts a launcher whose ranks run RANK."""
        folder.mkdir(exist_ok=True)
        (folder / "rank.py").write_text(RANK)
        launcher = (sys.executable, "-m", "megatron_rpp.torchrun", *options)
        return self.start(*launcher, folder / "rank.py", folder, act)

    def codes(self) -> list[int]:
        return [process.wait(LIMIT) for process in self.started]


@pytest.fixture
def launchers():
    launchers = Launchers()
    yield launchers
    for process in launchers.started:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # it stops its ranks, within 30 seconds
            process.wait(LIMIT)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"did not come: {what}"
        time.sleep(0.05)


def wait_for(*paths: Path) -> None:
    wait_until(lambda: all(path.exists() for path in paths), f"{paths}")


def starts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("start.*"))


ONE_NODE = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1")


def two_nodes(port: int, address: str = "127.0.0.1") -> tuple[str, ...]:
    """Options for each of two nodes with one rank each."""
    endpoint = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:{port}")
    return ("--nnodes", "2", "--nproc-per-node", "1", *endpoint, "--rdzv-id", "run")


def test_codes_and_restarts(launchers, tmp_path):
    """Codes 2 and 75 end the run; a crash is restarted once; the other rank never hangs."""
    acts = {"2": 2, "75": 75, "crash once": 0, "9": 9}
    for act in acts:
        launchers.scripted(tmp_path / act, act, *ONE_NODE)
    assert launchers.codes() == list(acts.values())
    once = ["start.0.0", "start.1.0"]
    assert starts(tmp_path / "2") == starts(tmp_path / "75") == once
    for act in ("crash once", "9"):
        assert "start.0.1" in starts(tmp_path / act)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_ranks_have_time_to_save(name, launchers, tmp_path):
    """A signal to the launcher of one of two nodes reaches its rank; both nodes end preempted."""
    nodes = two_nodes(free_port())
    first, _ = (launchers.scripted(tmp_path, "save", *nodes, "--max-restarts", "1") for _ in "12")
    wait_for(tmp_path / "start.0.0", tmp_path / "start.1.0")
    first.send_signal(signal.Signals[name])
    assert launchers.codes() == [75, 75]
    assert name in {path.read_text() for path in tmp_path.glob("saved.*")}
    assert len(starts(tmp_path)) == 2


def test_a_port_of_another_program_is_an_error(tmp_path):
    """The program accepts and never answers; torch's store would wait for it forever."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command = ["bash", "launch/torchrun.sh", *two_nodes(port), "train"]
        failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert failed.returncode == REFUSED == 2
    message = f"launcher: port {port} of 127.0.0.1 cannot be used for the rendezvous (Address"
    assert message in failed.stderr and "--rdzv-endpoint 127.0.0.1:PORT" in failed.stderr
    assert "Traceback" not in failed.stderr


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_signals_before_there_is_anything_to_save(launchers, tmp_path):
    """A rank without a handler yet, and a node that waits for the other one, exit with 75."""
    port = free_port()
    unprepared = launchers.scripted(tmp_path, "unprepared", *ONE_NODE)
    waiting = launchers.scripted(tmp_path / "waiting", "save", *two_nodes(port))
    wait_for(tmp_path / "start.0.0", tmp_path / "start.1.0")
    wait_until(lambda: answers(port), "the rendezvous")
    for launcher in (unprepared, waiting):
        launcher.send_signal(signal.SIGUSR1)
    assert launchers.codes() == [75, 75]
    assert starts(tmp_path / "waiting") == []


def test_a_failure_is_known_on_both_nodes(launchers, tmp_path):
    """The node whose rank still sleeps stops it and exits with the other node's code."""
    nodes = two_nodes(free_port())
    for _ in "12":
        launchers.scripted(tmp_path, "9", *nodes)
    assert launchers.codes() == [9, 9]


# The run saves after every step, so a killed run resumes in its second step.
SETTINGS = VARIED | {"parallel__tensor": 2, "checkpoint__interval": 1}


def train_here(rank: int, base: Path) -> None:
    train_run(base, base / "here", **SETTINGS)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The folder of the data and of run "here": two tensor-parallel ranks without a launcher."""
    base = tmp_path_factory.mktemp("nodes")
    make_data(base)
    run_ranks(train_here, 2, base, base)
    return base


def check_same(base: Path, run: str) -> None:
    same_bits(base / run, base / "here", config_of(base, base / run, **VARIED), step=2)


# A user's file that kills rank 1 once, in the second step's second mini-batch (a step enters
# "update" five times: once for the stage and once for each of its four mini-batches).
KILLER = """
import os, signal
from pathlib import Path
from megatron_rpp.lifecycle import heartbeat
from tests.whole_runs import varied

mark, seen = Path(__file__).with_name("killed"), []

def listen(phase):
    seen.extend([phase] if phase == "update" else [])
    if len(seen) == 8 and os.environ["RANK"] == "1" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

heartbeat.current.listeners.append(listen)
"""


def test_two_launchers_train_and_start_a_killed_rank_again(launchers, base, capfd):
    """launch/torchrun.sh trains on two nodes, both on this machine, tensor-parallel between them.

    A rank dies inside a step. All ranks restart, resume, and end like an uninterrupted run.
    """
    (base / "killer.py").write_text(KILLER)
    options = (*two_nodes(free_port()), "--local-addr", "127.0.0.1", "--max-restarts", "1")
    reward = {"reward__functions": f"[{base}/killer.py:varied]"}
    settings = arguments(base, base / "two", **(SETTINGS | reward))
    for core in (0, 1):
        launchers.node(core, "bash", "launch/torchrun.sh", *options, "train", *settings)
    assert launchers.codes() == [0, 0]
    output, errors = capfd.readouterr()
    assert "launcher: rank 1 failed, killed by SIGKILL" in errors
    assert "starts at step 0 of 2" in output and "resumed at step 1 of 2" in output
    check_same(base, "two")


def test_two_namespaces_train(launchers, base):
    """Each node has its own network stack and address; a link connects them."""
    settings = arguments(base, base / "apart", **SETTINGS)
    with two_namespaces() as nodes:
        for core, node in enumerate(nodes):
            options = (*two_nodes(29500, nodes[0].address), "--local-addr", node.address)
            command = (*node.prefix, "bash", "launch/torchrun.sh", *options, "train", *settings)
            launchers.node(core, *command, GLOO_SOCKET_IFNAME=node.interface)
        assert launchers.codes() == [0, 0]
    check_same(base, "apart")
