"""Rollouts on the real vLLM, on a CPU: `bash tests/vllm.sh`. Skipped unless VLLM_PYTHON is set.

Everything is real: ranks, servers, weights. The sizes are small, with heads of 32 channels, the least
that vLLM's attention on CPUs knows.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import replace

import pytest
import torch

from megatron_rpp.config import (
    Config,
    LoggingConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    VllmConfig,
)
from megatron_rpp.lifecycle.exit_codes import RunFailure
from megatron_rpp.model.initialization import global_name
from megatron_rpp.model.language_model import chunks
from megatron_rpp.parallel import groups
from megatron_rpp.records import Request, Sampling
from megatron_rpp.rollout.engine import MegatronEngine
from megatron_rpp.rollout.vllm.engine import VllmEngine
from megatron_rpp.runtime.policy import build_policy
from tests.distributed import run_ranks
from tests.small_run import arguments, make_data
from tests.whole_runs import rows

PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="no vLLM (tests/vllm.sh sets VLLM_PYTHON)"),
]
VOCAB = 97
SECONDS = 900
GREEDY = Sampling(24, temperature=0.0)
# Prompts longer than a block of vLLM's cache (128 tokens), and twice the same: a prefix cache that a
# push does not empty would show.
LONG = tuple((7 * i) % 89 for i in range(140))
PROMPTS = [LONG, LONG, (*LONG, 3), (1, 2, 3), (4, 5)]
REQUESTS = [Request(prompt, i) for i, prompt in enumerate(PROMPTS)]
MODELS = {
    "llama": ModelConfig(),
    "qwen2, tied": ModelConfig(qkv_bias=True, tied_embeddings=True),
    "qwen3": ModelConfig(qk_norm=True),
}


class NoEnd:
    """A tokenizer without end tokens, so that no answer ends early."""

    eos_ids = ()
    vocab_size = VOCAB


def config_of(folder, model="llama", parallel=None, **vllm):
    sizes = {"layers": 2, "hidden": 128, "ffn_hidden": 176, "heads": 4, "kv_heads": 2,
             "max_length": 192, "init_std": 0.2, "vocab_size": VOCAB}  # fmt: skip
    settings = VllmConfig(**({"python": PYTHON, "retries": 2} | vllm))
    return Config(
        model=replace(MODELS[model], **sizes),
        parallel=parallel or ParallelConfig(),
        rollout=RolloutConfig(engine="vllm", vllm=settings, max_batch=64),
        logging=LoggingConfig(dir=str(folder)),
    )


def start(config):
    groups.start(**config.parallel.sizes(), seed=3)
    policy = build_policy(config, config.optimizer, VOCAB)
    ours = MegatronEngine(policy.model, NoEnd(), 64)
    return policy, VllmEngine(config, policy, NoEnd(), log=print), ours


def change(policy, seed):
    """Stands for an update: new weights, equal on all ranks that have a copy of them."""
    with torch.no_grad():
        for chunk in chunks(policy.model):
            for name, parameter in chunk.named_parameters():
                key = zlib.crc32(f"{seed}/{global_name(chunk, name)}".encode())
                generator = torch.Generator().manual_seed(key)
                parameter.mul_(1 + 0.2 * torch.randn((), generator=generator))
    policy.scheduler.step(increment=1)


def compare(vllm, ours, requests=REQUESTS, sampling=GREEDY):
    """Both engines' greedy answers are equal; returns the tokens."""
    found = vllm.generate(requests, sampling, seed=1, step=2)
    expected = ours.generate(requests, sampling, seed=1, step=2)
    assert [g.tokens for g in found] == [g.tokens for g in expected]
    for one, other in zip(found, expected):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.truncated == other.truncated
    return [g.tokens for g in found]


def pushes(rank, folder, model, parallel, vllm):
    policy, engine, ours = start(config_of(folder, model, parallel, **vllm))
    answers = [compare(engine, ours)]
    for seed in range(3):
        change(policy, seed)
        answers.append(compare(engine, ours))
    assert len({str(answer) for answer in answers}) == 4, "the weights did not change the answers"
    assert answers[-1] == compare(engine, ours), "without an update nothing is pushed"
    assert engine._pushes == 4
    groups.destroy()


@pytest.mark.parametrize(
    ("model", "parallel", "vllm"),
    [
        ("llama", ParallelConfig(pipeline=2), {"tensor": 2}),
        ("qwen2, tied", ParallelConfig(tensor=2), {}),
        ("qwen2, tied", ParallelConfig(pipeline=2), {"transport": "nccl", "tensor": 2}),
        ("qwen3", ParallelConfig(), {"replicas": 2}),
    ],
)
def test_greedy_answers_are_megatrons_after_each_push(tmp_path, model, parallel, vllm):
    """Transport nccl is refused on a CPU; here its broadcast goes through gloo."""
    run_ranks(pushes, 2, tmp_path, tmp_path, model, parallel, vllm, timeout=SECONDS)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """(policy, vLLM's engine, Megatron's engine, folder) in a world of one."""
    folder = tmp_path_factory.mktemp("single")
    yield *start(config_of(folder, seconds_per_token=0.0, timeout=60)), folder
    groups.stop()


def child_of(engine):
    return next(iter(engine.fleet._children.values()))


def workers(engine):
    """The processes of the server, without the supervisor."""
    import psutil

    return psutil.Process(child_of(engine)._process.pid).children(recursive=True)


MANY = [Request((1 + i // 4, 2, 3), i) for i in range(64)]
SAMPLED = Sampling(150, temperature=0.9, top_p=0.95)


def test_samples_are_the_same_alone_and_together(single):
    _, engine, _, _ = single
    whole = engine.generate(MANY[:8], SAMPLED, seed=5, step=6)
    alone = engine.generate(MANY[3:4], SAMPLED, seed=5, step=6)
    assert alone[0].tokens == whole[3].tokens
    other = engine.generate(MANY[:8], SAMPLED, seed=5, step=7)
    assert all(a.tokens != b.tokens for a, b in zip(whole, other))
    assert len({tuple(g.tokens) for g in whole}) == 8


@pytest.mark.parametrize("victim", ["the worker", "the front end", "the supervisor"])
def test_a_killed_server_costs_time_and_no_sample(single, victim):
    _, engine, _, _ = single
    expected = engine.generate(MANY, SAMPLED, seed=5, step=6)
    processes = workers(engine)
    pid = {
        "the worker": processes[-1].pid,
        "the front end": processes[0].pid,
        "the supervisor": child_of(engine)._process.pid,
    }[victim]
    killer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
    killer.start()
    found = engine.generate(MANY, SAMPLED, seed=5, step=6)
    assert [g.tokens for g in found] == [g.tokens for g in expected]
    assert not killer.is_alive()
    deadline = time.monotonic() + 15
    while any(process.is_running() and process.status() != "zombie" for process in processes):
        assert time.monotonic() < deadline, "processes of the killed server are left"
        time.sleep(0.1)


def test_a_stopped_server_is_lost_after_its_time(single):
    """SIGSTOP: the server neither answers nor dies."""
    _, engine, _, _ = single
    expected = engine.generate(MANY, SAMPLED, seed=5, step=6)
    limits = engine._limits
    engine._limits = replace(limits, timeout=8)
    for process in workers(engine):
        process.suspend()
    found = engine.generate(MANY, SAMPLED, seed=5, step=6)
    engine._limits = limits
    assert [g.tokens for g in found] == [g.tokens for g in expected]


def test_a_server_that_cannot_start_ends_the_run_with_its_log(tmp_path, single):
    broken = config_of(tmp_path, arguments=["--no-such-flag"])
    engine = VllmEngine(broken, single[0], NoEnd(), log=print)
    with pytest.raises(RunFailure, match="server 0.*ended while it started(.|\n)*no-such-flag"):
        engine.generate(MANY[:1], SAMPLED, seed=5, step=6)


def command(data, run, **settings):
    vllm = {"rollout__engine": "vllm", "rollout__vllm__python": PYTHON,
            "algorithm__rollout_correction": "cap", "model__hidden": 128,
            "rollout__vllm__dir": run}  # fmt: skip
    words = arguments(data, run, **(vllm | settings))
    return [sys.executable, "-m", "megatron_rpp.torchrun", "--nproc-per-node", "2", "-m",
            "megatron_rpp.train", *words]  # fmt: skip


def vllm_processes(mark):
    """Processes of servers whose model is in `mark`, with their children."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if str(mark) in words and "vllm" in words:
            found += [process, *process.children(recursive=True)]
    return found


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
    assert vllm_processes(tmp_path)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while vllm_processes(tmp_path) or list(run.glob("megatron_rpp-*")):
        assert time.monotonic() < deadline, vllm_processes(tmp_path)
        time.sleep(0.2)


@pytest.fixture
def server(tmp_path):
    """A server that tools/vllm_server.py has started: (its URL, the settings of a run)."""
    from megatron_rpp.rollout.vllm.api import Server
    from megatron_rpp.rollout.vllm.servers import _free_port

    make_data(tmp_path)
    port = _free_port()
    words = command(tmp_path, tmp_path / "run")[6:]
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


def test_the_quickstart_learns(tmp_path):
    """The warm start, then five steps of REINFORCE++ on vLLM."""
    folder = {name: tmp_path / name for name in ("data", "sft", "checkpoints", "logs")}
    settings = [
        "--config=launch/recipes/quickstart.yaml", "--config=launch/recipes/vllm/cpu.yaml",
        f"--rollout.vllm.python={PYTHON}", f"--data.train={folder['data']}/train.jsonl",
        f"--data.eval={folder['data']}/eval.jsonl",
        f"--data.tokenizer={folder['data']}/tokenizer.model", f"--sft.dir={folder['sft']}",
        f"--checkpoint.dir={folder['checkpoints']}", f"--logging.dir={folder['logs']}",
        "--train.steps=5",
    ]  # fmt: skip
    ranks = [sys.executable, "-m", "megatron_rpp.torchrun", "--nproc-per-node", "2", "-m"]
    for words in (
        [sys.executable, "tools/make_task.py", *settings],
        [*ranks, "megatron_rpp.sft", *settings],
        [*ranks, "megatron_rpp.train", *settings, f"--model.init_path={folder['sft']}"],
    ):
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stderr
    before, after = re.findall(r"step [05]: held-out accuracy ([\d.]+)%", done.stdout)
    print(f"held-out accuracy from {before}% to {after}% in five steps")
    assert float(after) > float(before) + 10
