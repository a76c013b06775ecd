"""A reward model behind a URL: batched POST requests with limits on time, tries and size.

Requests and answers are JSON of one of two shapes:

    openrlhf  {"query": [prompt + response, ...], "prompts": [...], "labels": [...]}
              -> {"rewards": [number, ...]}
    slime     {"prompt": ..., "response": ..., "label": ...} for each sample -> number

The prompt is that of the data set; for a conversation, it is the last user message. Redirects are
not followed, so that the token goes nowhere else. Left out: authentication other than a bearer
token.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from megatron_rpp.lifecycle.config_error import ConfigError

_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0
"""Seconds; each pause is twice the one before."""
_MAX_BYTES = 1 << 24
"""Largest size of one answer."""
_CHUNK = 1 << 16


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


class _Again(Exception):
    """A failure that may be over when the request is sent again."""


@dataclass(frozen=True, kw_only=True)
class HttpReward:
    """A reward function behind a URL. All fields except the URL are its options."""

    url: str
    shape: str = "openrlhf"
    batch: int = 32
    """Samples in a request of shape openrlhf."""
    concurrency: int = 8
    """Largest number of requests at the same time."""
    timeout: float = 60.0
    """Time limit in seconds for one request."""
    retries: int = 5
    """Number of further tries after a server error, a lost connection or a timeout."""
    token_variable: str | None = None
    """Environment variable that holds the bearer token."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.username or parts.password or parts.query or not parts.hostname:
            raise ConfigError(
                f"the URL of the reward model at {parts.hostname} must be http://host/... without "
                "user and password or a query, which logs would show: set token_variable in its "
                "reward.options to the environment variable that holds a token"
            )
        if self.shape not in _SHAPES:
            shapes = sorted(_SHAPES)
            raise ConfigError(f"reward.options: shape must be one of {shapes}, got {self.shape!r}")
        for name in ("batch", "concurrency", "timeout", "retries"):
            value, least = getattr(self, name), 0 if name == "retries" else 1
            kind = (int, float) if name == "timeout" else int
            if isinstance(value, bool) or not isinstance(value, kind) or value < least:
                whole = "" if name == "timeout" else "a whole number of "
                raise ConfigError(
                    f"reward.options: {name} must be {whole}at least {least}, got {value!r}"
                )
        if self.token_variable is not None and self.token_variable not in os.environ:
            raise ConfigError(
                f"reward.options: the environment variable {self.token_variable!r} of "
                "token_variable is not set: export it on every node"
            )

    def __call__(  # noqa: PLR0917 (the signature of a reward function)
        self,
        prompts: list[str],
        responses: list[str],
        labels: list[str | None],
        metadata: list[dict[str, Any]],
    ) -> list[float]:
        """Raises RuntimeError if the server keeps failing or its answer has another shape."""
        size = self.batch if self.shape == "openrlhf" else 1
        starts = range(0, len(responses), size)
        requests = [
            (prompts[i : i + size], responses[i : i + size], labels[i : i + size]) for i in starts
        ]
        with ThreadPoolExecutor(self.concurrency) as pool:
            answers = list(pool.map(lambda columns: self._ask(*columns), requests))
        return [score for scores in answers for score in scores]

    def _ask(self, *columns: list) -> list[float]:
        """The scores of one request's samples."""
        build, read = _SHAPES[self.shape]
        answer = self._post(json.dumps(build(*columns)).encode())
        try:
            scores = read(json.loads(answer))
        except (ValueError, TypeError, KeyError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise RuntimeError(
                f"the server's answer is not of shape {self.shape} ({reason}): {answer[:200]!r}"
            ) from None
        count = len(columns[0])
        if len(scores) != count:
            raise RuntimeError(f"the server gave {len(scores)} scores for {count} samples")
        return scores

    def _post(self, body: bytes) -> bytes:
        pause, tries = _FIRST_PAUSE, self.retries + 1
        for number in range(1, tries + 1):
            try:
                return self._try(body)
            except _Again as error:
                if number == tries:
                    raise RuntimeError(f"no answer after {tries} tries: {error}") from None
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("unreachable")

    def _try(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.token_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.token_variable]}"
        request = urllib.request.Request(self.url, body, headers, method="POST")
        deadline = time.monotonic() + self.timeout
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                return _read(response, deadline)
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}"
            if error.code in _RETRIED:
                raise _Again(problem) from None
            raise RuntimeError(f"the server refuses the request: {problem}") from None
        except (OSError, HTTPException) as error:  # lost, refused or timed-out connections
            raise _Again(f"{type(error).__name__}: {error}") from None


def _read(response: HTTPResponse, deadline: float) -> bytes:
    """The whole answer. The limits on size and time also apply if it trickles in."""
    content = bytearray()
    while chunk := response.read1(_CHUNK):
        content += chunk
        if len(content) > _MAX_BYTES:
            raise RuntimeError(f"the server's answer has more than {_MAX_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("the answer trickled in for longer than the time limit")
    return bytes(content)


def _openrlhf(prompts: list, responses: list, labels: list) -> dict[str, list]:
    query = [prompt + response for prompt, response in zip(prompts, responses)]
    return {"query": query, "prompts": prompts, "labels": labels}


def _slime(prompts: list, responses: list, labels: list) -> dict[str, Any]:
    return {"prompt": prompts[0], "response": responses[0], "label": labels[0]}


_SHAPES: dict[str, tuple[Callable[..., Any], Callable[[Any], list[float]]]] = {
    "openrlhf": (_openrlhf, lambda answer: [float(score) for score in answer["rewards"]]),
    "slime": (_slime, lambda answer: [float(answer)]),
}
"""Shape: (columns -> request, answer -> scores)."""
