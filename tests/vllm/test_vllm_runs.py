"""Whole runs on the real vLLM, on a CPU: `bash tests/vllm.sh`. Skipped unless VLLM_PYTHON is set."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from megatron_rpp.rollout.vllm.api import Server
from tests.ports import free_port
from tests.small_run import arguments, make_data
from tests.whole_runs import rows

PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="no vLLM (tests/vllm.sh sets VLLM_PYTHON)"),
]
SECONDS = 900


def command(data, run, **settings):
    vllm = {"rollout__engine": "vllm", "rollout__vllm__python": PYTHON,
            "algorithm__rollout_correction": "cap", "model__hidden": 128,
            "rollout__vllm__dir": run}  # fmt: skip
    words = arguments(data, run, **(vllm | settings))
    return [sys.executable, "-m", "megatron_rpp.torchrun", "--nproc-per-node", "2", "-m",
            "megatron_rpp.train", *words]  # fmt: skip


def vllm_processes(mark):
    """Processes of servers whose model is in `mark`, with their children."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if str(mark) in words and "vllm" in words:
            found += [process, *process.children(recursive=True)]
    return found


def lives(process):
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_a_whole_run_with_stop_texts_and_another_temperature(tmp_path):
    make_data(tmp_path)
    done = subprocess.run(
        command(tmp_path, tmp_path / "run", parallel__pipeline=2, rollout__temperature=0.7,
                rollout__top_p=0.9, rollout__min_new_tokens=3, rollout__stop='["1"]'),
        capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for row in rows(tmp_path / "run/logs/metrics.jsonl"):
        # Log-probs of the whole distribution at the temperature, as the trainer computes them.
        assert row["rollout/logprob_abs_diff_max"] < 1e-3
        assert row["rollout/ess"] > 0.999
    assert not vllm_processes(tmp_path)
    assert not list((tmp_path / "run").glob("megatron_rpp-*"))


def test_a_killed_run_leaves_no_server_and_no_weights(tmp_path):
    make_data(tmp_path)
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(tmp_path, run, train__steps=1000), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    metrics, deadline = run / "logs/metrics.jsonl", time.monotonic() + SECONDS
    while not (metrics.exists() and len(rows(metrics)) > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    # Found before the kill: the workers of a front end that is gone have nothing that names them.
    servers = vllm_processes(tmp_path)
    assert len(servers) > 2
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while (left := [p for p in servers if lives(p)]) or list(run.glob("megatron_rpp-*")):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


@pytest.fixture
def server(tmp_path):
    """A server that tools/vllm_server.py has started: (its URL, the settings of a run)."""
    make_data(tmp_path)
    port = free_port()
    words = command(tmp_path, tmp_path / "run")[7:]
    tool = [sys.executable, "tools/vllm_server.py", "--port", str(port), *words]
    process = subprocess.Popen(tool, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + SECONDS
    while not Server(f"127.0.0.1:{port}").is_healthy():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.5)
    yield f"[http://127.0.0.1:{port}]", {"rollout__vllm__python": None}
    process.terminate()
    process.wait(60)


def test_servers_that_are_there_already(tmp_path, server):
    urls, settings = server
    run = command(tmp_path, tmp_path / "run", rollout__vllm__urls=urls, **settings)
    done = subprocess.run(run, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "run/logs/metrics.jsonl")) == 2
    # A server takes the weights of the next run, too, but not those of another model.
    other = command(
        tmp_path, tmp_path / "other", rollout__vllm__urls=urls, model__layers=2, **settings
    )
    done = subprocess.run(other, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2
    assert "has another model: layers is 4 there, 2 here" in done.stderr


RANKS = [sys.executable, "-m", "megatron_rpp.torchrun", "--nproc-per-node", "2", "-m"]


def printed(words):
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """The settings of the quickstart on vLLM, after its warm start."""
    base = tmp_path_factory.mktemp("quickstart")
    settings = [
        "--config=launch/recipes/quickstart.yaml", "--config=launch/recipes/vllm/cpu.yaml",
        f"--rollout.vllm.python={PYTHON}", f"--data.train={base}/train.jsonl",
        f"--data.eval={base}/eval.jsonl", f"--data.tokenizer={base}/tokenizer.model",
        f"--sft.dir={base}/sft", "--train.steps=5",
    ]  # fmt: skip
    printed([sys.executable, "tools/make_task.py", *settings])
    printed([*RANKS, "megatron_rpp.sft", *settings])
    return [*settings, f"--model.init_path={base}/sft"]


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_quickstart_learns(tmp_path, warm, ahead):
    """Five steps of REINFORCE++ on vLLM, after the warm start."""
    folders = [f"--checkpoint.dir={tmp_path}/checkpoints", f"--logging.dir={tmp_path}/logs"]
    output = printed([*RANKS, "megatron_rpp.train", *warm, *folders, f"--rollout.ahead={ahead}"])
    before, after = re.findall(r"step [05]: held-out accuracy ([\d.]+)%", output)
    measured = rows(tmp_path / "logs/metrics.jsonl")
    least = min(row["rollout/ess"] for row in measured)
    seconds = [round(row["time/step"], 1) for row in measured]
    print(f"ahead {ahead}: held-out accuracy from {before}% to {after}% in five steps, rollout/ess "
          f"at least {least:.6f}, seconds {seconds}")  # fmt: skip
    assert float(after) > float(before) + 10
    assert [row["rollout/staleness"] for row in measured] == [0, *[ahead] * 4]
    # The weights of the step before are another policy, and near enough for the correction.
    assert (least > 0.9999) == (not ahead) and least > 0.5
