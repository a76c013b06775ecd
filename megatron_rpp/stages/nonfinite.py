"""What is not finite: found on one rank, known to all, never trained on.

A NaN of one rank is in every rank's gradient as soon as they are summed. So each rank looks at its
own loss and at its own gradients before that, all learn who found what, and all skip the update. A
step's log-probs are in every mini-batch of it and, by the normalisation, in every sample: a NaN
there ends the run.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.lifecycle.exit_codes import RunFailure
from megatron_rpp.model.pipeline import Backward
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron_rpp.rewards.validation import short
from megatron_rpp.rollout.buffer import RolloutBuffer

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
    if not all(bool(norm.isfinite()) for norm in backward.local_grad_norms):
        return _GRADIENT
    return 0


def check_columns(buffer: RolloutBuffer, columns: dict[str, torch.Tensor | None]) -> None:
    """Raises RunFailure, the same on every rank, where one of `columns` [R] of any rank has a NaN
    or infinity at a token that the policy wrote. Collective over the world.

    columns: by what the message calls them; None: there is none.
    """
    problem = None
    for name, column in columns.items():
        if column is None or problem is not None:
            continue
        wrong = (buffer.mask & ~column.isfinite()).nonzero().squeeze(1)
        if len(wrong):
            index = int(torch.searchsorted(buffer.response_offsets, wrong[0], right=True)) - 1
            problem = (
                f"{name} on rank {dist.get_rank()} have {len(wrong)} value(s) that are NaN "
                f"or infinite, the first in sample {int(buffer.sample_ids[index])} of the step, with "
                f"the prompt {short(buffer.prompts[index].example.prompt)}: look at the weights, "
                f"and resume from a checkpoint before, with a lower learning rate"
            )
    found = float(problem is not None)
    if groups.reduce_sums([found], dist.group.WORLD, dist.ReduceOp.MAX)[0]:
        problems = groups.gather_objects(problem, dist.group.WORLD)
        raise RunFailure(next(text for text in problems if text is not None))


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
