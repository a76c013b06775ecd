"""The output projection: matmul_fp32, and log-probs with their gradients, against fp32 autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from acceptance import work
from acceptance.figures import Figure
from acceptance.measure import gpu_peak, on_gpu, relative, seconds
from acceptance.scale import Scale
from megatron_rpp.model.logprobs import vocab_parallel_logprobs
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups, products

PRODUCT, NATS, GRADIENT = 1e-4, 1e-3, 0.02
"""Thresholds: of a product that is summed in fp32, relative (rounding to bf16 errs by 4e-3); of
log-probs and entropies, in nats; of gradients that are rounded to bf16 twice, relative."""
Pair = tuple[torch.Tensor, torch.Tensor]


def logprobs(scale: Scale) -> Iterator[Figure]:
    model, device = scale.wide, devices.device()
    assert model.vocab_size is not None
    random = torch.Generator(device).manual_seed(work.SEED)
    hidden = torch.randn(scale.head_rows, model.hidden, generator=random, device=device)
    weight = torch.randn(model.vocab_size, model.hidden, generator=random, device=device)
    hidden, weight = hidden.bfloat16(), (weight * model.init_std).bfloat16()
    targets = torch.randint(model.vocab_size, (scale.head_rows,), generator=random, device=device)

    few = hidden[:64]
    product = products.matmul_fp32(few, weight.t())
    error = relative(product, few.double() @ weight.double().t())
    yield Figure(name="matmul_fp32, product", value=error, at_most=PRODUCT)

    found, true = (
        _differentiated(function, (hidden.to(dtype), weight.to(dtype)), targets)
        for function, dtype in ((_ours, torch.bfloat16), (_plain, torch.float32))
    )
    for name, ours, theirs in zip(("log-probs", "entropies"), found, true):
        error = float((ours - theirs).abs().max())
        yield Figure(name=name, value=error, unit="nats", at_most=NATS)
    for name, ours, theirs in zip(
        ("gradient of hidden", "gradient of weight"), found[2:], true[2:]
    ):
        yield Figure(name=name, value=relative(ours, theirs), at_most=GRADIENT)
    del found, true

    def run(function: Callable[..., Pair], dtype: torch.dtype) -> Callable[[], object]:
        inputs = hidden.to(dtype), weight.to(dtype)
        return lambda: _differentiated(function, inputs, targets)

    ours, theirs = run(_ours, torch.bfloat16), run(_plain, torch.float32)
    yield Figure(name="ours", value=seconds(ours) * 1e3, unit="ms")
    yield Figure(name="fp32 autograd", value=seconds(theirs) * 1e3, unit="ms")
    yield from on_gpu("peak memory", lambda: _memory(ours, theirs, scale.speed.memory_share))


def _memory(
    ours: Callable[[], object], theirs: Callable[[], object], most: float | None
) -> Iterator[Figure]:
    peaks = [gpu_peak(ours), gpu_peak(theirs)]
    for name, peak in zip(("ours", "fp32 autograd"), peaks):
        yield Figure(name=f"peak memory, {name}", value=peak, unit="GB")
    yield Figure(name="peak memory, ours over autograd", value=peaks[0] / peaks[1], at_most=most)


def _ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Pair:
    logprobs, entropy = vocab_parallel_logprobs(
        hidden,
        weight,
        targets,
        valid_rows=len(weight),
        temperature=1.0,
        group=groups.tensor_group(),
        with_entropy=True,
    )
    assert entropy is not None
    return logprobs, entropy


def _plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Pair:
    logprobs = (hidden @ weight.t()).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def _differentiated(
    function: Callable[..., Pair], inputs: Pair, targets: torch.Tensor
) -> list[torch.Tensor]:
    """Log-probs, entropies, and the gradients of hidden and weight, which are `inputs`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    logprobs, entropy = function(*leaves, targets)
    gradients = torch.autograd.grad((logprobs + 0.1 * entropy).sum(), leaves)
    return [logprobs.detach(), entropy.detach(), *gradients]
