"""Each kernel for packed rows against plain attention, in bf16: outputs and gradients.

The truth is torch's scaled_dot_product_attention in fp32, called for one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F

from acceptance import work
from acceptance.figures import Figure
from acceptance.measure import relative
from acceptance.scale import Scale
from megatron_rpp.model.attention import CoreAttention, Row
from megatron_rpp.parallel import device as devices
from megatron_rpp.records import Packing
from megatron_rpp.rollout.packing import Split, pack

LIMIT = 0.02
"""Of the largest true value; bf16 rounds to 1/256, and a kernel rounds probabilities and sums."""
NAMES = ("output", "gradient of query", "gradient of key", "gradient of value")
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def attention(scale: Scale) -> Iterator[Figure]:
    module = next(m for m in work.stage(scale.pair).modules() if isinstance(m, CoreAttention))
    samples, device = work.buffer(scale.pair, scale.row), devices.device()
    batch = pack(
        samples, list(range(len(samples))), Split(), row_length=sum(scale.row), device=device
    )
    packing = batch.packing
    config = module.config
    heads = (config.num_attention_heads, config.num_query_groups, config.num_query_groups)
    random = torch.Generator(device).manual_seed(work.SEED)
    shapes = [(sum(scale.row), count, config.kv_channels) for count in (*heads, heads[0])]
    *inputs, upstream = (
        torch.randn(shape, generator=random, device=device, dtype=torch.bfloat16)
        for shape in shapes
    )

    true = _differentiated(_plain(packing), [x.float() for x in inputs], upstream.float())

    def compared(name: str, attend: Attend) -> Iterator[Figure]:
        found = _differentiated(attend, inputs, upstream)
        for what, ours, theirs in zip(NAMES, found, true, strict=True):
            yield Figure(name=f"{name}, {what}", value=relative(ours, theirs), at_most=LIMIT)

    def padded(*qkv: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(devices, "has_varlen_attention", lambda: False):
            return _own(module, packing)(*qkv)

    yield from compared("padded sequences", padded)
    if devices.has_varlen_attention():
        yield from compared("torch's kernel for packed rows", _own(module, packing))
    else:
        yield Figure(name="torch's kernel for packed rows", skipped="needs a CUDA device")
    if module.fused:
        yield from compared("TransformerEngine", _engine(module, packing))
    else:
        yield Figure(name="TransformerEngine", skipped="it is not installed, or there is no GPU")


def _differentiated(
    attend: Attend, inputs: list[torch.Tensor], upstream: torch.Tensor
) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = attend(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def _own(module: CoreAttention, packing: Packing) -> Attend:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        row = (x[:, None] for x in (query, key, value))
        return module._packed(*row, packing=packing).view_as(query)

    return attend


def _engine(module: CoreAttention, packing: Packing) -> Attend:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        row = (x[:, None] for x in (query, key, value))
        return module(*row, packed_seq_params=Row.of(packing)).view_as(query)

    return attend


def _plain(packing: Packing) -> Attend:
    """Attention of one sequence at a time, [t, heads, d] each."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        lengths = packing.boundaries.diff().tolist()
        groups = query.shape[1] // key.shape[1]
        outputs = []
        for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths)):
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
            heads = (x.transpose(0, 1)[None] for x in (q, k, v))
            outputs.append(F.scaled_dot_product_attention(*heads, is_causal=True)[0])
        return torch.cat(outputs, 1).transpose(0, 1)

    return attend
