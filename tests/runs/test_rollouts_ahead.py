"""Whole runs with rollout.ahead: the next step is sampled while this one updates the policy.

The ranks, the weights that they push and the threads are real. The server (rollout/vllm_server.py)
speaks vLLM's protocol; its tokens follow from the seed and from the bytes of the weights, so samples of
other weights would show. tests/vllm has the same with vLLM itself.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.exit_codes import RunFailure
from megatron_rpp.rollout.vllm.environment import expected_model
from megatron_rpp.runtime.checkpointing import Preempted
from megatron_rpp.runtime.inputs import load_inputs
from tests.distributed import run_ranks
from tests.rollout import vllm_server as fake
from tests.rollout.vllm_server import TrainedVllm, serving
from tests.small_run import config_of, make_data
from tests.whole_runs import rows, same_bits, train_run

STEPS, SOON = 4, 10.0
SETTINGS = {
    "train__steps": STEPS, "train__epochs": 1, "evaluation__interval": 2, "model__layers": 2,
    "checkpoint__interval": 2, "rollout__engine": "vllm", "rollout__ahead": 1,
    "algorithm__rollout_correction": "cap",
}  # fmt: skip
KEEP = {"checkpoint__save_rollouts": "true"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    make_data(folder)
    return folder


@contextmanager
def server(base, gate=None):
    """A server for the runs in `base`."""
    config = config_of(base, base)
    model = config_of(base, base, model__layers=2)
    found = TrainedVllm(
        expected_model(model, load_inputs(config).vocab_size), seed=config.seed, steps=STEPS,
        samples=config.rollout.samples_per_step, answer=gate,
    )  # fmt: skip
    with serving(found):
        yield found


def train(base, name, url, **settings):
    run = base / name
    more = {"rollout__vllm__urls": f"[{url}]", "rollout__vllm__dir": run}
    run.mkdir(exist_ok=True)
    train_run(base, run, **(SETTINGS | more | settings))
    assert not [t for t in threading.enumerate() if t.name == "rollout ahead"]


@contextmanager
def at(phase, count, act):
    """Calls `act` when `phase` is entered for the `count`-th time."""
    entered = []

    def listen(name):
        entered.append(name)
        if name == phase and entered.count(phase) == count:
            act()

    heartbeat.current.listeners.append(listen)
    try:
        yield
    finally:
        heartbeat.current.listeners.remove(listen)


def staleness(base, name):
    return [row["rollout/staleness"] for row in rows(base / name / "logs/metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(base):
    """Run "whole", which nothing interrupts; returns what its server was asked, in order.

    No sample that is drawn ahead is answered before the update of the step before it has begun.
    """
    updates = [threading.Event() for _ in range(STEPS)]
    late = []

    def gate(work):
        if work not in ("evaluation", "step 0"):
            before = int(work.removeprefix("step ")) - 1
            late.append(not updates[before].wait(SOON))

    entered = []

    def listen(name):
        # A step enters "update" for the stage and for each of its two mini-batches.
        entered.extend([name] * (name == "update"))
        if entered:
            updates[(len(entered) - 1) // 3].set()

    heartbeat.current.listeners.append(listen)
    with server(base, gate) as found:
        train(base, "whole", found.url)
    heartbeat.current.listeners.remove(listen)
    assert late and not any(late), "samples were waited for before the update of the step before"
    return found.log


def test_a_step_is_sampled_with_the_weights_of_the_step_before(whole, base):
    pushed = [weights for work, weights in whole if work == "weights"]
    assert len(set(pushed)) == 4
    before, after_1, after_2, after_4 = pushed
    assert whole == [
        ("weights", before), ("evaluation", before), ("step 0", before), ("step 1", before),
        ("weights", after_1), ("step 2", after_1),
        ("weights", after_2), ("evaluation", after_2), ("step 3", after_2),
        ("weights", after_4), ("evaluation", after_4),
    ]  # fmt: skip
    assert staleness(base, "whole") == [0, 1, 1, 1]


def test_without_ahead_every_step_has_its_own_weights(whole, base):
    with server(base) as found:
        train(base, "now", found.url, rollout__ahead=0)
    work = [name for name, _ in found.log if name != "weights"]
    assert work == [
        "evaluation",
        "step 0",
        "step 1",
        "evaluation",
        "step 2",
        "step 3",
        "evaluation",
    ]
    assert len({weights for name, weights in found.log if name.startswith("step")}) == STEPS
    assert staleness(base, "now") == [0] * STEPS
    # The first step of both runs, and with it the weights after it, are the same.
    pushed = [weights for name, weights in found.log if name == "weights"]
    assert pushed[:2] == [weights for name, weights in whole if name == "weights"][:2]


class Killed(Exception):
    """Stands for a kill."""


def kill():
    raise Killed


def test_kept_rollouts_make_a_resume_exact(whole, base):
    """The kill comes in the fourth step, the checkpoint of the second one is the last."""
    with server(base) as found:
        with at("reward", 4, kill), pytest.raises(Killed):
            train(base, "kept", found.url, **KEEP)
        train(base, "kept", found.url, **KEEP)
    assert [work for work, _ in found.log].count("step 2") == 1
    assert staleness(base, "kept") == [0, 1, 1, 1]
    same_bits(base / "kept", base / "whole", config_of(base, base, model__layers=2), step=STEPS)


def test_without_them_a_resume_draws_with_the_weights_of_then(whole, base, capfd):
    with server(base) as found:
        with at("reward", 4, kill), pytest.raises(Killed):
            train(base, "drawn", found.url)
        assert "no rollouts were drawn ahead" not in capfd.readouterr().out
        train(base, "drawn", found.url)
    assert "step 3: no rollouts were drawn ahead; the weights of now" in capfd.readouterr().out
    assert staleness(base, "drawn") == [0, 1, 0, 1]


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_stop_gives_up_what_hangs_and_a_resume_before_the_update_is_exact(whole, base, capfd):
    hang = threading.Event()
    with server(base, lambda work: hang.wait(60) if work == "step 2" else None) as found:
        begin = []

        def end():
            begin.append(time.monotonic())
            stop()

        place = "SIGTERM: saved in step 2 after 0 mini-batches"
        with at("reward", 2, end), pytest.raises(Preempted, match=place):
            train(base, "stopped", found.url)
        assert time.monotonic() - begin[0] < SOON
    hang.set()
    assert "the rollouts of step 3, drawn ahead, are not kept" in capfd.readouterr().out
    with server(base) as found:
        train(base, "stopped", found.url)
    assert staleness(base, "stopped") == [0, 1, 1, 1]
    same_bits(base / "stopped", base / "whole", config_of(base, base, model__layers=2), step=STEPS)


def test_a_stop_inside_the_update_keeps_what_is_finished(whole, base):
    with server(base) as found:
        ready = threading.Event()

        def gate(work):
            if work == "step 2":
                ready.set()

        found.gate = gate

        def end():
            ready.wait(SOON)
            time.sleep(1)  # the last of them are on their way
            stop()

        # In the second mini-batch of the second step.
        with at("update", 6, end), pytest.raises(Preempted, match="in step 2 after 2 mini-batches"):
            train(base, "inside", found.url, **KEEP)
        train(base, "inside", found.url, **KEEP)
    assert staleness(base, "inside") == [0, 1, 1, 1]
    same_bits(base / "inside", base / "whole", config_of(base, base, model__layers=2), step=STEPS)


def test_an_evaluation_that_waits_for_samples_is_stopped(whole, base):
    hang = threading.Event()
    with server(base, lambda work: hang.wait(60) if work == "step 2" else None) as found:
        begin = []

        def later():
            begin.append(time.monotonic())
            threading.Timer(1.0, stop).start()

        with at("evaluation", 2, later), pytest.raises(Preempted, match="in step 2 after 2 mini"):
            train(base, "waiting", found.url)
        assert time.monotonic() - begin[0] < SOON
    hang.set()


def test_what_a_lost_server_did_not_answer_is_drawn_with_the_next_weights(whole, base, capfd):
    asked = []

    def gate(work):
        if work == "step 2":
            asked.append(found.weights)
        return fake.failing if work == "step 2" and found.weights == asked[0] else None

    with server(base, gate) as found:
        train(base, "lost", found.url, rollout__vllm__retries=1)
    assert "is lost: /inference/v1/generate answered 500" in capfd.readouterr().out
    assert len(set(asked)) == 2
    assert [row["step"] for row in rows(base / "lost/logs/metrics.jsonl")] == [1, 2, 3, 4]


def refused(rank, base, url):
    with pytest.raises(RunFailure, match="refuses a request: .* 400"):
        train(base, "refused", url)
    return rank


def test_a_failure_in_the_thread_of_one_replica_ends_the_run_on_every_rank(base):
    """One request of all is refused."""
    asked = []

    def gate(work):
        asked.extend([work] * (work == "step 1"))
        return fake.refusing if len(asked) == 1 and work == "step 1" else None

    with server(base, gate) as found:
        assert run_ranks(refused, 2, base, base, found.url) == [0, 1]
