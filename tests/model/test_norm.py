"""RMSNorm against PyTorch's operation and against finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_rpp.model.norm import _RMSNorm, rms_norm

EPS = 1e-5


def inputs(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*shape, generator=generator, dtype=dtype) * 3
    return x.requires_grad_(), (x.detach().mean(tuple(range(x.dim() - 1))) + 1).requires_grad_()


@pytest.mark.parametrize("shape", [(7, 16), (5, 1, 48), (3, 2, 4, 8)])
def test_values_and_gradients_are_those_of_pytorch(shape):
    """To 1e-6 of the largest: fp32 rounding of sums over at most 48 channels and 24 rows."""
    x, weight = inputs(*shape)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    ours = torch.autograd.grad(rms_norm(x, weight, EPS), (x, weight), upstream)
    expected = F.rms_norm(x, shape[-1:], weight, EPS)
    theirs = torch.autograd.grad(expected, (x, weight), upstream)
    with torch.no_grad():
        value = rms_norm(x, weight, EPS)
    for got, wanted in zip([value, *ours], [expected, *theirs], strict=True):
        assert (got - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_gradients_against_finite_differences():
    x, weight = inputs(3, 2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: _RMSNorm.apply(x, w, EPS), (x, weight))


def test_16_bit_numbers_are_normalised_in_fp32():
    x, weight = (tensor.detach().bfloat16() for tensor in inputs(6, 64))
    exact = F.rms_norm(x.double(), (64,), weight.double(), EPS)
    assert (rms_norm(x, weight, EPS) - exact).abs().max() <= 2**-8 * exact.abs().max()
