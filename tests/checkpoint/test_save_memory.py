"""A save of the distributed optimizer allocates no more than what the rank writes.

Tensors are counted, not the resident set, so the numbers are the same in every run. For comparison,
the same save in Megatron's own form, which gathers the optimizer's whole state.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rpp.checkpoint import state as checkpoint
from megatron_rpp.checkpoint.optimizer_state import allocate_moments
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.model.trained_model import TrainedModel
from megatron_rpp.parallel import groups
from megatron_rpp.runtime.host_memory import host_estimate
from megatron_rpp.runtime.policy import build_policy
from tests.distributed import run_ranks
from tests.runtime.live_bytes import LiveBytes
from tests.small_run import config_of
from tests.whole_runs import layout

VOCAB = 100
WIDE = {"model__hidden": 128, "model__ffn_hidden": 384}


def gathering(trained: TrainedModel, weights: dict, *, loading: bool = False) -> dict:
    """In the place of `optimizer_state`: Megatron's form."""
    (part,) = trained.optimizer.chained_optimizers
    form = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
    }
    return part.sharded_state_dict(weights, is_loading=loading, metadata=form)


def peaks(rank: int, folder: Path, settings: dict) -> tuple[int, int, int]:
    """(bytes of tensors that a save added, of one that gathers, what the estimate says)."""
    config = config_of(folder, folder, model__vocab_size=VOCAB, **settings)
    with layout(config):
        policy = build_policy(config, config.optimizer, VOCAB)
        allocate_moments(policy.optimizer)
        found = []
        for step, form in enumerate((checkpoint.optimizer_state, gathering)):
            with pytest.MonkeyPatch.context() as patch, LiveBytes() as live:
                patch.setattr(checkpoint, "optimizer_state", form)
                pending = checkpoint.save(policy, RunState(step=step), config.checkpoint)
                pending.publish()
            found.append(live.peak)
        return *found, host_estimate(config, VOCAB, groups.data_size()).save


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_save_gathers_nothing(dtype, tmp_path):
    """Of two replicas, each holds a half of Adam's state; a gather needs all of it, more than once."""
    for ours, gathered, written in run_ranks(
        peaks, 2, tmp_path, tmp_path, WIDE | {"model__dtype": dtype}
    ):
        assert ours <= written, "at most a copy of what the rank writes"
        assert gathered > 2 * written, "a gather would be seen"
