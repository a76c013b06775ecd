"""The client of vLLM servers against a small server that misbehaves; vLLM itself is in tests/vllm."""

from __future__ import annotations

import resource
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

from megatron_rpp.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_rpp.records import Request, Sampling
from megatron_rpp.rollout.engine import Abandoned
from megatron_rpp.rollout.vllm import api
from megatron_rpp.rollout.vllm import client as clients
from megatron_rpp.rollout.vllm.api import Failure, Refused, Server
from megatron_rpp.rollout.vllm.client import Client, Limits
from megatron_rpp.rollout.vllm.samples import Sampler
from tests.rollout import vllm_server as fake
from tests.rollout.vllm_server import FakeVllm

LIMITS = Limits(retries=2, timeout=20.0, seconds_per_token=0.0, at_once=256, clients=1)
REQUESTS = [Request((5, 6, 7 + i // 2), i) for i in range(8)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece([f"{a} + {b} = {a + b}" for a in range(12) for b in range(12)], path, 40)
    return load_tokenizer(path)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(clients, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(clients, "_POLL", 0.02)


@pytest.fixture
def sampler(tokenizer):
    return Sampler(tokenizer, Sampling(max_new_tokens=4), seed=1, step=2, version="v1")


@contextmanager
def running(*servers):
    try:
        yield [server.client_side for server in servers]
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def expected(sampler, requests=REQUESTS):
    return [fake.tokens_of(sampler.body(request)) for request in requests]


def run(servers, sampler, limits=LIMITS, requests=REQUESTS, **options):
    return Client(servers, limits).run(requests, sampler, **options)


def tokens(outcome):
    return [generation and generation.tokens for generation in outcome.generations]


def test_all_requests_are_in_flight_at_once(sampler):
    together = threading.Barrier(len(REQUESTS), timeout=10)

    def answer(handler, body):
        together.wait()
        fake.whole(handler, body)

    finished = []
    with running(FakeVllm(answer=answer)) as servers:
        outcome = run(servers, sampler, progress=finished.append)
    assert tokens(outcome) == expected(sampler)
    assert sum(finished) == len(REQUESTS)
    assert all(g.truncated and g.logprobs == [-0.5] * 4 for g in outcome.generations)


def test_two_servers_share_the_prompts_and_a_prompt_stays_on_one(sampler):
    one, two = FakeVllm(), FakeVllm()
    with running(one, two) as servers:
        assert tokens(run(servers, sampler)) == expected(sampler)
    prompts = [{tuple(body["token_ids"]) for body in server.bodies} for server in (one, two)]
    assert [len(found) for found in prompts] == [2, 2]
    assert len(one.bodies) == len(two.bodies) == 4


@pytest.mark.parametrize(
    "fault",
    [
        fake.failing,
        fake.dropping,
        fake.aborted,
        fake.cut_off,
        fake.garbled,
        fake.busy,
        fake.not_a_number,
        fake.no_number,
    ],
)
def test_a_fault_that_passes_costs_a_request_and_not_the_rollout(sampler, fault):
    server = FakeVllm(faults={0: fault, 3: fault})
    with running(server) as servers:
        outcome = run(servers, sampler)
    assert tokens(outcome) == expected(sampler)
    assert not outcome.lost
    assert len(server.bodies) == len(REQUESTS) + 2


def test_requests_of_a_dead_server_go_to_another(sampler):
    dead = Server("127.0.0.1:1")
    with running(FakeVllm()) as (alive,):
        outcome = run([dead, alive], sampler)
    assert tokens(outcome) == expected(sampler)
    assert list(outcome.lost) == [0] and "ConnectionRefusedError" in outcome.lost[0]


def test_requests_of_a_server_that_hangs_go_to_another(sampler):
    limits = replace(LIMITS, timeout=0.5)
    start = time.monotonic()
    with running(FakeVllm(answer=fake.hanging), FakeVllm()) as servers:
        outcome = run(servers, sampler, limits)
    assert tokens(outcome) == expected(sampler)
    assert "no answer within" in outcome.lost[0]
    assert time.monotonic() - start < 5


def test_without_any_server_left_the_requests_stay_unanswered(sampler):
    server = FakeVllm(answer=fake.failing)
    with running(server) as servers:
        outcome = run(servers, sampler)
    assert tokens(outcome) == [None] * len(REQUESTS)
    assert "500" in outcome.lost[0] and "the engine is dead" in outcome.lost[0]


def test_responses_of_other_weights_are_not_used(sampler):
    with running(FakeVllm(version="v0")) as servers:
        outcome = run(servers, sampler)
    assert tokens(outcome) == [None] * len(REQUESTS)
    assert "v0" in outcome.lost[0]


def test_weights_that_another_run_has_pushed_end_the_run(sampler):
    server = FakeVllm()

    def push(handler, body):
        fake.whole(handler, body)
        server.version = "of another run"

    server.faults[len(REQUESTS) - 1] = push
    with running(server) as servers, pytest.raises(Refused, match="of another run"):
        # One after the other, so that the last response is the last to be made.
        for request in REQUESTS:
            run(servers, sampler, requests=[request])


def test_an_answer_without_end_is_a_failure(monkeypatch):
    monkeypatch.setattr(api, "_MOST_BYTES", 1000)
    server = FakeVllm(answer=lambda handler, body: handler.reply("x" * 2000))
    with running(server) as (client,), pytest.raises(Failure, match="more than 1000 bytes"):
        client.ask("/here", {}, timeout=10)


def test_an_answer_that_breaks_off_is_a_failure():
    def short(handler, body):
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()

    with running(FakeVllm(answer=short)) as (client,), pytest.raises(Failure, match="broke off"):
        client.ask("/here", {}, timeout=10)


def test_a_request_that_is_wrong_is_not_sent_again(sampler):
    server = FakeVllm(answer=fake.refusing)
    with running(server) as servers, pytest.raises(Refused, match="out of vocabulary"):
        run(servers, sampler)
    assert len(server.bodies) <= len(REQUESTS)


def test_a_stop_abandons_the_requests_and_closes_their_connections(sampler):
    start = time.monotonic()
    server = FakeVllm(answer=fake.hanging)
    with running(server) as servers, pytest.raises(Abandoned):
        run(servers, sampler, stop=lambda: time.monotonic() - start > 0.3)
    assert time.monotonic() - start < 3


def test_a_stop_breaks_off_streams(tokenizer):
    ids = tokenizer.encode("2 3 4 5 6 7 2 3 4 5")
    sampler = Sampler(tokenizer, Sampling(len(ids), stop=("=",)), seed=1, step=2, version="v1")
    start = time.monotonic()
    server = FakeVllm(answer=fake.streaming(ids, pause=3.0))
    with running(server) as servers, pytest.raises(Abandoned):
        run(servers, sampler, stop=lambda: time.monotonic() - start > 0.3)
    assert time.monotonic() - start < 2


def test_a_stop_is_seen_while_a_server_is_given_a_pause(sampler, monkeypatch):
    monkeypatch.setattr(clients, "_FIRST_PAUSE", 60.0)
    monkeypatch.setattr(clients, "_LONGEST_PAUSE", 60.0)
    start = time.monotonic()
    with running(FakeVllm(answer=fake.failing)) as servers, pytest.raises(Abandoned):
        run(servers, sampler, stop=lambda: time.monotonic() - start > 0.3)
    assert time.monotonic() - start < 3


def test_the_time_limit_grows_with_tokens_and_with_those_that_wait():
    limits = Limits(retries=0, timeout=10.0, seconds_per_token=0.5, at_once=4, clients=1)
    assert limits.seconds(100, before=0) == limits.seconds(100, before=3) == 60.0
    assert limits.seconds(100, before=4) == 110.0
    assert limits.seconds(200, before=0) == 110.0
    assert replace(limits, clients=8).seconds(100, before=0) == 110.0


def test_as_many_requests_are_in_flight_as_files_may_be_open():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
        assert clients._allowed(0) == 1
        assert clients._allowed(500) == 500
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 756
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_request_says_everything_about_its_sampling(tokenizer):
    sampling = Sampling(8, 2, temperature=0.7, top_p=0.9, top_k=5, stop_token_ids=(9,))
    sampler = Sampler(tokenizer, sampling, seed=1, step=2, version="v1")
    body = sampler.body(Request((5, 6), 3))
    assert body["token_ids"] == [5, 6] and "stream" not in body
    wanted = body["sampling_params"]
    assert (wanted["max_tokens"], wanted["min_tokens"]) == (8, 2)
    assert (wanted["temperature"], wanted["top_p"], wanted["top_k"]) == (0.7, 0.9, 5)
    assert wanted["stop_token_ids"] == [*tokenizer.eos_ids, 9]
    others = [
        Sampler(tokenizer, sampling, seed, step, "v1").body(Request((5, 6), sample))
        for seed, step, sample in ((2, 2, 3), (1, 3, 3), (1, 2, 4))
    ]
    seeds = {other["sampling_params"]["seed"] for other in others} | {wanted["seed"]}
    assert len(seeds) == 4 and all(0 <= seed < 2**63 for seed in seeds)
    greedy = replace(sampling, temperature=0.0)
    assert (
        "seed"
        not in Sampler(tokenizer, greedy, 1, 2, "v1").body(Request((5,), 0))["sampling_params"]
    )


@pytest.mark.parametrize(
    ("texts", "least", "length"), [(["+ 1"], 0, 5), (["+ 1"], 7, 7), (["="], 0, None)]
)
def test_a_stop_text_ends_a_response_where_the_megatron_engine_ends_it(
    tokenizer, texts, least, length
):
    ids = tokenizer.encode("2 3 + 1 1 1 1 1 1")
    shown = [tokenizer.decode(ids[: i + 1], keep_special=True) for i in range(len(ids))]
    if length == 5:
        length = next(i + 1 for i, text in enumerate(shown) if "+ 1" in text)
    sampling = Sampling(len(ids), least, stop=tuple(texts))
    sampler = Sampler(tokenizer, sampling, seed=1, step=2, version="v1")
    server = FakeVllm(answer=fake.streaming(ids, pause=0.02))
    with running(server) as servers:
        outcome = run(servers, sampler, requests=REQUESTS[:1])
        if length is not None:
            assert server.closed.wait(5), "the request was not aborted"
    (found,) = outcome.generations
    assert found.tokens == ids[:length]
    assert found.truncated == (length is None)
    assert server.bodies[0]["stream"] is True


def test_a_stream_that_breaks_off_is_asked_for_again(tokenizer):
    ids = tokenizer.encode("2 3 4 5 6 7")
    sampler = Sampler(tokenizer, Sampling(len(ids), stop=("=",)), seed=1, step=2, version="v1")

    def broken(handler, body):
        fake.streaming(ids)(_Until(handler, 2), body)

    server = FakeVllm(answer=fake.streaming(ids), faults={0: broken})
    with running(server) as servers:
        outcome = run(servers, sampler, requests=REQUESTS[:1])
    assert tokens(outcome) == [ids]
    assert len(server.bodies) == 2


class _Until:
    """A handler whose connection breaks after so many events."""

    def __init__(self, handler, events):
        self._handler, self._left = handler, events
        self.wfile, self.server = self, handler.server

    def __getattr__(self, name):
        return getattr(self._handler, name)

    def write(self, data):
        if not self._left:
            raise OSError("broken")
        self._left -= 1
        self._handler.wfile.write(data)

    def flush(self):
        self._handler.wfile.flush()
