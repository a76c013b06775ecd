"""One sample as a request to a vLLM server, and the answer as a `Generation`.

Token ids go in and out; the server needs no tokenizer. Stop texts are searched for here, as the
Megatron engine does it, so that both end a response at the same token: such a request is streamed, and
its connection is closed at the end, which aborts it on the server.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_rpp.data.tokenizer import Tokenizer
from megatron_rpp.records import Generation, Request, Sampling
from megatron_rpp.rollout.stopping import StopTexts
from megatron_rpp.rollout.vllm.api import Connections, Failure, Server
from megatron_rpp.seeds import request_seed

PATH = "/inference/v1/generate"


@dataclass(frozen=True)
class Sampler:
    """How the samples of a step are asked for."""

    tokenizer: Tokenizer
    sampling: Sampling
    seed: int
    step: int
    version: str
    """The version of the weights that must have made every token."""

    @property
    def _ends(self) -> tuple[int, ...]:
        return (*self.tokenizer.eos_ids, *self.sampling.stop_token_ids)

    def body(self, request: Request) -> dict[str, Any]:
        """The content of the request."""
        wanted = self.sampling
        parameters: dict[str, Any] = {
            "temperature": wanted.temperature,
            "max_tokens": wanted.max_new_tokens,
            "min_tokens": wanted.min_new_tokens,
            "stop_token_ids": list(self._ends),
            "ignore_eos": True,  # stop_token_ids has the ends of tokenizer and model
            "logprobs": 0,
            "detokenize": False,
        }
        if wanted.temperature > 0:
            parameters |= {"top_p": wanted.top_p, "top_k": wanted.top_k}
            parameters["seed"] = request_seed(self.seed, self.step, request.sample_id)
        content: dict[str, Any] = {"token_ids": list(request.prompt)}
        content["sampling_params"] = parameters
        if wanted.stop:
            content["stream"] = True
        return content

    def sample(
        self, server: Server, request: Request, *, timeout: float, connections: Connections
    ) -> Generation:
        """Asks `server` for a sample. Raises Failure or Refused."""
        body = self.body(request)
        if self.sampling.stop:
            events = server.stream(PATH, body, timeout=timeout, connections=connections)
            return self._read_until_stop(events)
        return self._read(server.ask(PATH, body, timeout=timeout, connections=connections))

    def _read(self, answer: Any) -> Generation:
        part = _Part.of(answer)
        return self._finished(part.tokens, part.logprobs, part)

    def _read_until_stop(self, events: Iterable[Any]) -> Generation:
        stops = StopTexts(self.tokenizer, self.sampling.stop)
        least = max(self.sampling.min_new_tokens, 1)
        tokens: list[int] = []
        logprobs: list[float] = []
        for event in events:
            part = _Part.of(event)
            for token, logprob in zip(part.tokens, part.logprobs, strict=True):
                tokens.append(token)
                logprobs.append(logprob)
                ended = token in self._ends
                if not ended and len(tokens) >= least:
                    ended = stops.end(tokens, first=len(tokens) == least)
                if ended:
                    return Generation(tokens, logprobs, truncated=False)
            if part.reason is not None:
                return self._finished(tokens, logprobs, part)
        raise Failure("the stream of a response broke off")

    def _finished(self, tokens: list[int], logprobs: list[float], part: _Part) -> Generation:
        """Checks that the response is whole and made by the weights of this step."""
        if part.reason not in ("stop", "length") or not tokens or len(tokens) != len(logprobs):
            raise Failure(f"a response ended by {part.reason!r} after {len(tokens)} tokens")
        if part.versions != {self.version}:
            raise Failure(f"weights of version {part.versions} made a response, not {self.version}")
        truncated = tokens[-1] not in self._ends
        if truncated and len(tokens) < self.sampling.max_new_tokens:
            raise Failure(f"a response was cut off after {len(tokens)} tokens")
        return Generation(tokens, logprobs, truncated)


@dataclass(frozen=True)
class _Part:
    """An answer, or an event of a stream."""

    tokens: list[int]
    logprobs: list[float]
    reason: str | None
    versions: set[str]

    @classmethod
    def of(cls, answer: Any) -> _Part:
        try:
            choice = answer["choices"][0]
            rows = (choice["logprobs"] or {}).get("content") or []
            spans = choice["weight_versions"] or []
            found = cls(
                [int(token) for token in choice["token_ids"] or []],
                [float(row["logprob"]) for row in rows],
                choice["finish_reason"], {span["version"] for span in spans},
            )  # fmt: skip
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise Failure(f"the answer has another form ({error!r}): {str(answer)[:300]}") from None
        if len(found.tokens) != len(found.logprobs):
            raise Failure(f"{len(found.tokens)} tokens have {len(found.logprobs)} log-probs")
        if not all(map(math.isfinite, found.logprobs)):
            raise Failure(f"log-probs are not finite: {str(answer)[:300]}")
        return found
