"""The responses of one call of the engine, as they grow, on the host."""

from __future__ import annotations

import numpy as np

from megatron_rpp.data.tokenizer import Tokenizer
from megatron_rpp.records import Generation, Request, Sampling
from megatron_rpp.rollout.stopping import StopTexts


class Responses:
    """Tokens and log-probs of every request, and which responses are finished."""

    def __init__(self, requests: list[Request], sampling: Sampling, tokenizer: Tokenizer) -> None:
        count, most = len(requests), sampling.max_new_tokens
        self.requests = requests
        self.sample_ids = np.array([request.sample_id for request in requests], np.int64)
        self.prompt_lengths = np.array([len(request.prompt) for request in requests], np.int64)
        self.lengths = np.zeros(count, np.int64)  # tokens of each response
        self.finished = np.zeros(count, bool)
        self.most_tokens = most
        self.end_tokens = (*tokenizer.eos_ids, *sampling.stop_token_ids)
        self._ended = np.zeros(count, bool)  # by an end token or a stop text
        self._tokens = np.zeros((count, most), np.int64)
        self._logprobs = np.zeros((count, most), np.float32)
        self._sampling = sampling
        self._stops = StopTexts(tokenizer, sampling.stop)

    @property
    def longest(self) -> int:
        """Most tokens that a sequence can have, with its prompt."""
        return int(self.prompt_lengths.max()) + self.most_tokens

    def context(self, index: int) -> tuple[int, ...]:
        """The tokens of a sequence so far: prompt and response."""
        response = self._tokens[index, : self.lengths[index]].tolist()
        return (*self.requests[index].prompt, *response)

    def last_tokens(self, rows: np.ndarray) -> np.ndarray:
        """[n]: the last token of each sequence in `rows`."""
        last = self._tokens[rows, self.lengths[rows] - 1]
        for place in np.flatnonzero(self.lengths[rows] == 0):
            last[place] = self.requests[rows[place]].prompt[-1]
        return last

    def append(self, rows: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Adds one token to each response in `rows` that is not finished; drops the others'."""
        running = ~self.finished[rows]
        rows, tokens, logprobs = rows[running], tokens[running].astype(np.int64), logprobs[running]
        columns = self.lengths[rows]
        self._tokens[rows, columns] = tokens
        self._logprobs[rows, columns] = logprobs
        self.lengths[rows] += 1
        self._ended[rows] = (tokens[:, None] == self.end_tokens).any(1)
        if self._sampling.stop:
            self._find_stops(rows[~self._ended[rows]])
        full = self.lengths[rows] == self.most_tokens
        self.finished[rows] = self._ended[rows] | full

    def _find_stops(self, rows: np.ndarray) -> None:
        least = max(self._sampling.min_new_tokens, 1)
        for row in rows[self.lengths[rows] >= least]:
            length = self.lengths[row]
            response = self._tokens[row, :length].tolist()
            self._ended[row] = self._stops.end(response, length == least)

    def generations(self) -> list[Generation]:
        """The finished responses, in the order of the requests."""
        assert self.finished.all()
        return [
            Generation(self._tokens[i, :n].tolist(), self._logprobs[i, :n].tolist(), not ended)
            for i, (n, ended) in enumerate(zip(self.lengths, self._ended, strict=True))
        ]
