"""Loss and gradients that are not finite: found on one rank, known to all, never trained on.

A NaN of one rank is in every rank's gradient as soon as they are summed. So each rank looks at its
own loss and at its own gradients before that, all learn who found what, and all skip the update.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_rpp.failures import RunFailure
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel.pipeline import Backward
from megatron_rpp.run_state import RunState

_LOSS, _GRADIENT = 1, 2


def fault(backward: Backward) -> str | None:
    """What is not finite, and on which ranks; None where all is. Collective over the world.

    The same text on every rank. Where a loss is to blame, gradients follow and are not named.
    """
    found = torch.zeros(dist.get_world_size(), dtype=torch.int32, device=devices.device())
    found[dist.get_rank()] = _own_fault(backward)
    dist.all_reduce(found)
    codes = found.tolist()
    for code, what in ((_LOSS, "the loss"), (_GRADIENT, "the gradient")):
        ranks = [str(rank) for rank, own in enumerate(codes) if own == code]
        if ranks:
            return f"{what} on rank {', '.join(ranks)} is NaN or infinite"
    return None


def _own_fault(backward: Backward) -> int:
    if not all(bool(report.isfinite().all()) for report in backward.reports):
        return _LOSS
    if not all(bool(norm.isfinite()) for norm in backward.own_norms):
        return _GRADIENT
    return 0


def count(state: RunState, fault: str | None, limit: int) -> None:
    """Counts skipped updates in a row in `state`, the same on every rank.

    Raises RunFailure where there are `limit` of them.
    """
    state.skipped_in_a_row = 0 if fault is None else state.skipped_in_a_row + 1
    if state.skipped_in_a_row >= limit:
        raise RunFailure(
            f"{limit} updates in a row were skipped (train.max_skipped_updates), the last because "
            f"{fault}: resume from the last checkpoint, with a lower learning rate"
        )
