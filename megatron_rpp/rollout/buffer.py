"""The rollout buffer: the samples of a step that one data-parallel replica holds.

The buffer is columnar and ragged: the tokens of all samples lie end to end, and so do the values of
their response tokens (log-probs, advantages, mask). Nothing is padded (packing.py makes the
micro-batches). A replica holds its own samples only, so the memory of a rank falls with the number
of replicas. All ranks of a replica hold the same columns: the last pipeline stage broadcasts them.

storage.py writes buffers to disk. Left out: rebalancing over replicas by token count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from megatron_rpp.data.prompts import Prompt
from megatron_rpp.records import Generation, Request


@dataclass(kw_only=True)
class RolloutBuffer:
    """Samples 0..n-1 of this replica; R response tokens and L tokens in all.

    tokens: [L] int64, prompt then response of each sample; offsets: [n+1] where each starts;
    prompt_lengths: [n]; sample_ids: [n] the sample's number in the whole step; group_ids: [n]
    its prompt's number in the step; mask: [R] bool, True if the policy wrote the token (False:
    tool output); rollout_logprobs: [R] fp32 by the rollout engine; truncated: [n] bool.
    The stages fill the rest: scores [n], and per response token [R] old_logprobs, ref_logprobs,
    values if there is a critic, advantages, returns, and rollout_weights if a correction is on.
    """

    prompts: list[Prompt]
    tokens: torch.Tensor
    offsets: torch.Tensor
    prompt_lengths: torch.Tensor
    sample_ids: torch.Tensor
    group_ids: torch.Tensor
    mask: torch.Tensor
    rollout_logprobs: torch.Tensor
    truncated: torch.Tensor
    scores: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    values: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    rollout_weights: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> torch.Tensor:
        """[n] tokens of each sample."""
        return self.offsets.diff()

    @property
    def response_lengths(self) -> torch.Tensor:
        """[n] response tokens of each sample."""
        return self.lengths - self.prompt_lengths

    @property
    def response_offsets(self) -> torch.Tensor:
        """[n+1] start of each sample's values in a response column."""
        return torch.nn.functional.pad(self.response_lengths.cumsum(0), (1, 0))

    def response(self, index: int) -> list[int]:
        """The response tokens of sample `index`."""
        start = int(self.offsets[index] + self.prompt_lengths[index])
        return self.tokens[start : int(self.offsets[index + 1])].tolist()

    def padded(self, column: torch.Tensor) -> torch.Tensor:
        """A response column [R] as [n, longest response], zero (False) beyond each response."""
        if not len(self):
            return column.new_zeros(0, 0)
        return pad_sequence(column.split(self.response_lengths.tolist()), batch_first=True)

    def flat(self, padded: torch.Tensor) -> torch.Tensor:
        """The inverse of `padded`."""
        steps = torch.arange(padded.shape[1])
        return padded[steps[None] < self.response_lengths[:, None]]


def from_generations(
    prompts: list[Prompt],
    requests: list[Request],
    generations: list[Generation],
    *,
    samples_per_prompt: int,
) -> RolloutBuffer:
    """Makes the buffer of a replica from its generations; prompts[i] belongs to requests[i]."""
    sequences = [
        [*request.prompt, *generation.tokens]
        for request, generation in zip(requests, generations, strict=True)
    ]
    ids = torch.tensor([request.sample_id for request in requests], dtype=torch.int64)
    logprobs = [value for generation in generations for value in generation.logprobs]
    lengths = torch.tensor([0, *(len(sequence) for sequence in sequences)], dtype=torch.int64)
    return RolloutBuffer(
        prompts=prompts,
        tokens=torch.from_numpy(np.array([t for s in sequences for t in s], dtype=np.int64)),
        offsets=lengths.cumsum(0),
        prompt_lengths=torch.tensor([len(r.prompt) for r in requests], dtype=torch.int64),
        sample_ids=ids,
        group_ids=ids // samples_per_prompt,
        mask=torch.ones(len(logprobs), dtype=torch.bool),
        rollout_logprobs=torch.tensor(logprobs, dtype=torch.float32),
        truncated=torch.tensor([g.truncated for g in generations], dtype=torch.bool),
    )
