"""New weights on their way to servers that fail: no rank waits for ever, and what can go on does.

The ranks, their weights and the process groups are real; the server (vllm_server.py) speaks vLLM's
protocol, and the one of transport nccl receives what is broadcast, through gloo. vLLM itself is in
tests/vllm.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_rpp.config import (
    Config,
    LoggingConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    VllmConfig,
)
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.lifecycle.exit_codes import RunFailure
from megatron_rpp.parallel import groups
from megatron_rpp.records import Request, Sampling
from megatron_rpp.rollout.engine import Abandoned
from megatron_rpp.rollout.vllm import engine as engines
from megatron_rpp.rollout.vllm import environment, weights
from megatron_rpp.rollout.vllm.api import Server
from megatron_rpp.rollout.vllm.broadcast import Broadcast
from megatron_rpp.rollout.vllm.buckets import plan_of
from megatron_rpp.rollout.vllm.engine import VllmEngine
from megatron_rpp.rollout.vllm.weights import SharedFiles, weights_folder
from megatron_rpp.runtime.engine_check import check_engine
from megatron_rpp.runtime.policy import build_policy
from tests.distributed import run_ranks
from tests.rollout.vllm_server import TrainedVllm, serving

PYTHON = sys.executable
VOCAB = 64
MODEL = ModelConfig(layers=2, hidden=32, ffn_hidden=48, max_length=96, vocab_size=VOCAB)
REQUESTS = [Request((5, 6, i), i) for i in range(4)]
SHORT = Sampling(max_new_tokens=3)


class NoEnd:
    eos_ids = ()
    vocab_size = VOCAB


def config_of(folder, parallel=None, **vllm):
    settings = VllmConfig(
        **({"python": None if "urls" in vllm else PYTHON, "retries": 1, "dir": str(folder)} | vllm)
    )
    return Config(
        model=MODEL,
        parallel=parallel or ParallelConfig(),
        rollout=RolloutConfig(engine="vllm", vllm=settings),
        logging=LoggingConfig(dir=str(folder)),
    )


def policy_of(config):
    groups.start(**config.parallel.sizes(), seed=3)
    return build_policy(config, config.optimizer, VOCAB)


def never():
    return False


def write_where_rank_0_cannot(rank, folder):
    policy = policy_of(config_of(folder, ParallelConfig(tensor=2)))
    weights.FILE_BYTES = 1  # a file for each parameter: rank 0 fails in the middle
    found = []
    for name in ("blocked", "a file/below"):
        try:
            SharedFiles(folder / name, 20.0).push(policy.model, {}, "v1", stop=never)
        except RunFailure as error:
            found.append(str(error))
    groups.destroy()
    return found


def test_a_rank_that_cannot_write_ends_the_run_on_all_ranks(tmp_path):
    # A directory in the place of the file: safetensors raises its own error, no OSError.
    (tmp_path / "blocked/00000-00000.safetensors").mkdir(parents=True)
    (tmp_path / "a file").touch()
    one, other = run_ranks(write_where_rank_0_cannot, 2, tmp_path, tmp_path, timeout=60)
    assert len(one) == 2 and one == other
    assert all("cannot be written" in text and "rollout.vllm.dir" in text for text in one)


class Receiving(TrainedVllm):
    """A server of one worker that joins the trainer's process group; some paths fail once."""

    def __init__(self, *faults):
        super().__init__({}, seed=0, steps=1, samples=1)
        self.calls, self._faults, self.group, self.received = [], list(faults), None, b""

    def control(self, path, body):
        self.calls.append(path)
        if path in self._faults:
            self._faults.remove(path)
            return None
        if path == "/init_weight_transfer_engine":
            info = body["init_info"]
            limit = timedelta(seconds=info["seconds"])
            store = dist.TCPStore(info["host"], info["port"], is_master=False, timeout=limit)
            self.group = dist.ProcessGroupGloo(store, info["first_rank"], 2, limit)
        elif path == "/update_weights":
            info = body["update_info"]
            values = sum(torch.Size(shape).numel() for shape in info["shapes"])
            buffer = torch.empty(values * 4, dtype=torch.uint8)
            self.group.broadcast(buffer, 0).wait()
            self.received += bytes(buffer.numpy())
        elif path == "/finish_weight_update":
            self.version = body["weight_version"]
        return {}


def broadcast_twice(rank, folder, address):
    policy = policy_of(config_of(folder, ParallelConfig(tensor=2)))
    transport = Broadcast(1, 1, 4.0)  # gloo ends a broadcast at its time limit only
    servers = {0: Server(address)} if rank == 0 else {}
    start = time.monotonic()
    first = transport.push(policy.model, servers, "v1", stop=never)
    seconds = time.monotonic() - start
    transport._seconds = 30.0
    second = transport.push(policy.model, servers, "v2", stop=never)
    size = sum(bucket.bytes for bucket in plan_of(policy.model)[0])
    groups.destroy()
    return first, seconds, second, size


@pytest.mark.parametrize(
    "fault", ["/init_weight_transfer_engine", "/start_weight_update", "/update_weights"]
)
def test_a_failing_server_ends_a_broadcast_and_the_next_one_succeeds(tmp_path, fault):
    with serving(Receiving(fault)) as server:
        address = f"127.0.0.1:{server.server_port}"
        (one, seconds, again, size), (other, _, _, _) = run_ranks(
            broadcast_twice, 2, tmp_path, tmp_path, address, timeout=90
        )
    assert "the broadcast of new weights failed" in one[0] and fault in one[0]
    assert other == {} and again == {}
    assert seconds < 20
    assert len(server.received) == size and server.version == "v2"


@contextmanager
def engine_of(folder, *, policy=None, **vllm):
    """The engine in a world of one, and what it has logged."""
    config, logged = config_of(folder, **vllm), []
    policy = policy or policy_of(config)
    try:
        yield VllmEngine(config, policy, NoEnd(), log=logged.append), logged
    finally:
        groups.stop()


@pytest.fixture
def short_pauses(monkeypatch):
    monkeypatch.setattr(engines, "_FIRST_PAUSE", 0.05)


class Trained(TrainedVllm):
    """A server whose updates fail `fails` times."""

    def __init__(self, fails=0):
        super().__init__({}, seed=0, steps=1, samples=1)
        self.fails, self.ended, self.hangs = fails, 0, threading.Event()
        self.hangs.set()

    def control(self, path, body):
        if path == "/collective_rpc" and body["method"] == "rpp_end_update":
            self.ended += 1
        if path == "/update_weights":
            self.hangs.wait(30)
            if self.fails:
                self.fails -= 1
                return None
        return super().control(path, body)


def generate(engine, **options):
    return engine.generate(REQUESTS, SHORT, seed=1, step=0, **options)


def test_a_url_that_does_not_take_weights_is_left_out_until_the_next_push(tmp_path, short_pauses):
    with serving(Trained(fails=1)) as failing, serving(Trained()) as well:
        with engine_of(tmp_path, urls=[failing.url, well.url]) as (engine, logged):
            assert len(generate(engine)) == len(REQUESTS)
            assert not failing.bodies and len(well.bodies) == len(REQUESTS)
            assert len(logged) == 1 and "did not take new weights" in logged[0]
            engine._policy.scheduler.step(increment=1)  # stands for an update
            generate(engine)
        assert failing.bodies, "it has taken the next weights"
        assert failing.ended == 2, "an unfinished update is ended before the next"


def test_urls_that_all_fail_end_the_run_after_pauses(tmp_path, short_pauses):
    with serving(Trained(fails=2)) as server, engine_of(tmp_path, urls=[server.url]) as (engine, _):
        with pytest.raises(RunFailure, match="did not take new weights.*500"):
            generate(engine)
        assert server.fails == 0 and len(generate(engine)) == len(REQUESTS)


def test_a_stop_breaks_off_a_push(tmp_path):
    with serving(Trained()) as server, engine_of(tmp_path, urls=[server.url]) as (engine, _):
        server.hangs.clear()
        start = time.monotonic()
        with pytest.raises(Abandoned):
            generate(engine, stop=lambda: time.monotonic() - start > 0.3)
        assert time.monotonic() - start < 10
        server.hangs.set()


def test_a_push_has_one_time_limit(tmp_path, short_pauses):
    with (
        serving(Trained()) as server,
        engine_of(tmp_path, urls=[server.url], start_timeout=2.0, retries=0) as (engine, _),
    ):
        server.hangs.clear()
        with pytest.raises(RunFailure, match="no answer within"):
            generate(engine)
        server.hangs.set()


def test_a_server_that_does_not_start_is_started_again(tmp_path):
    """This environment has no vLLM, so it ends at once."""
    with engine_of(tmp_path, retries=2) as (engine, logged):
        with pytest.raises(RunFailure, match="is lost: it ended while it started(.|\n)*No module"):
            generate(engine)
        assert len(logged) == 2
    assert (tmp_path / "vllm/server_000.log").read_text().count("No module named") == 3


def test_weights_of_runs_that_are_gone_are_removed(tmp_path):
    with engine_of(tmp_path):
        own = weights_folder(tmp_path, "run")
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        left, others = (
            tmp_path / own.name.replace(f"-{os.getpid()}-", f"-{pid}-") for pid in (gone.pid, 1)
        )
        for folder in (left, others):
            folder.mkdir()
        weights_folder(tmp_path, "another")
        assert not left.exists() and others.exists()


def test_only_this_user_reads_the_weights(tmp_path):
    modes = []

    class Looking(Trained):
        def control(self, path, body):
            if path == "/update_weights":
                folder = Path(body["update_info"]["paths"][0]).parent
                modes.append(folder.stat().st_mode & 0o777)
            return super().control(path, body)

    with serving(Looking()) as server, engine_of(tmp_path, urls=[server.url]) as (engine, _):
        generate(engine)
    assert modes == [0o700]
    assert not list(tmp_path.glob("megatron_rpp-*"))


def test_a_url_with_another_directory_is_refused(tmp_path):
    with serving(Trained()) as server:
        config = config_of(tmp_path, urls=[server.url])
        (tmp_path / "seen").touch()
        environment.check_sees(config, tmp_path / "seen")
        with pytest.raises(ConfigError, match="rollout.vllm.dir .* is another directory"):
            environment.check_sees(config, tmp_path / "not seen")


def test_a_url_that_answers_in_another_form_is_refused(tmp_path):
    class Other(Trained):
        def control(self, path, body):
            return {"results": []}

    refusal = pytest.raises(ConfigError, match="does not answer as a server of tools/vllm_server")
    with serving(Other()) as server, refusal:
        environment.check_urls(config_of(tmp_path, urls=[server.url]), VOCAB)


def test_a_directory_that_ranks_or_servers_do_not_share_is_refused_at_the_start(tmp_path):
    class Blind(Trained):
        def _call(self, method, *arguments):
            return {"seen": False} if method == "rpp_sees" else super()._call(method, *arguments)

    (tmp_path / "a file").touch()
    with serving(Trained()) as server, serving(Blind()) as blind:
        server.model = blind.model = environment.expected_model(config_of(tmp_path), VOCAB)
        good = config_of(tmp_path, urls=[server.url], dir=str(tmp_path / "new"))
        groups.start(**good.parallel.sizes(), seed=3)
        try:
            assert check_engine(good, VOCAB) == "1 server(s) with this model"
            assert not list((tmp_path / "new").iterdir())
            bad = config_of(tmp_path, urls=[blind.url])
            with pytest.raises(ConfigError, match="is another directory for the server at"):
                check_engine(bad, VOCAB)
            bad = config_of(tmp_path, urls=[server.url], dir=str(tmp_path / "a file/below"))
            with pytest.raises(ConfigError, match="cannot be written"):
                check_engine(bad, VOCAB)
        finally:
            groups.stop()
