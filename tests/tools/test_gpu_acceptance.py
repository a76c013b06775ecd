"""tools/gpu_acceptance.py in its reduced form; tests/gpu runs the checks on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from acceptance import catalog, decoding, profiling
from acceptance.figures import Figure, status_of
from acceptance.supervisor import Supervisor

ROOT = Path(__file__).resolve().parents[2]

TOOL = str(ROOT / "tools/gpu_acceptance.py")
BROKEN = """
import os, sys

def broken(*arguments, **options):
    raise RuntimeError("CUDA error: pretended")

if "--worker" in sys.orig_argv:
    from megatron_rpp.model import kv_cache
    from megatron_rpp.parallel import products
    from megatron_rpp.runtime import preflight_gpu

    right = products.matmul_fp32
    products.matmul_fp32 = lambda a, b: right(a, b) * 1.01
    kv_cache.KeyValueCache.attend = broken
    preflight_gpu.judge_node = lambda *arguments, **options: os._exit(9)
"""
"""Python runs this at its start, if it lies in a file sitecustomize.py on its path."""


def run(folder, *words, launcher=(sys.executable,), **variables):
    """Exit code, the checks of the JSON by name, the whole JSON, and what was printed."""
    output, environment = folder / "found.json", os.environ | {"OMP_NUM_THREADS": "1"} | variables
    command = [*launcher, TOOL, "--output", str(output), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=400
    )
    assert output.exists(), done.stderr
    content = json.loads(output.read_text())
    checks = {check["name"]: check for check in content["checks"]}
    return done.returncode, checks, content, done.stdout


def figures(check):
    return {figure["name"]: figure for figure in check["figures"]}


def test_all_checks_run_on_a_cpu(tmp_path):
    code, checks, content, printed = run(tmp_path)
    assert code == 0 and content["passed"] is True, printed
    assert list(checks) == catalog.NAMES
    states = {name: check["status"] for name, check in checks.items()}
    assert states == {name: "passed" for name in catalog.NAMES} | {"training-local": "skipped"}
    assert content["scale"]["name"] == "small" and content["node"]["torch"] in content["machine"]
    assert all(checks[n]["seconds"] > 0 for n, state in states.items() if state == "passed")

    for name in ("determinism", "recompute"):  # on a CPU bit for bit
        assert figures(checks[name])["gradients, elements that differ"]["value"] == 0
    assert "flash" in figures(checks["training"])["attention operators"]["value"]
    product = figures(checks["logprobs"])["matmul_fp32, product"]
    assert 0 < product["value"] < product["at_most"]
    decode = figures(checks["decode"])
    assert decode["time"]["value"] > 0
    assert decode["without CUDA graphs"]["skipped"] == "needs a CUDA device"
    assert "[11/11] recompute" in printed and "10 passed, 0 failed, 1 skipped" in printed


def test_cudnns_attention_is_on_for_its_figures_alone():
    """What runs on a GPU only, with a rollout that notes the switches."""
    before, seen = torch.backends.cuda.cudnn_sdp_enabled(), []
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        found = list(
            decoding.cudnn_figures(lambda: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
        )
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert seen == [False, False, True], "its first run is measured, because it keeps its plans"
    assert [figure.status for figure in found] == ["measured"] * 2


@pytest.fixture
def broken(tmp_path):
    """The environment in which some checks are broken on purpose."""
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    return {"PYTHONPATH": f"{tmp_path}:{ROOT}"}


def test_broken_checks_fail_and_the_others_run(tmp_path, broken):
    """One crashes its process, one is wrong, and the last one is right."""
    names = ["preflight", "logprobs", "determinism"]
    code, checks, content, printed = run(tmp_path, "--only", *names, **broken)
    assert code == 1 and content["passed"] is False and list(checks) == names
    assert checks["preflight"]["error"] == "its process ended with code 9"
    assert checks["logprobs"]["error"] is None and checks["logprobs"]["status"] == "failed"
    product = figures(checks["logprobs"])["matmul_fp32, product"]
    assert product["status"] == "failed" and product["value"] == pytest.approx(0.01, rel=0.05)
    assert checks["determinism"]["status"] == "passed"
    assert "1 passed, 2 failed, 0 skipped" in printed


def test_a_new_process_under_torchrun(tmp_path, broken):
    """A check raises; the next one runs in a process that joins the world once more."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "1"]
    names = ["decode", "determinism"]
    code, checks, _, _ = run(tmp_path, "--only", *names, launcher=launcher, **broken)
    assert code == 1 and list(checks) == names
    assert checks["decode"]["error"] == "RuntimeError: CUDA error: pretended"
    assert "in broken" in checks["decode"]["trace"]
    assert checks["determinism"]["status"] == "passed"


def test_several_processes_are_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, TOOL, "--output", str(tmp_path / "found.json")],
        env=os.environ | {"WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "--nproc-per-node 1" in done.stderr, done.stderr


WORKER = """
import json, os, sys, time
channel = os.fdopen(int(sys.argv[2]), "w")
name = sys.argv[4]
for message in ({"begin": name}, {"figure": {"name": "a", "value": 1.0}}):
    channel.write(json.dumps(message) + "\\n")
    channel.flush()
time.sleep(60)
"""


def test_a_check_that_hangs_is_ended_and_what_comes_later_is_skipped(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command, lines = [sys.executable, str(tmp_path / "worker.py")], []
    found = list(Supervisor(command, 0.05, lines.append).run(["decode", "attention"]))
    assert [result.entry.name for result in found] == ["attention", "decode"]
    assert [result.status for result in found] == ["failed", "skipped"]
    assert found[0].error == "it took too long and was killed"
    assert found[0].figures == [Figure(name="a", value=1.0)]
    assert found[1].as_json()["skipped"] == "the time for all checks is over"


def test_the_status_of_figures():
    kinds = {
        "passed": Figure(name="a", value=1.0, at_most=1.0, at_least=1.0),
        "failed": Figure(name="b", value=float("nan"), at_most=1.0),
        "skipped": Figure(name="c", skipped="why"),
        "measured": Figure(name="d", value=float("inf")),
    }
    assert {name: figure.status for name, figure in kinds.items()} == {n: n for n in kinds}
    assert Figure(name="e", value="x", verdict=False).status == "failed"
    assert json.loads(json.dumps(kinds["failed"].as_json(), allow_nan=False))["value"] == "nan"
    passed, failed, skipped, measured = kinds.values()
    assert status_of([passed, skipped], None) == "passed"
    assert status_of([measured, skipped], None) == "passed"
    assert status_of([skipped], None) == "skipped"
    assert status_of([passed, failed], None) == "failed"
    assert status_of([passed], "it raised") == "failed"


def test_gaps_of_a_timeline(monkeypatch):
    """Two kernels overlap, the third comes after a gap; an operator and a range do not count."""

    def event(start, end, name="kernel", device="CPU", parent=None, user=False):
        return SimpleNamespace(
            name=name,
            device_type=getattr(profiling.DeviceType, device),
            cpu_parent=parent,
            is_user_annotation=user,
            time_range=SimpleNamespace(start=start, end=end),
        )

    events = [
        event(20, 30, "Memcpy HtoD"), event(0, 6), event(4, 10), event(1, 2, parent="outer"),
        event(0, 99, device="CUDA"), event(0, 99, user=True),
    ]  # fmt: skip
    monkeypatch.setattr(profiling, "_record", lambda work, activities: events)
    found = profiling.timeline(lambda: None)
    assert found == profiling.Timeline(kernels=2, copies=1, busy=20, span=30, longest_gap=10)
    assert found.idle == pytest.approx(1 / 3)
