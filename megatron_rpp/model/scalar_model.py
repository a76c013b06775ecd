"""A model with one number per position instead of a vocabulary: a critic or a reward model.

The layers are those of the policy; the output projection is a vector `score.weight` [1, h], which every
tensor-parallel rank holds. Left out: heads with several labels, a bias (classifiers of transformers have
none).
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_rpp.hf.families import HEAD
from megatron_rpp.model.language_model import LanguageModel, chunks

from megatron.core.transformer.module import MegatronModule


class ScalarHead(torch.nn.Module):
    """The output projection to one number."""

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(1, hidden, dtype=dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns fp32 numbers [n] of hidden rows [n, h].

        All tensor-parallel ranks compute the same, so the gradients of `hidden` and of the weight are
        those of the whole on each of them.
        """
        return torch.nn.functional.linear(hidden.float(), self.weight.float()).squeeze(1)


class ScalarModel(LanguageModel):
    """One chunk (pipeline stage, or part of one) of a model with a scalar head."""

    score: ScalarHead
    """Only on the last chunk."""

    def __init__(self, *, architecture: dict[str, Any], **kwargs: Any) -> None:
        # Embeddings that are tied to an output projection have no projection here to be tied to.
        kwargs["share_embeddings_and_output_weights"] = False
        super().__init__(architecture=architecture | HEAD, **kwargs)
        if self.post_process:
            del self.output_layer
            self.score = ScalarHead(self.config.hidden_size, self.config.params_dtype)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As Megatron's, without the rules of its language models for an output layer."""
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)


def scalars(model: torch.nn.Module, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The numbers [n], fp32, of a scalar model at `rows` [n] of its last stage's output [t, 1, h]."""
    stage = chunks(model)[-1]
    assert isinstance(stage, ScalarModel)
    return stage.score(hidden[rows, 0])
