"""Products, with and without a packed weight, against fp64."""

from __future__ import annotations

import pytest
import torch

from megatron_rpp.parallel import products


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pack", [products.packed, lambda weight: weight], ids=["packed", "plain"])
def test_linear(rows, with_bias, dtype, pack):
    """The weight is a part of a larger tensor."""
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(rows, 40, generator=generator).to(dtype)
    weight = torch.randn(2 * 24, 40, generator=generator).to(dtype)[24:]
    bias = torch.randn(24, generator=generator).to(dtype) if with_bias else None
    exact = left.double() @ weight.double().t() + (0 if bias is None else bias.double())
    found = products.linear(left, pack(weight), bias)
    assert found.dtype == dtype
    # 40 products: their fp32 rounding, or one rounding to bf16.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    assert (found - exact).abs().max() <= tolerance * exact.abs().max()


def test_a_packed_weight_is_a_copy():
    """Later changes of the weight do not reach it."""
    weight = torch.ones(4, 8)
    packed = products.packed(weight)
    weight.zero_()
    assert products.linear(torch.ones(1, 8), packed).tolist() == [[8.0] * 4]
