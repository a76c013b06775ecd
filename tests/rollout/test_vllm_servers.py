"""The servers of a run: where they run, how they start, and that none of them outlives its rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer

import pytest

from megatron_rpp.config import Config, ModelConfig, RolloutConfig, VllmConfig
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.parallel import groups
from megatron_rpp.rollout.vllm import environment, supervisor
from megatron_rpp.rollout.vllm.api import Server
from megatron_rpp.rollout.vllm.buckets import BUCKET_BYTES, plan
from megatron_rpp.rollout.vllm.fleet import Host, Place, gpus_of, places
from megatron_rpp.rollout.vllm.servers import Child, Site, cache_bytes, command, socket_folder
from megatron_rpp.rollout.vllm.servers import environment as variables
from megatron_rpp.runtime.engine_check import check_engine

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
    assert found["OMP_NUM_THREADS"] == "2" and found["PYTHONSAFEPATH"] == "1"
    inside = Path(found["PYTHONPATH"])
    # A module of this name would hide that of a library from vLLM.
    assert sorted(path.name for path in inside.glob("*.py")) == ["__init__.py", "rpp_vllm.py"]
    assert (
        variables(given, config(), on_cpu=False, threads=2, gpus="4,5")["CUDA_VISIBLE_DEVICES"]
        == "4,5"
    )


def test_the_command_depends_on_device_and_transport():
    model = Path("/model")
    on_cpu = command(config(), model, listens={"uds": "/run/s"}, on_cpu=True)
    assert "--enforce-eager" in on_cpu and "--uds=/run/s" in on_cpu
    on_gpu = command(
        config(transport="ipc", memory_share=0.4, arguments=["--seed=3"]),
        model, listens={"host": "a", "port": 1}, on_cpu=False,
    )  # fmt: skip
    assert {"--enable-sleep-mode", "--gpu-memory-utilization=0.4"} <= set(on_gpu)
    assert {"--host=a", "--port=1"} <= set(on_gpu)
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
        ('#!/bin/sh\necho "\\"with ${PYTHONHOME:-no} home\\""\n', "has vLLM with no home"),
    ],
)
def test_an_environment_without_a_tested_vllm_is_refused(tmp_path, monkeypatch, program, message):
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))  # of our environment, not of vLLM's
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


def test_a_run_that_starts_its_servers_is_told_what_was_found(tmp_path):
    """`python` stands for an environment with vLLM: it answers each question as that would."""
    python = tmp_path / "python"
    answers = """case $2 in *get_supported_archs*) echo '["LlamaForCausalLM"]';; *) echo '"0.32.0"';; esac"""
    python.write_text(f"#!/bin/sh\n{answers}\n")
    python.chmod(0o700)
    ours = config(python=str(python), dir=str(tmp_path))
    other = replace(ours, model=ModelConfig(qkv_bias=True))
    groups.start(**ours.parallel.sizes(), seed=3)
    try:
        for thorough in (False, True):
            found = check_engine(ours, 64, thorough=thorough)
            assert found == f"vLLM 0.32.0 in {python}, LlamaForCausalLM"
        with pytest.raises(ConfigError, match="does not know Qwen2ForCausalLM"):
            check_engine(other, 64, thorough=True)
    finally:
        groups.stop()


def test_a_server_with_another_model_is_refused():
    expected = environment.expected_model(config(), 64)
    environment.check_same_model("http://a:1", expected, expected)
    for key, value, message in (
        ("num_hidden_layers", 9, "layers is 9 there, 4 here.*vllm_server.py"),
        ("num_key_value_heads", 2, "kv_heads is 2 there, 4 here"),
        ("rope_theta", 5e5, "rope_theta is 500000.0 there, 10000.0 here"),
        ("rms_norm_eps", 1e-6, "norm_eps is 1e-06 there, 1e-05 here"),
        ("head_dim", 64, "head_dim is 64 there, 32 here"),
    ):
        other = expected | {"config": expected["config"] | {key: value}}
        with pytest.raises(ConfigError, match=message):
            environment.check_same_model("http://a:1", expected, other)
    with pytest.raises(ConfigError, match="max_length is 9 there, 256 here"):
        environment.check_same_model("http://a:1", expected, expected | {"max_length": 9})
    with pytest.raises(ConfigError, match="does not tell its model"):
        environment.check_same_model("http://a:1", expected, {})


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
    folders = [tmp_path / "weights", tmp_path / "socket"]
    for folder in folders:
        folder.mkdir()
    rank = """
import os, subprocess, sys, time
path = sys.argv[1]
command = [sys.executable, path, str(os.getpid()), *sys.argv[2:4], sys.executable, "-c", sys.argv[4]]
subprocess.Popen(command, start_new_session=True)
time.sleep(300)
"""
    source = Path(supervisor.__file__).read_text().replace("GRACE = 10.0", "GRACE = 0.3")
    script = tmp_path / "supervisor.py"
    script.write_text(source)
    process = subprocess.Popen(
        [PYTHON, "-c", rank, str(script), *map(str, folders), STUBBORN], stdout=subprocess.PIPE
    )
    server, child = map(int, process.stdout.readline().split())
    assert alive(server) and alive(child)
    process.kill()
    process.wait()
    until(lambda: not any(map(alive, (server, child))) and not any(f.exists() for f in folders))


def test_a_server_ends_when_its_owner_lets_it_go(tmp_path):
    site = Site(config(), tmp_path, tmp_path / "weights", on_cpu=True, servers=1)
    log = tmp_path / "logs/server.log"
    log.parent.mkdir()
    log.write_text("of an earlier start\n")
    child = Child(site, name="vLLM server 0", gpus=None, log=log)
    folder = Path(child.server.address).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    # This environment has no vLLM, so the server ends at once, and its log says why.
    until(lambda: not child.alive)
    assert "No module named" in child.tail() and str(log) in child.tail()
    assert "earlier" not in child.tail()
    child.end()
    assert not folder.exists()


def test_the_path_of_a_socket_is_short(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert Path(socket_folder()).parent == tmp_path
    long = tmp_path / ("long" * 20)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = Path(socket_folder())
    assert folder.parent == Path("/tmp") and not list(long.iterdir())
    folder.rmdir()


def test_a_server_answers_on_its_socket(tmp_path):
    class Answer(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"path": "%s"}' % self.path.encode())

        def log_message(self, *arguments):
            pass

    with UnixStreamServer(str(tmp_path / "socket"), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert Server(str(tmp_path / "socket")).ask("/here", timeout=10) == {"path": "/here"}


def test_a_supervisor_that_is_told_to_end_leaves_nothing(tmp_path):
    weights, folder = tmp_path / "weights", tmp_path / "socket"
    weights.mkdir()
    folder.mkdir()
    command = [PYTHON, supervisor.__file__, str(os.getpid()), str(weights), str(folder)]
    quiet = "import os, time; print(os.getpid(), flush=True); time.sleep(300)"
    process = subprocess.Popen([*command, PYTHON, "-c", quiet], stdout=subprocess.PIPE)
    server = int(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    process.wait(10)
    assert not alive(server) and not folder.exists()
    assert weights.exists(), "its rank lives, and may be writing"
