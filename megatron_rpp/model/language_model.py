"""The policy network: Megatron's GPTModel without the output projection.

`forward` returns hidden states. `logprobs.py` applies the output projection to response rows, in
chunks; `sampling_logits` applies it to one row per sequence in generation. So the logits of a whole
micro-batch never exist.

A rank's part of the model is a list of chunks: a single one unless pipeline stages are interleaved.

Shape legend: t tokens of a packed row, s sequence, b batch, h hidden, v vocabulary rows of this
tensor-parallel rank.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_rpp.model.attention import Row
from megatron_rpp.model.rotary import Rotation
from megatron_rpp.parallel import products
from megatron_rpp.records import Packing

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region


class LanguageModel(GPTModel):
    """One chunk (pipeline stage, or part of one) of a decoder-only transformer."""

    def __init__(self, *, architecture: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(position_embedding_type="rope", **kwargs)
        self.architecture = architecture  # see ModelConfig.architecture; checkpoints keep it
        self.true_vocab_size = architecture["vocab_size"]  # without the embedding's padding rows
        self._angles: torch.Tensor | None = None
        self._rotation: Rotation | None = None

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        packing: Packing | None = None,
    ) -> torch.Tensor:
        """Returns the hidden states after this chunk.

        Args:
            tokens: [b, s] token ids, or [1, t] packed. Only the first chunk reads the ids; all
                chunks read the shape.
            positions: [t], the position of each token of a packed row; None for whole sequences from
                position 0.
            packing: the positions of the sequences in a packed row; None for a batch.
        Returns:
            [s, b, h], packed [t, 1, h]; normalised after the last chunk. Under sequence parallelism
            the sequence dimension is split over the tensor-parallel ranks, except after the last
            chunk.
        """
        taken = slice(tokens.shape[1]) if positions is None else positions
        fused = self.config.apply_rope_fusion
        hidden = None  # later chunks read the input that set_input_tensor stored in the decoder
        if self.pre_process:
            hidden = self.embedding(input_ids=tokens, position_ids=None)
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=self._rotary_angles()[taken] if fused else None,
            packed_seq_params=Row.of(packing, None if fused else self.rotation().at(taken)),
        )
        if self.post_process and self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden

    def _rotary_angles(self) -> torch.Tensor:
        """The angle of each position and channel, [s, 1, 1, d]."""
        if self._angles is None:
            # If ranks share a sequence, it is padded, even one of the maximum length.
            padding = 2 * self.pg_collection.cp.size() * self.pg_collection.tp.size()
            self._angles = self.rotary_pos_emb.get_emb(self.max_sequence_length + padding)
        return self._angles

    def rotation(self) -> Rotation:
        """The rotation of each position."""
        if self._rotation is None:
            angles = self._rotary_angles()[:, 0, 0]
            self._rotation = Rotation.of(angles, self.config.params_dtype)
        return self._rotation

    @property
    def output_weight(self) -> torch.Tensor:
        """This rank's rows [v, h] of the output projection; only on the last chunk."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    @property
    def valid_vocab_rows(self) -> int:
        """How many of this rank's rows belong to the vocabulary; the rest is padding."""
        rows = self.output_weight.shape[0]
        return max(0, min(rows, self.true_vocab_size - self.pg_collection.tp.rank() * rows))

    def sampling_logits(
        self, hidden: torch.Tensor, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns fp32 logits [n, vocabulary] of hidden rows [n, h] on every tensor-parallel rank.

        There is one row per sequence, so gathering it costs less than sorting the shards would.
        weight: `output_weight`, which may be packed; None = take it from the model.
        """
        shard = products.linear_fp32(hidden, self.output_weight if weight is None else weight)
        whole = all_gather_last_dim_from_tensor_parallel_region(shard, group=self.pg_collection.tp)
        return whole[:, : self.true_vocab_size]


def unwrap(chunk: torch.nn.Module) -> LanguageModel:
    """Returns the model inside Megatron's DDP and mixed-precision wrappers."""
    while not isinstance(chunk, LanguageModel):
        inner = chunk.module
        assert isinstance(inner, torch.nn.Module)
        chunk = inner
    return chunk


def chunks(model: torch.nn.Module) -> list[LanguageModel]:
    """Returns this rank's chunks of the model, in the order of their layers.

    `model` is the ModuleList that build.py returns, or one chunk; either may be wrapped.
    """
    return [unwrap(m) for m in (model if isinstance(model, torch.nn.ModuleList) else [model])]
