"""Mean and variance of masked values over the ranks of a process group, and whitening with them.

REINFORCE++ (arXiv 2501.03262) normalises its advantages over all tokens of the whole rollout
batch. So the statistics are those of the union of all ranks' values. A mean of the ranks' means
would be wrong if one rank holds more tokens than another. E[x^2] - E[x]^2 cancels: for saturated
rewards it goes negative, and its root is NaN. Each rank sends four fp64 numbers, and every rank
merges them in rank order with Chan's formula (Chan, Golub, LeVeque 1979), so all ranks get the same
bits. The numbers are differences from one value of the batch, so a large common offset costs no
digits. Left out: running statistics across steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rpp.algorithms.numerics import check_mask, on_collective_device, select

VARIANCE_FLOOR = 1e-8


@dataclass(frozen=True)
class Moments:
    """Count, mean and population variance of a set of values; all are 0 for the empty set."""

    count: float
    mean: float
    var: float

    def merge(self, other: Moments) -> Moments:
        """Moments of the union of two sets, by Chan's formula on (count, mean, M2 = count * var).

        Two equal means merge to exactly that mean, and merging the empty set changes nothing.
        """
        if self.count == 0 or other.count == 0:
            return self if other.count == 0 else other
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.count * self.var + other.count * other.var
        m2 += delta * delta * (self.count * other.count / count)
        return Moments(count, mean, m2 / count)


def moments(values: Tensor, mask: Tensor, group: dist.ProcessGroup | None = None) -> Moments:
    """Computes the moments of the masked values of all ranks of ``group``; same bits on each rank.

    Collective: every rank of the group must call it, even if its mask is empty.

    Args:
        values, mask: this rank's part of the batch, of the same shape; the mask is bool. Ranks must
            hold different values, because copies of a value are all counted.
        group: the ranks that share the batch; None for this process alone.

    Raises:
        ValueError: a masked value of any rank is NaN or infinite (raised on every rank).
    """
    origin, stats = _from_origin(values, mask, group)
    return Moments(stats.count, origin + stats.mean, stats.var)


def global_whiten(
    values: Tensor, mask: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Moments]:
    """Returns ``(x - mean) / sqrt(max(var, 1e-8))`` under the mask, with moments over all ranks.

    If the variance is 0 or all masks are empty, the result is all zeros.

    Args, Raises:
        as in ``moments``.

    Returns:
        The whitened values, in the shape and dtype of ``values``, 0 outside the mask, without
        gradient; and the moments before whitening, for the log.
    """
    values = values.detach()
    origin, stats = _from_origin(values, mask, group)
    std = math.sqrt(max(stats.var, VARIANCE_FLOOR))
    whitened = (values.double() - origin - stats.mean) / std
    stats = Moments(stats.count, origin + stats.mean, stats.var)
    return select(whitened, mask).to(values.dtype), stats


def _from_origin(
    values: Tensor, mask: Tensor, group: dist.ProcessGroup | None
) -> tuple[float, Moments]:
    """Returns an origin and the moments of all ranks' values minus it. Raises as ``moments``.

    The origin is the first value of the first rank that has one. If the values are close to each
    other, subtracting it rounds nothing, so mean and variance keep all digits of fp64, however
    large the values are. Equal values have a variance of exactly 0.
    """
    check_mask(mask, values)
    gathered = [_local_moments(values, mask)]
    if group is not None:
        local, size = on_collective_device(gathered[0], group), dist.get_world_size(group)
        assert size > 0, "this rank is not in the group"
        gathered = [torch.empty_like(local) for _ in range(size)]
        dist.all_gather(gathered, local, group=group)
    ranks = torch.stack(gathered).tolist()
    origin = next((first for count, first, _, _ in ranks if count), 0.0)
    total = reduce(
        Moments.merge,
        (Moments(count, first - origin + mean, var) for count, first, mean, var in ranks),
    )
    if not (math.isfinite(total.mean) and math.isfinite(total.var)):
        raise ValueError(
            f"mean {total.mean}, variance {total.var}: a value under the mask is NaN or infinite; "
            "look at the rewards and the log-probs of this step"
        )
    return origin, total


def _local_moments(values: Tensor, mask: Tensor) -> Tensor:
    """Returns fp64 [4] of this rank: count, first value, mean and variance of values minus the first.

    The variance is computed in two passes, because E[x^2] - E[x]^2 cancels.
    """
    chosen = values.detach()[mask].double()
    if chosen.numel() == 0:
        return chosen.new_zeros(4)
    shifted = chosen - chosen[0]
    center = shifted.mean()
    variance = (shifted - center).square().mean()
    return torch.stack([center.new_tensor(chosen.numel()), chosen[0], center, variance])
