"""The rotation of queries and keys, against complex numbers and finite differences."""

from __future__ import annotations

import torch

from megatron_rpp.model.rotary import Rotation

SIZE, TOKENS = 6, 5
ANGLES = torch.rand(TOKENS, SIZE // 2, generator=torch.Generator().manual_seed(1)) * 6
ROTATION = Rotation.of(ANGLES.repeat(1, 2), torch.float64)


def heads(*shape):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*shape, SIZE, generator=generator, dtype=torch.float64)


def test_channels_turn_as_complex_numbers():
    given = heads(TOKENS, 1, 3)
    plane = torch.complex(*given.chunk(2, -1))
    turned = plane * torch.polar(torch.ones(()), ANGLES)[:, None, None].to(plane)
    expected = torch.cat([turned.real, turned.imag], -1)
    found = ROTATION.rotate(given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # sines of fp32 angles
    assert torch.equal(ROTATION.rotate(given[:, 0]), found[:, 0])


def test_each_token_takes_the_angles_of_its_position():
    given, positions = heads(3, 2), torch.tensor([4, 0, 4])
    found = ROTATION.at(positions).rotate(given)
    for row, position in enumerate(positions.tolist()):
        one = ROTATION.at(slice(position, position + 1)).rotate(given[row : row + 1])
        assert torch.equal(found[row], one[0])


def test_the_gradient_is_that_of_finite_differences():
    given = heads(TOKENS, 2).requires_grad_()
    assert torch.autograd.gradcheck(ROTATION.rotate, given)
