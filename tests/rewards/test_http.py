"""Reward models behind a URL, asked over real sockets from a real server."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_rpp.rewards import RewardError, RewardSet
from megatron_rpp.rewards import http as client

PROMPTS, RESPONSES, LABELS = ["a", "bb", "ccc"], ["x", "yy", "zzz"], ["1", None, "3"]


class Server(ThreadingHTTPServer):
    """Answers requests in turn from `script`: (status, body or seconds to hang).

    The last entry answers all further requests. A body may be a function of the request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[tuple] = []
        self.seen: list[tuple[dict, str | None]] = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/score"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((body, self.headers["Authorization"]))
            script = self.server.script
            status, answer = script.pop(0) if len(script) > 1 else script[0]
        if callable(answer):
            answer = json.dumps(answer(body))
        self.send_response(status)
        if status == 307:
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()
        try:
            if isinstance(answer, float):  # trickles in, a byte at a time
                for _ in range(int(answer * 20)):
                    self.wfile.write(b" ")
                    time.sleep(0.05)
            else:
                self.wfile.write(answer.encode())
        except OSError:  # the client has hung up
            pass

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.02)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def lengths(body: dict) -> dict:
    return {"rewards": [len(text) for text in body["query"]]}


def score(server: Server, **options) -> list[float]:
    rewards = RewardSet([server.url], options={server.url: options})
    return rewards.score(PROMPTS, RESPONSES, LABELS, [{}] * 3).total


def test_openrlhfs_shape_in_batches(server):
    server.script = [(200, lengths)]
    assert score(server, batch=2) == [2.0, 4.0, 6.0]
    assert sorted((body for body, _ in server.seen), key=lambda body: body["prompts"]) == [
        {"query": ["ax", "bbyy"], "prompts": ["a", "bb"], "labels": ["1", None]},
        {"query": ["ccczzz"], "prompts": ["ccc"], "labels": ["3"]},
    ]


def test_slimes_shape_a_sample_a_request(server):
    server.script = [(200, lambda body: 0.5 * len(body["response"]))]
    assert score(server, shape="slime") == [0.5, 1.0, 1.5]
    assert len(server.seen) == 3
    assert {"prompt": "bb", "response": "yy", "label": None} in [body for body, _ in server.seen]


def test_a_server_that_recovers_is_asked_again(server):
    server.script = [(503, "busy"), (500, "oops"), (429, "slow down"), (200, lengths)]
    assert score(server) == [2.0, 4.0, 6.0]
    assert len(server.seen) == 4 and all(body == server.seen[0][0] for body, _ in server.seen)


@pytest.mark.parametrize(
    "answer, tries, problem",
    [
        ((503, "busy"), 3, "no answer after 3 tries: HTTP 503 Service Unavailable"),
        ((404, "what?"), 1, "the server refuses the request: HTTP 404 Not Found"),
        ((307, ""), 1, "the server refuses the request: HTTP 307"),
        ((200, "{not JSON"), 1, "answer is not of shape openrlhf .JSONDecodeError"),
        ((200, '{"scores": [1]}'), 1, "answer is not of shape openrlhf .KeyError: 'rewards'"),
        ((200, '{"rewards": ["a", 1, 2]}'), 1, "answer is not of shape openrlhf .ValueError"),
        ((200, '{"rewards": [1, 2]}'), 1, "the server gave 2 scores for 3 samples"),
        ((200, '{"rewards": [1, 2, NaN]}'), 1, "gave the score nan, not a finite number\nsample 2"),
        ((200, " " * ((1 << 24) + 1)), 1, "the server's answer has more than 16777216 bytes"),
    ],
)
def test_permanent_failures_stop_the_run(server, answer, tries, problem):
    server.script = [answer]
    with pytest.raises(RewardError, match=problem) as error:
        score(server, retries=2)
    assert len(server.seen) == tries and server.url in str(error.value)


def test_an_answer_that_trickles_in_is_over_the_limit(server):
    server.script = [(200, 30.0)]
    start = time.perf_counter()
    with pytest.raises(RewardError, match="no answer after 2 tries: TimeoutError: .*trickled"):
        score(server, retries=1, timeout=1)
    assert time.perf_counter() - start < 6


def test_a_server_that_hangs_and_one_that_is_not_there():
    timed_out = pytest.raises(RewardError, match="no answer after 1 tries: .*timed out")
    with Server() as server, timed_out:  # the server listens and never accepts
        score(server, retries=0, timeout=1)
    with pytest.raises(RewardError, match="no answer after 1 tries: .*refused"):
        score(server, retries=0)


def test_the_token_comes_from_the_environment_and_is_never_shown(server, monkeypatch):
    monkeypatch.setenv("RM_TOKEN", "s3cret")
    server.script = [(200, lengths), (401, "no")]
    assert score(server, token_variable="RM_TOKEN") == [2.0, 4.0, 6.0]
    assert server.seen[0][1] == "Bearer s3cret"
    with pytest.raises(RewardError, match="HTTP 401") as error:
        score(server, token_variable="RM_TOKEN")
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    "url, options, problem",
    [
        ("http://me:s3cret@host/score", {}, "reward model at host must be .*without user and"),
        ("http://host/score?key=s3cret", {}, "or a query, which logs would show"),
        ("http:///score", {}, "must be http"),
        (
            "http://host/score",
            {"batch": 2.5},
            "batch must be a whole number of at least 1, got 2.5",
        ),
        ("http://host/score", {"shape": "verl"}, r"shape must be one of \['openrlhf', 'slime'\]"),
        (
            "http://host/score",
            {"retries": -1},
            "retries must be a whole number of at least 0, got -1",
        ),
        ("http://host/score", {"timeout": "1"}, "timeout must be at least 1, got '1'"),
        ("http://host/score", {"token_variable": "NO_SUCH"}, "'NO_SUCH' of token_variable is not"),
        ("http://host/score", {"token": "s3cret"}, "must be among"),
    ],
)
def test_invalid_settings_are_errors(url, options, problem):
    with pytest.raises(ValueError, match=problem) as error:
        RewardSet([url], options={url: options})
    assert "s3cret" not in str(error.value)
