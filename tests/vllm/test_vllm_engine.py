"""The engine on the real vLLM, on a CPU: `bash tests/vllm.sh`. Skipped unless VLLM_PYTHON is set.

Everything is real: ranks, servers, weights. The sizes are small, with heads of 32 channels, the least
that vLLM's attention on CPUs knows.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import zlib
from dataclasses import replace

import psutil
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
    ours = MegatronEngine(policy.model, NoEnd(), max_batch=64)
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
    few, short = MANY[:4], replace(SAMPLED, max_new_tokens=8)  # quick, also on a busy machine
    expected = engine.generate(few, short, seed=5, step=6)
    limits = engine._limits
    engine._limits = replace(limits, timeout=15)
    for process in workers(engine):
        process.suspend()
    found = engine.generate(few, short, seed=5, step=6)
    engine._limits = limits
    assert [g.tokens for g in found] == [g.tokens for g in expected]


def test_a_server_that_cannot_start_ends_the_run_with_its_log(tmp_path, single):
    broken = config_of(tmp_path, arguments=["--no-such-flag"])
    engine = VllmEngine(broken, single[0], NoEnd(), log=print)
    with pytest.raises(RunFailure, match="server 0.*ended while it started(.|\n)*no-such-flag"):
        engine.generate(MANY[:1], SAMPLED, seed=5, step=6)
