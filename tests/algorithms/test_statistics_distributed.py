"""Whitening over real gloo ranks equals whitening in one process, however the rows are distributed.

One world of four processes serves the whole module. It runs every case on sub-groups of 1, 2 and 4
ranks and returns what each rank computed. The same four ranks also form a grid of two pipeline
stages, or two context-parallel parts, by two replicas. There, wrong ways (a mean per rank, the world
as group, context-parallel ranks left out) must fail the assertion that the right way passes.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rpp.algorithms import Moments, global_whiten, shape_scores
from megatron_rpp.algorithms.advantages import compute_advantages
from tests.distributed import RankFailed, run_ranks

ROWS, LENGTH = 12, 7
# Rows of each rank: even, ragged, the first or the last or another rank empty, all but one empty.
SPLITS = {
    1: [[12]],
    2: [[6, 6], [1, 11], [0, 12], [12, 0]],
    4: [[3, 3, 3, 3], [1, 2, 0, 9], [0, 4, 4, 4], [6, 5, 1, 0], [0, 0, 12, 0], [12, 0, 0, 0]],
}
CASES = [(size, split) for size, splits in SPLITS.items() for split in splits]


def batch(kind):
    """(values, mask) [ROWS, LENGTH], the same on every rank."""
    rng = np.random.default_rng(7)
    mask = torch.tensor(rng.random((ROWS, LENGTH)) < 0.6)
    noise = torch.tensor(rng.normal(size=(ROWS, LENGTH)))
    values = {
        "noise": noise * torch.arange(1.0, ROWS + 1)[:, None],
        "offset": 1e6 + noise,
        "constant": torch.full_like(noise, 0.9),
        "narrow": 5 + 1e-3 * torch.sign(noise),
        "nothing": noise,
        "one token": noise,
    }[kind]
    if kind in ("nothing", "one token"):
        mask = torch.zeros_like(mask)
    mask[4, 2] |= kind == "one token"
    return torch.where(mask, values, torch.nan), mask


KINDS = ("noise", "offset", "constant", "narrow", "nothing", "one token")


def my_rows(split, rank):
    start = sum(split[:rank])
    return slice(start, start + split[rank])


def broken_whiten(values, mask, group):
    """Megatron-LM#4590: the mean of the ranks' means and variances."""
    live = values[mask]
    local = torch.stack([live.mean(), live.var(correction=0)]) if len(live) else torch.zeros(2)
    local = local.double()
    dist.all_reduce(local, group=group)
    mean, var = (local / dist.get_world_size(group)).tolist()
    return torch.where(mask, (values - mean) / max(var, 1e-8) ** 0.5, 0.0)


class Grid(NamedTuple):
    """This rank's groups in a grid of 2 x 2. Ranks 2r and 2r + 1 are the two pipeline stages (or
    context-parallel parts) of replica r, as Megatron orders them for its data-parallel groups."""

    replica: int
    stage: int
    same_stage: dist.ProcessGroup  # one rank of each replica: data parallel


def grid(rank):
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    return Grid(rank // 2, rank % 2, columns[rank % 2])


def stages_of_a_pipeline(where, world):
    """Both stages of a replica hold its rows, but only the last stage computes their values.

    The first stage's copy has not been broadcast yet, so a group that includes it counts stale
    data.
    """
    values, mask = (x[my_rows([4, 8], where.replica)] for x in batch("noise"))
    if where.stage == 0:
        values = torch.where(mask, 0.0, values)
    return {
        "right": global_whiten(values, mask, where.same_stage),
        "world group": global_whiten(values, mask, world),
        "mean per rank": (broken_whiten(values, mask, where.same_stage), None),
    }


def parts_of_a_context(where, world):
    """Cuts a replica's rows in two along the sequence; each of its ranks holds one part."""
    values, mask = (x[my_rows([4, 8], where.replica)] for x in batch("noise"))
    part = slice(3) if where.stage == 0 else slice(3, None)
    values, mask = values[:, part], mask[:, part]
    return {
        "right": global_whiten(values, mask, world),
        "context left out": global_whiten(values, mask, where.same_stage),
    }


def reinforce_inputs():
    """(scores, kl, mask, group_ids) of ROWS responses to ROWS / 2 prompts."""
    kl, mask = batch("noise")
    return torch.arange(float(ROWS)).sin(), kl, mask, torch.arange(ROWS) // 2


def reinforce(scores, kl, mask, ids, group=None):
    return compute_advantages(
        "reinforce++", scores, mask, group_ids=ids, kl=kl, kl_coef=0.1, group=group
    )


def run_everything(rank):
    groups = {size: dist.new_group(range(size)) for size in SPLITS}
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results = {}
    for size, split in CASES:
        if rank >= size:
            continue
        rows, group = my_rows(split, rank), groups[size]
        for kind in KINDS:
            values, mask = (x[rows] for x in batch(kind))
            results[kind, size, str(split)] = global_whiten(values, mask, group)
        inputs = [x[rows] for x in reinforce_inputs()]
        results["reinforce++", size, str(split)] = reinforce(*inputs, group)
        results["scores", size, str(split)] = shape_scores(
            inputs[0], normalize=True, scale=2.0, clip=1.0, group=group
        )
    values, mask = batch("noise")
    results["pair"] = global_whiten(values * 10.0 ** (rank // 2), mask, pairs[rank // 2])
    results["alone"] = global_whiten(values + rank, mask)
    where = grid(rank)
    results["pipeline"] = stages_of_a_pipeline(where, groups[4])
    results["context"] = parts_of_a_context(where, groups[4])
    poisoned = torch.full((1, 2), torch.nan if rank == 2 else 1.0)
    try:
        global_whiten(poisoned, torch.ones(1, 2, dtype=torch.bool), groups[4])
    except ValueError as error:
        results["error"] = str(error)
    return results


def assert_equal(whitened, expected):
    """The assertions that whitening must satisfy on any layout."""
    np.testing.assert_allclose(whitened, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(run_everything, 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "split"), CASES)
def test_equal_to_one_process(ranks, kind, size, split):
    expected, expected_stats = global_whiten(*batch(kind))
    parts = [ranks[r][kind, size, str(split)] for r in range(size)]
    assert_equal(torch.cat([part for part, _ in parts]), expected)
    stats = parts[0][1]
    assert all(other == stats for _, other in parts), "not the same bits on all ranks"
    assert stats.count == expected_stats.count
    np.testing.assert_allclose(stats.mean, expected_stats.mean, rtol=1e-12)
    np.testing.assert_allclose(stats.var, expected_stats.var, rtol=1e-12)


@pytest.mark.parametrize(("size", "split"), CASES)
def test_constant_rewards_are_exactly_zero_on_any_layout(ranks, size, split):
    for rank in range(size):
        whitened, stats = ranks[rank]["constant", size, str(split)]
        assert not whitened.any() and (stats.mean, stats.var) == (0.9, 0.0)


@pytest.mark.parametrize(("size", "split"), CASES)
def test_all_empty(ranks, size, split):
    for rank in range(size):
        whitened, stats = ranks[rank]["nothing", size, str(split)]
        assert not whitened.any() and stats == Moments(0, 0, 0)


@pytest.mark.parametrize(("size", "split"), CASES)
def test_reinforce_is_the_same_on_any_layout(ranks, size, split):
    expected, expected_returns, _ = reinforce(*reinforce_inputs())
    parts = [ranks[r]["reinforce++", size, str(split)] for r in range(size)]
    got, returns = (torch.cat([part[i] for part in parts]) for i in range(2))
    np.testing.assert_allclose(returns, expected_returns, rtol=1e-12)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "split"), CASES)
def test_scores_are_normalised_over_the_global_batch(ranks, size, split):
    expected, expected_stats = shape_scores(
        reinforce_inputs()[0], normalize=True, scale=2.0, clip=1.0
    )
    parts = [ranks[r]["scores", size, str(split)] for r in range(size)]
    np.testing.assert_allclose(torch.cat([part for part, _ in parts]), expected, rtol=1e-6)
    for _, stats in parts:
        assert (stats.low, stats.high) == (expected_stats.low, expected_stats.high) == (-1, 1)
        assert stats.clipped_share == pytest.approx(expected_stats.clipped_share)
        assert stats.shaped.var == pytest.approx(expected_stats.shaped.var, rel=1e-6)


def of_the_grid(ranks, case, variant):
    """The whole whitened batch, from the last stages or from all parts of both replicas."""
    whitened = [result[case][variant][0] for result in ranks]
    if case == "context":
        whitened = [torch.cat(whitened[r : r + 2], dim=1) for r in (0, 2)]
        return torch.cat(whitened)
    return torch.cat(whitened[1::2])


@pytest.mark.parametrize("case", ["pipeline", "context"])
def test_a_grid_of_ranks_equals_one_process(ranks, case):
    assert_equal(of_the_grid(ranks, case, "right"), global_whiten(*batch("noise"))[0])


@pytest.mark.parametrize(
    ("case", "variant"),
    [("pipeline", "mean per rank"), ("pipeline", "world group"), ("context", "context left out")],
)
def test_the_usual_mistakes_fail_that_assertion(ranks, case, variant):
    """Megatron-LM#4590, slime#2235 and slime#391."""
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equal(of_the_grid(ranks, case, variant), global_whiten(*batch("noise"))[0])


def test_only_the_given_group_counts(ranks):
    """slime#2235: the other pair of ranks holds values ten times as large."""
    values, mask = batch("noise")
    for rank in range(4):
        whitened, stats = ranks[rank]["pair"]
        scale = 10.0 ** (rank // 2)
        expected, alone = global_whiten(values * scale, mask)
        np.testing.assert_allclose(whitened, expected, rtol=1e-12)
        assert stats.count == 2 * alone.count
        assert stats.mean == pytest.approx(alone.mean, rel=1e-12)


def test_no_group_means_this_process_alone(ranks):
    values, mask = batch("noise")
    for rank in range(4):
        assert ranks[rank]["alone"][1] == global_whiten(values + rank, mask)[1]


def test_a_nan_on_one_rank_is_an_error_on_all(ranks):
    assert len({result["error"] for result in ranks}) == 1
    assert "NaN or infinite" in ranks[0]["error"]


def fail_on_one(rank):
    if rank == 1:
        raise KeyError("the reason why")
    dist.barrier()


def wait_for_a_rank_that_never_comes(rank):
    if rank == 1:
        time.sleep(600)
    dist.barrier()


def test_a_failing_rank_fails_the_test_with_its_traceback(tmp_path):
    with pytest.raises(RankFailed) as caught:
        run_ranks(fail_on_one, 2, tmp_path)
    first_report = str(caught.value).split("rank 0:")[0]
    assert first_report.startswith("rank 1:") and "in fail_on_one" in first_report
    assert "the reason why" in first_report


def test_a_hanging_rank_is_ended(tmp_path):
    with pytest.raises(TimeoutError, match="never_comes on 2 ranks"):
        run_ranks(wait_for_a_rank_that_never_comes, 2, tmp_path, timeout=4.0)
    assert not torch.multiprocessing.active_children()
