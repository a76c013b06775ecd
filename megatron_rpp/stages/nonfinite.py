"""NaN and infinity: if any rank finds one, all ranks skip the update.

Summing the gradients spreads a NaN of one rank to every rank. So each rank checks its own loss and
gradients before they are summed, and tells the others what it found. The log-probs of a step enter
all of its mini-batches and, through the normalisation, all advantages. A NaN among them ends the
run.
"""

from __future__ import annotations

from typing import Literal

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
Counter = Literal["skipped_in_a_row", "critic_skipped_in_a_row"]
"""The fields of RunState that count skipped updates."""


def skip_reason(backward: Backward) -> str | None:
    """Describes what is not finite and on which ranks; None if all is finite. Collective over the
    world.

    The text is the same on every rank. A nonfinite loss also makes the gradients nonfinite; the
    text then names the loss alone.
    """
    found = torch.zeros(dist.get_world_size(), dtype=torch.int32, device=devices.device())
    found[dist.get_rank()] = _local_code(backward, found)
    dist.all_reduce(found)
    codes = found.tolist()
    for code, what in ((_LOSS, "the loss"), (_GRADIENT, "the gradient")):
        ranks = [str(rank) for rank, found_code in enumerate(codes) if found_code == code]
        if ranks:
            return f"{what} on rank {', '.join(ranks)} is NaN or infinite"
    return None


def _local_code(backward: Backward, like: torch.Tensor) -> torch.Tensor:
    """What this rank found, in the dtype and on the device of `like`: the host need not wait."""
    sound = like.new_zeros(())
    wrong_gradient = torch.where(_all_finite(backward.local_grad_norms, like), sound, _GRADIENT)
    return torch.where(_all_finite(backward.reports, like), wrong_gradient, _LOSS)


def _all_finite(values: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    finite = [like.new_ones((), dtype=torch.bool), *(value.isfinite().all() for value in values)]
    return torch.stack(finite).all()


def check_columns(buffer: RolloutBuffer, columns: dict[str, torch.Tensor | None]) -> None:
    """Checks that `columns` [R] are finite at the tokens that the policy wrote. Collective.

    Args:
        columns: by the name that the message uses; None: no such column in this run.
    Raises:
        RunFailure: any rank has a NaN or an infinity; the message is the same on every rank.
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
                f"and resume from an earlier checkpoint with a lower learning rate"
            )
    found = float(problem is not None)
    if groups.reduce_sums([found], dist.group.WORLD, dist.ReduceOp.MAX)[0]:
        problems = groups.gather_objects(problem, dist.group.WORLD)
        raise RunFailure(next(text for text in problems if text is not None))


def count_skipped(
    state: RunState, reason: str | None, limit: int, *, counter: Counter = "skipped_in_a_row"
) -> None:
    """Counts in `state` how many updates in a row were skipped; the same on every rank.

    counter: the field of `state`. Raises RunFailure if there are `limit` of them.
    """
    count = 0 if reason is None else getattr(state, counter) + 1
    setattr(state, counter, count)
    if count >= limit:
        raise RunFailure(
            f"{limit} updates in a row were skipped (train.max_skipped_updates), the last because "
            f"{reason}: resume from the last checkpoint with a lower learning rate"
        )
