"""A small HTTP server that answers as vLLM does, and misbehaves on demand."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from megatron_rpp.rollout.vllm.api import Server
from megatron_rpp.seeds import request_seed

Answer = Callable[["Handler", dict], None]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: FakeVllm

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.reply({"weight_version": self.server.version})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.bodies)
            self.server.bodies.append(body)
        answer = self.server.faults.get(number, self.server.answer)
        answer(self, body)

    def reply(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class FakeVllm(ThreadingHTTPServer):
    """Answers requests for samples with tokens that follow from prompt and seed."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, version="v1", faults=None, answer=None, handler=Handler):
        """
        Args:
            faults: what answers the request of this number instead of `answer`.
        """
        super().__init__(("127.0.0.1", 0), handler)
        self.version, self.faults, self.lock = version, faults or {}, threading.Lock()
        self.answer = answer or whole
        self.bodies, self.closed = [], threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # a client that has closed its connection

    @property
    def client_side(self):
        return Server(f"127.0.0.1:{self.server_port}")


def tokens_of(body):
    """What every server of these weights answers: as many tokens as allowed, none of them an end."""
    sampling = body["sampling_params"]
    seed = sampling.get("seed", 0) + sum(body["token_ids"])
    return [10 + (seed + i) % 7 for i in range(sampling["max_tokens"])]


def choice(tokens, reason="length", version="v1"):
    rows = [{"token_id": t, "logprob": -0.5, "rank": 1, "top_logprobs": []} for t in tokens]
    spans = [{"version": version, "start": 0}] if reason else None
    return {
        "choices": [
            {
                "index": 0, "token_ids": tokens, "finish_reason": reason,
                "logprobs": {"content": rows}, "weight_versions": spans,
            }
        ]
    }  # fmt: skip


def whole(handler, body):
    handler.reply(choice(tokens_of(body), version=handler.server.version))


def failing(handler, body):
    handler.reply({"error": "the engine is dead"}, 500)


def refusing(handler, body):
    handler.reply({"error": "token 99 is out of vocabulary"}, 400)


def dropping(handler, body):
    handler.connection.close()


def hanging(handler, body):
    time.sleep(60)


def busy(handler, body):
    handler.reply({"error": "too many requests"}, 429)


def not_a_number(handler, body):
    content = choice(tokens_of(body))
    content["choices"][0]["logprobs"]["content"][0]["logprob"] = float("nan")
    handler.reply(content)


def no_number(handler, body):
    content = choice(tokens_of(body))
    content["choices"][0]["logprobs"]["content"][0]["logprob"] = "low"
    handler.reply(content)


def aborted(handler, body):
    handler.reply(choice(tokens_of(body)[:1], "abort"))


def cut_off(handler, body):
    handler.reply(choice(tokens_of(body)[:1], "length"))


def garbled(handler, body):
    handler.reply({"choices": []})


def streaming(tokens, pause=0.0):
    """Streams these tokens one by one, and notes if the client closes the connection."""

    def answer(handler, body):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        try:
            for i, token in enumerate(tokens):
                reason = "length" if i + 1 == len(tokens) else None
                data = json.dumps(choice([token], reason))
                handler.wfile.write(f"data: {data}\n\n".encode())
                handler.wfile.flush()
                time.sleep(pause)
            handler.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            handler.server.closed.set()

    return answer


class TrainedHandler(Handler):
    """A request to a server that also takes weights."""

    server: TrainedVllm

    def do_POST(self):
        if self.path == "/inference/v1/generate":
            super().do_POST()
            return
        size = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(size)) if size else {}
        answer = self.server.control(self.path.partition("?")[0], body)
        self.reply(answer or {}, 200 if answer is not None else 500)


class TrainedVllm(FakeVllm):
    """Takes weights as vLLM does, and answers with tokens that follow from them, too.

    `log` has ("weights" | "evaluation" | "step N", digest of the weights), without repetitions.
    """

    def __init__(self, model, *, seed, steps, samples, answer=None):
        """model: what it says about its model. Requests of other seeds than those of the samples of
        the run's first `steps` steps are those of an evaluation."""
        super().__init__(handler=TrainedHandler, answer=self._sample)
        self.model, self.weights, self.log = model, "none", []
        self.gate = answer or (lambda work: None)
        """Called with the name of the work before a sample is answered."""
        self._steps = {
            request_seed(seed, step, sample): f"step {step}"
            for step in range(steps)
            for sample in range(samples)
        }

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def control(self, path, body):
        """The answer to a request that is not one for a sample; None = it fails."""
        if path == "/collective_rpc":
            return {"results": [self._call(body["method"], *body.get("args", ()))]}
        if path == "/update_weights":
            content = b"".join(Path(name).read_bytes() for name in body["update_info"]["paths"])
            self.weights = hashlib.blake2b(content, digest_size=4).hexdigest()
            self._note("weights")
        if path == "/finish_weight_update":
            self.version = body["weight_version"]
        return {}

    def _call(self, method, *arguments):
        if method == "rpp_sees":
            return {"seen": Path(*arguments).exists()}
        return self.model if method == "rpp_model" else {}

    def _note(self, work):
        with self.lock:
            if (work, self.weights) not in self.log[-1:]:
                self.log.append((work, self.weights))

    def _sample(self, handler, body):
        work = self._steps.get(body["sampling_params"].get("seed"), "evaluation")
        version, weights = self.version, int(self.weights, 16)
        self._note(work)
        if (fault := self.gate(work)) is not None:
            fault(handler, body)
            return
        tokens = [3 + (token + weights) % 30 for token in tokens_of(body)]
        handler.reply(choice(tokens, version=version))


@contextmanager
def serving(server):
    """Ends the server after the context."""
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
