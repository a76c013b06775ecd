"""The servers of a run: where they run, how they start, and that none of them outlives its rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rpp.config import Config, ModelConfig, RolloutConfig, VllmConfig
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.rollout.vllm import environment, supervisor
from megatron_rpp.rollout.vllm.buckets import BUCKET_BYTES, plan
from megatron_rpp.rollout.vllm.fleet import Host, Place, gpus_of, places
from megatron_rpp.rollout.vllm.servers import Child, Site, cache_bytes, command
from megatron_rpp.rollout.vllm.servers import environment as variables

PYTHON = sys.executable
NODES = [Host("a", [0, 1, 2, 3], [0, 2]), Host("b", [4, 5, 6, 7], [4, 6])]


def config(**settings):
    vllm = VllmConfig(**({"python": PYTHON} | settings))
    return Config(rollout=RolloutConfig(engine="vllm", vllm=vllm, max_batch=64))


def test_each_replica_has_a_server_on_its_node():
    assert places(NODES, None) == [
        Place("a", 0, 0), Place("a", 1, 1), Place("b", 0, 4), Place("b", 1, 5),
    ]  # fmt: skip


def test_a_number_of_servers_is_spread_over_the_nodes():
    assert [(p.host, p.owner) for p in places(NODES, 2)] == [("a", 0), ("b", 4)]
    assert [p.owner for p in places(NODES[:1], 6)] == [0, 1, 2, 3, 0, 1]
    with pytest.raises(ConfigError, match="divisible by the 2 nodes.*got 3"):
        places(NODES, 3)


def test_a_node_on_which_no_replica_begins_needs_no_server():
    spanning = [Host("a", [0, 1], [0]), Host("b", [2, 3], [])]
    assert places(spanning, None) == [Place("a", 0, 0)]


def test_servers_share_the_gpus_of_the_ranks_or_take_those_after_them():
    eight = [str(i) for i in range(8)]
    assert gpus_of(eight, 8, 1, tensor=4, transport="ipc") == ["4", "5", "6", "7"]
    assert gpus_of(eight, 4, 0, tensor=2, transport="nccl") == ["4", "5"]
    assert gpus_of(["6", "7"], 1, 0, tensor=1, transport="shared") == ["7"]
    with pytest.raises(ConfigError, match="the 0 GPUs that its 8 ranks leave"):
        gpus_of(eight, 8, 0, tensor=1, transport="nccl")
    with pytest.raises(ConfigError, match="server 3 of tensor size 4"):
        gpus_of(eight, 8, 2, tensor=4, transport="ipc")


def test_the_environment_is_not_that_of_the_ranks():
    given = {"RANK": "3", "MASTER_ADDR": "a", "TORCHELASTIC_RUN_ID": "1", "PYTHONPATH": "/ours",
             "OMP_NUM_THREADS": "1", "PATH": "/bin", "NCCL_DEBUG": "INFO"}  # fmt: skip
    found = variables(given, config(), on_cpu=True, threads=2, gpus=None)
    assert {"PATH", "NCCL_DEBUG"} <= found.keys()
    assert not {"RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES"} & found.keys()
    assert found["OMP_NUM_THREADS"] == "2"
    inside = Path(found["PYTHONPATH"])
    # A module of this name would hide that of a library from vLLM.
    assert sorted(path.name for path in inside.glob("*.py")) == ["__init__.py", "rpp_vllm.py"]
    assert (
        variables(given, config(), on_cpu=False, threads=2, gpus="4,5")["CUDA_VISIBLE_DEVICES"]
        == "4,5"
    )


def test_the_command_depends_on_device_and_transport():
    model = Path("/model")
    on_cpu = command(config(), model, port=1, on_cpu=True, host="127.0.0.1")
    assert "--enforce-eager" in on_cpu and "--host=127.0.0.1" in on_cpu
    on_gpu = command(
        config(transport="ipc", memory_share=0.4, arguments=["--seed=3"]),
        model, port=1, on_cpu=False, host="127.0.0.1",
    )  # fmt: skip
    assert {"--enable-sleep-mode", "--gpu-memory-utilization=0.4"} <= set(on_gpu)
    assert on_gpu[-1] == "--seed=3" and "--enforce-eager" not in on_gpu


def test_the_cache_of_a_cpu_holds_the_largest_batch():
    model = ModelConfig(layers=2, hidden=64, heads=4, kv_heads=2, max_length=130)
    settings = config(tensor=2)
    whole = Config(model=model, rollout=settings.rollout)
    # 64 sequences × 2 blocks × 128 tokens × 2 layers × (key, value) × 1 head × 16 × 4 bytes
    assert cache_bytes(whole) == 64 * 256 * 2 * 2 * 16 * 4


def test_buckets_hold_all_rows_within_their_limit():
    from megatron_rpp.hf.families import rows_of

    settings = ModelConfig(layers=8, hidden=4096, ffn_hidden=14336, heads=32).architecture(32000)
    rows = rows_of("LlamaForCausalLM", settings)
    buckets = plan(rows, settings, 2)
    assert [name for bucket in buckets for name in bucket.names] == [n for r in rows for n in r.hf]
    assert sum(bucket.rows for bucket in buckets) == len(rows)
    assert len(buckets) > 3 and all(bucket.bytes <= BUCKET_BYTES for bucket in buckets)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("#!/bin/sh\necho null\n", "has no vLLM: install"),
        ("#!/bin/sh\necho '\"0.11.2\"'\n", "has vLLM 0.11.2, which has not been tested"),
        ("#!/bin/sh\necho broken >&2; exit 1\n", "fails \\(broken\\)"),
    ],
)
def test_an_environment_without_a_tested_vllm_is_refused(tmp_path, program, message):
    python = tmp_path / "python"
    python.write_text(program)
    python.chmod(0o755)
    with pytest.raises(ConfigError, match=message):
        environment.check_installed(str(python))


def test_a_python_that_is_missing_is_refused():
    with pytest.raises(ConfigError, match="cannot be started .No such file"):
        environment.check_installed("/no/such/python")


def test_this_environment_has_no_vllm():
    with pytest.raises(ConfigError, match="has no vLLM"):
        environment.check_installed(PYTHON)


def test_a_server_with_another_model_is_refused():
    expected = environment.expected_model(config(), 64)
    environment.check_same_model("http://a:1", expected, expected)
    with pytest.raises(ConfigError, match="layers is 9 there, 4 here.*vllm_server.py"):
        environment.check_same_model("http://a:1", expected, expected | {"layers": 9})


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_transports_of_gpus_are_refused_on_a_cpu(transport):
    environment.check_transport("shared", on_cpu=True)
    with pytest.raises(ConfigError, match=f"transport {transport} needs GPUs"):
        environment.check_transport(transport, on_cpu=True)


STUBBORN = """
import os, signal, subprocess, sys, time
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(300)
"""


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]
    except FileNotFoundError:
        return False


def until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_all_processes_of_a_server_end_with_a_rank_that_is_killed(tmp_path):
    """The server ignores SIGTERM and has a child; the rank gets SIGKILL."""
    weights = tmp_path / "weights"
    weights.mkdir()
    rank = """
import os, subprocess, sys, time
path = sys.argv[1]
command = [sys.executable, path, str(os.getpid()), sys.argv[2], sys.executable, "-c", sys.argv[3]]
subprocess.Popen(command, start_new_session=True)
time.sleep(300)
"""
    source = Path(supervisor.__file__).read_text().replace("GRACE = 10.0", "GRACE = 0.3")
    script = tmp_path / "supervisor.py"
    script.write_text(source)
    process = subprocess.Popen(
        [PYTHON, "-c", rank, str(script), str(weights), STUBBORN], stdout=subprocess.PIPE
    )
    server, child = map(int, process.stdout.readline().split())
    assert alive(server) and alive(child)
    process.kill()
    process.wait()
    until(lambda: not alive(server) and not alive(child) and not weights.exists())


def test_a_server_ends_when_its_owner_lets_it_go(tmp_path):
    site = Site(config(), tmp_path, tmp_path / "weights", on_cpu=True, servers=1)
    child = Child(site, name="vLLM server 0", gpus=None, log=tmp_path / "logs/server.log")
    # This environment has no vLLM, so the server ends at once, and its log says why.
    until(lambda: not child.alive)
    assert "No module named" in child.tail() and str(tmp_path / "logs/server.log") in child.tail()
    child.end()


def test_a_supervisor_that_is_told_to_end_leaves_nothing(tmp_path):
    command = [PYTHON, supervisor.__file__, str(os.getpid()), str(tmp_path / "weights")]
    quiet = "import os, time; print(os.getpid(), flush=True); time.sleep(300)"
    process = subprocess.Popen([*command, PYTHON, "-c", quiet], stdout=subprocess.PIPE)
    server = int(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    process.wait(10)
    assert not alive(server)
