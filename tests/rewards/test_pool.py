"""Worker processes: right scores, one sample lost at a time, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

import megatron_rpp
from megatron_rpp.rewards import RewardError, RewardSet

MARK = 10_000 + os.getpid()
"""Seconds to sleep: a number that identifies the processes of this test on the machine."""
SCORER = """
import os, signal, subprocess, sys, time
print("a scorer may print")

def f(prompts, responses, labels, metadata):
    assert len(prompts) == len(responses) == len(labels) == len(metadata) == 1
    text = responses[0]
    if text == "sleep":
        time.sleep(600)
    if text == "spin":
        while True:
            pass
    if text == "exit":
        os._exit(3)
    if text == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "child":
        subprocess.run([sys.executable, "-c", "import time; time.sleep(MARK)"])
    if text.startswith("raise"):
        raise KeyError(text)
    if text == "nan":
        return [float("nan")]
    return [float(text) + len(prompts[0]) + 10 * len(labels[0]) + metadata[0]["x"]]
"""


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    path = tmp_path_factory.mktemp("scorer") / "scorer.py"
    path.write_text(SCORER.replace("MARK", str(MARK)))
    return f"{path}:f"


@pytest.fixture(scope="module")
def rewards(name):
    """Two workers, 2 seconds per sample, score -9 for samples that take longer."""
    return RewardSet([name, "exact_match"], workers=2, timeout=2.0, timeout_score=-9.0)


def score(rewards: RewardSet, responses: list[str]):
    count = len(responses)
    return rewards.score(["pp"] * count, responses, ["l"] * count, [{"x": 0.5}] * count)


def workers_of(rewards: RewardSet) -> list[int]:
    return [worker.process.pid for worker in rewards._pool._workers]


def running(text: str) -> list[str]:
    """Command lines on this machine that contain `text`."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/cmdline") as file:
                line = file.read()
        except (OSError, ValueError):
            continue
        found += [line] if text in line and entry.isdigit() else []
    return found


def gone(pid: int) -> bool:
    """Whether the process ended (within five seconds)."""
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_scores_come_back_in_order(rewards, name):
    scores = score(rewards, [str(number) for number in range(100)])
    assert scores.parts[name] == [number + 12.5 for number in range(100)]
    assert scores.parts["exact_match"] == [0.0] * 100 and scores.timeouts == 0


def test_a_large_batch_of_a_cheap_scorer_is_quick(rewards):
    start = time.perf_counter()
    score(rewards, ["1"] * 512)
    assert time.perf_counter() - start < 5.0  # not one process per sample


@pytest.mark.parametrize("bad", ["sleep", "spin", "exit", "segfault", "child"])
def test_only_the_sample_that_hangs_or_crashes_is_lost(rewards, name, bad):
    scores = score(rewards, ["1", bad, "2", "3"])
    assert scores.parts[name] == [13.5, -9.0, 14.5, 15.5]
    assert scores.total == scores.parts[name] and scores.timeouts == 1
    assert score(rewards, ["1"]).timeouts == 0
    assert not running(f"time.sleep({MARK})"), "a child of the killed scorer goes on"


def test_an_exception_stops_with_its_own_sample(rewards, name):
    with pytest.raises(RewardError) as error:
        score(rewards, ["1", "2", "raise me", "3", "raise me too"])
    assert str(error.value) == (
        f"reward function {name!r} raised KeyError: 'raise me'\nsample 2 of 5:\n"
        "  prompt:   'pp'\n  response: 'raise me'\n  label:    'l'"
    )
    with pytest.raises(RewardError, match="gave the score nan, not a finite number\nsample 1 of 2"):
        score(rewards, ["1", "nan"])
    assert score(rewards, ["1", "2"]).parts[name] == [13.5, 14.5]


def test_a_file_that_can_no_longer_be_loaded_stops(tmp_path):
    path = tmp_path / "gone.py"
    path.write_text("def f(*columns):\n    return [1.0]\n")
    rewards = RewardSet([f"{path}:f"], workers=1)
    path.unlink()
    with pytest.raises(RewardError, match="cannot start in a worker process: .*there is no file"):
        rewards.score(["p"], ["r"], ["l"], [{}])


def test_workers_end_with_the_rewards_and_know_neither_torch_nor_megatron(tmp_path):
    path = tmp_path / "modules.py"
    path.write_text(
        "import sys\ndef f(*columns):\n"
        "    return ['torch' in sys.modules or 'megatron' in sys.modules]\n"
    )
    rewards = RewardSet([f"{path}:f"], workers=1)
    assert rewards.score(["p"], ["r"], ["l"], [{}]).total == [0.0]
    (pid,) = workers_of(rewards)
    del rewards
    assert gone(pid)


def test_workers_see_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    path = tmp_path / "devices.py"
    path.write_text(
        "import os\ndef f(*columns):\n    return [len(os.environ['CUDA_VISIBLE_DEVICES'])]\n"
    )
    rewards = RewardSet([f"{path}:f"], workers=1)
    assert rewards.score(["p"], ["r"], ["l"], [{}]).total == [0.0]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"  # the rank keeps its own


def test_a_signal_to_the_whole_job_costs_no_sample(rewards, name):
    """SLURM sends SIGTERM to every process; the run saves, and needs its scorers until then."""
    score(rewards, ["1", "2"])
    for pid in (before := workers_of(rewards)):
        os.killpg(pid, signal.SIGTERM)
        os.killpg(pid, signal.SIGUSR1)
    scores = score(rewards, ["1", "2"])
    assert scores.parts[name] == [13.5, 14.5] and scores.timeouts == 0
    assert workers_of(rewards) == before


PARENT = """
import os, sys, threading
from megatron_rpp.rewards import RewardSet
rewards = RewardSet([sys.argv[1]], workers=1, timeout=600.0)
columns = (["p"], ["l"], [{"x": 0.0}])
rewards.score(columns[0], ["1"], *columns[1:])
print(rewards._pool._workers[0].process.pid, flush=True)
ending = sys.argv[3]
if ending == "exit":
    threading.Timer(1.0, os._exit, (70,)).start()
rewards.score(columns[0], [sys.argv[2]], *columns[1:])
"""


@pytest.mark.parametrize("ending", ["kill", "exit"])
@pytest.mark.parametrize("act", ["spin", "child"])
def test_no_process_is_left_if_the_parent_ends_at_once(name, act, ending):
    """Killed by SIGKILL or as by the watchdog, while a scorer spins or waits for its child."""
    words = [sys.executable, "-c", PARENT, name, act, ending]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE)
    group = int([parent.stdout.readline() for _ in range(2)][1])  # the scorer prints first
    if ending == "kill":
        time.sleep(0.5)
        parent.kill()
    assert parent.wait() == {"kill": -signal.SIGKILL, "exit": 70}[ending]
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while alive := members(group):
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def members(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                state, _, owner = file.read().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        found += [int(pid)] if int(owner) == group and state != "Z" else []
    return found


def test_a_file_of_the_user_does_not_take_a_librarys_place(tmp_path, monkeypatch):
    """Workers start in the user's directory, whose modules come last."""
    for name in ("numpy.py", "datasets.py", "json.py"):
        (tmp_path / name).write_text("raise RuntimeError('the wrong module')\n")
    (tmp_path / "mine.py").write_text("def f(*batch):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(os.path.dirname(os.path.dirname(megatron_rpp.__file__)))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert RewardSet(["mine:f"], workers=1).score(["p"], ["r"], ["l"], [{}]).total == [1.0]
