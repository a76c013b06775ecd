"""The whole loop gives the same numbers on every layout of ranks.

Every case trains from the same seed (three steps of two epochs of two mini-batches, real generation)
and is compared with the same recipe on one rank: all metrics of every step, the held-out answers, the
final weights. Some cases also recompute activations and overlap the communication of data-parallel
ranks with computation. `pytest -s` shows the table. Three runs with a reduction that is broken on purpose show
that the comparison can fail.

Adam divides a gradient by its own size. So an element whose gradient is only fp32 rounding moves as
far as any other, in a random direction. The tests set Adam's epsilon above that rounding;
`PLAIN_ADAM` keeps the usual 1e-8 and shows the effect.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from megatron_rpp.parallel import groups
from megatron_rpp.stages import advantage, update
from tests.distributed import run_ranks
from tests.hf.models import save
from tests.small_run import config_of, make_data
from tests.whole_runs import (
    TOLERANCE,
    VARIED,
    Deviation,
    compare_rows,
    compare_weights,
    rows,
    small_buckets,
    train_run,
    weights,
)

RECIPES = {
    "reinforce++": {},
    "baseline": {
        "algorithm__name": "reinforce++_baseline",
        "algorithm__kl_coef": 0,
        "algorithm__kl_loss_coef": 0.05,
    },
    "all options": {
        "model__tied_embeddings": "true",
        "algorithm__aggregation": "sequence_mean",
        "algorithm__entropy_coef": 0.01,
        "algorithm__kl_estimator": "k3",
        "algorithm__kl_loss_coef": 0.02,
        "algorithm__gamma": 0.9,
        "algorithm__dual_clip": 1.2,
        "reward__normalize": "true",
        "reward__clip": 1.5,
        "rollout__temperature": 0.8,
        "rollout__top_p": 0.95,
        "rollout__top_k": 20,
        "rollout__min_new_tokens": 2,
        "rollout__max_batch": 7,
        "rollout__max_cache_tokens": 256,
        "optimizer__warmup_steps": 2,
        "optimizer__decay_steps": 10,
        "optimizer__weight_decay": 0.1,
    },
    "ppo": {
        "algorithm__name": "ppo",
        "algorithm__gae_lambda": 0.9,
        "critic__value_clip": 0.1,
        "critic__optimizer__lr": 2e-3,
        "critic__optimizer__eps": 1e-5,
    },
    # A classifier of random weights in the folder of the runs; the policy's tokenizer reads for it.
    "reward model": {"reward__functions": "[tests.whole_runs:varied, model:FOLDER/qwen3-score]"},
}
TP2, PP2, CP2 = ({f"parallel__{kind}": 2} for kind in ("tensor", "pipeline", "context"))
VPP2 = PP2 | {"parallel__virtual_pipeline": 2}
SP = {"parallel__sequence_parallel": "true"}
OVERLAP = {"parallel__overlap_grad_reduce": "true", "parallel__overlap_param_gather": "true"}
FULL = {"train__recompute": "full"}
FIRST = FULL | {"train__recompute_method": "block"}
SELECTIVE = {"train__recompute": "selective"}
ONE_BY_ONE = {"rollout__max_cache_tokens": 32}  # sequences in the cache: one for each stage


class Case(NamedTuple):
    name: str
    ranks: int
    recipe: str
    settings: dict


CASES = [
    Case("offloaded reference", 1, "reinforce++", {"reference__placement": "offload"}),
    Case("micro-batches of 1-2", 1, "reinforce++", {"train__max_tokens_per_microbatch": 40}),
    Case("TP2", 2, "reinforce++", TP2),
    Case("TP2 SP", 2, "reinforce++", TP2 | SP),
    Case("PP2", 2, "reinforce++", PP2),
    Case("PP2 VPP2", 2, "reinforce++", VPP2),
    Case("CP2", 2, "reinforce++", CP2),
    Case("DP2", 2, "reinforce++", {}),
    Case("DP2 whole optimizer", 2, "reinforce++", {"optimizer__distributed": "false"}),
    Case("TP2", 2, "baseline", TP2),
    Case("CP2 offloaded", 2, "baseline", CP2 | {"reference__placement": "offload"}),
    Case("DP2", 2, "baseline", {}),
    Case("PP2 VPP2, one by one", 2, "all options", VPP2 | ONE_BY_ONE),
    Case("CP2", 2, "all options", CP2),
    Case("DP2 overlap, full", 2, "reinforce++", OVERLAP | FULL),
    Case("CP2 overlap, first layer", 2, "all options", CP2 | OVERLAP | FIRST),
    Case("TP2xPP2", 4, "reinforce++", TP2 | PP2),
    Case("TP2xDP2", 4, "reinforce++", TP2),
    Case("DP2xCP2", 4, "reinforce++", CP2),
    Case("PP2xDP2", 4, "baseline", PP2),
    Case("TP2xCP2 SP", 4, "all options", TP2 | CP2 | SP),
    Case("PP2xCP2 VPP2", 4, "baseline", VPP2 | CP2),
    Case("TP2xPP2 SP VPP2", 4, "all options", TP2 | VPP2 | SP),
    Case("DP4, one by one", 4, "all options", ONE_BY_ONE),
    Case("TP2xDP2 SP overlap, selective", 4, "baseline", TP2 | SP | OVERLAP | SELECTIVE),
    Case("TP2 SP", 2, "ppo", TP2 | SP),
    Case("PP2 VPP2", 2, "ppo", VPP2),
    Case("CP2 whole optimizer", 2, "ppo", CP2 | {"critic__optimizer__distributed": "false"}),
    Case("DP2 overlap, selective", 2, "ppo", OVERLAP | SELECTIVE),
    Case("TP2xPP2 SP", 4, "ppo", TP2 | PP2 | SP),
    Case("DP2xCP2", 4, "ppo", CP2),
    Case("TP2 SP offloaded", 2, "reward model", TP2 | SP | {"reward__model_placement": "offload"}),
    Case("PP2 VPP2", 2, "reward model", VPP2),
    Case("CP2", 2, "reward model", CP2),
    Case("TP2xDP2", 4, "reward model", TP2),
    Case("PP2xDP2 VPP2 overlap, full", 4, "all options", VPP2 | OVERLAP | FULL),
]
BROKEN = {
    # slime#2235: each rank normalises over its own samples alone.
    "whitened per rank": Case("DP2, whitened per rank", 2, "reinforce++", {}),
    # Megatron-LM#4590: the loss of a rank is the mean over its own tokens.
    "mean of means": Case("DP2, mean of means", 2, "reinforce++", {}),
    # Only the first context-parallel rank's tokens are counted.
    "context left out": Case("CP2, context left out", 2, "reinforce++", CP2),
}
PLAIN_ADAM = Case("TP2, Adam's eps 1e-8", 2, "reinforce++", TP2 | {"optimizer__eps": 1e-8})


def settings_of(base: Path, case: Case) -> dict:
    recipe = RECIPES[case.recipe]
    if "reward__functions" in recipe:
        recipe = {"reward__functions": recipe["reward__functions"].replace("FOLDER", str(base))}
    return VARIED | {"optimizer__eps": 1e-5, "train__steps": 3} | recipe | case.settings


def folder(base: Path, case: Case) -> Path:
    return base / f"{case.ranks} {case.name} {case.recipe}"


def train_cases(rank: int, base: Path, cases: list[Case]) -> None:
    """Trains the cases one after the other; every rank of a world calls it."""
    for case in cases:
        with small_buckets():
            train_run(base, folder(base, case), **settings_of(base, case))


def train_two_ranks(rank: int, base: Path, cases: list[Case]) -> None:
    train_cases(rank, base, [*cases, PLAIN_ADAM])
    alone = [dist.new_group([member]) for member in range(2)][rank]
    compute, objective = advantage.compute_advantages, update._objective

    def broken_objective(*args, temperature):
        right = objective(*args, temperature=temperature)

        def wrong(batch, hidden):
            total, count, report = right.loss(batch, hidden)
            mean = total / count.clamp(min=1)
            return mean, torch.ones_like(count), torch.stack([mean.detach(), *report[1:]])

        return replace(right, loss=wrong)

    advantage.compute_advantages = lambda *args, group: compute(*args, group=alone)
    train_cases(rank, base, [BROKEN["whitened per rank"]])
    advantage.compute_advantages, update._objective = compute, broken_objective
    train_cases(rank, base, [BROKEN["mean of means"]])
    update._objective, right = objective, groups.token_group
    groups.token_group = groups.data_group
    train_cases(rank, base, [BROKEN["context left out"]])
    groups.token_group = right


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The folder of all runs, finished."""
    base = tmp_path_factory.mktemp("layouts")
    make_data(base)
    save(base, "qwen3-score", pad_token_id=None)
    one_rank = [Case("one rank", 1, recipe, {}) for recipe in RECIPES]
    one_rank.append(PLAIN_ADAM._replace(ranks=1, settings={"optimizer__eps": 1e-8}))
    train_cases(0, base, one_rank + [case for case in CASES if case.ranks == 1])
    two, four = ([case for case in CASES if case.ranks == count] for count in (2, 4))
    run_ranks(train_two_ranks, 2, base, base, two, timeout=700)
    run_ranks(train_cases, 4, base, base, four, timeout=700)
    return base


def compare(base: Path, case: Case, expected: Case | None = None) -> tuple[Deviation, Deviation]:
    """Returns the deviations of metrics and of final weights from one rank."""
    ours = folder(base, case)
    theirs = folder(base, expected or Case("one rank", 1, case.recipe, {}))
    mine, other = (final_weights(run, case.recipe) for run in (ours, theirs))
    logs = (rows(run / "logs/metrics.jsonl") for run in (ours, theirs))
    return compare_rows(*logs), compare_weights(mine, other)


@cache
def final_weights(run: Path, recipe: str) -> dict[str, torch.Tensor]:
    config = config_of(run.parent, run, **settings_of(run.parent, Case("", 1, recipe, {})))
    return weights(config, run / "checkpoints")


@pytest.fixture(scope="module")
def deviations(base) -> dict[Case, tuple[Deviation, Deviation]]:
    plain = PLAIN_ADAM._replace(ranks=1, settings={"optimizer__eps": 1e-8})
    found = {key(case): compare(base, case) for case in [*CASES, *BROKEN.values()]}
    found[key(PLAIN_ADAM)] = compare(base, PLAIN_ADAM, plain)
    print(f"\n{'layout':32}{'recipe':14}{'metrics':>9}  {'where':34}{'weights':>9}  where")
    for (name, recipe), (metric, weight) in found.items():
        print(
            f"{name:32}{recipe:14}{metric.size:9.1e}  {metric.where:34}{weight.size:9.1e}  "
            f"{weight.where.removeprefix('decoder.')}"
        )
    return found


def key(case: Case) -> tuple[str, str]:
    return case.name, case.recipe


def named(case: Case) -> str:
    return f"{case.name}, {case.recipe}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_reference_run_learns(base, recipe):
    """Runs that learn nothing would agree, too."""
    first, second, _ = rows(folder(base, Case("one rank", 1, recipe, {})) / "logs/metrics.jsonl")
    assert first["reward/std"] > 0.1 and first["policy/grad_norm"] > 0.1
    assert first["policy/clip_fraction"] > 0 and first["policy/ratio_max"] > 1.1
    assert first["kl/k2"] == 0 and second["kl/k2"] > 1e-3
    assert 0 < first["response/truncated_share"] < 1
    assert first["policy/entropy"] != second["policy/entropy"]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_metrics_are_those_of_one_rank(deviations, case):
    metric, _ = deviations[key(case)]
    assert metric.size <= TOLERANCE, metric


@pytest.mark.parametrize("case", CASES, ids=named)
def test_final_weights_are_those_of_one_rank(deviations, case):
    """One rank reads each layout's checkpoint, so this also tests loading on another layout."""
    _, weight = deviations[key(case)]
    assert weight.size <= TOLERANCE, weight


@pytest.mark.parametrize("case", CASES, ids=named)
def test_held_out_answers_are_those_of_one_rank(base, case):
    one_rank = Case("one rank", 1, case.recipe, {})
    ours, theirs = (rows(folder(base, c) / "logs/evaluations.jsonl") for c in (case, one_rank))
    assert [row["step"] for row in ours] == [0, 3]
    # The scores of a model are sums in another order.
    tolerance = 1e-5 if case.recipe == "reward model" else 1e-12
    for mine, other in zip(ours, theirs):
        texts = [[(s["prompt"], s["response"]) for s in row["samples"]] for row in (mine, other)]
        assert texts[0] == texts[1] and mine["count"] == other["count"] == 16
        scores = [[s["score"] for s in row["samples"]] for row in (mine, other)]
        assert scores[0] == pytest.approx(scores[1], abs=tolerance)
        assert mine["reward"] == pytest.approx(other["reward"], abs=tolerance)
        assert mine["accuracy"] == other["accuracy"]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_reduction_is_detected(deviations, broken):
    """The comparison can fail. (If only the reported loss is wrong, the weights are right.)"""
    metric, weight = deviations[key(BROKEN[broken])]
    assert metric.size > 100 * TOLERANCE
    assert weight.size > 100 * TOLERANCE or broken == "context left out"


def test_the_usual_epsilon_of_adam_amplifies_rounding(deviations):
    metric, weight = deviations[key(PLAIN_ADAM)]
    assert metric.size < 1e-3 and weight.size < 5e-3


def test_a_model_may_have_more_tokens_than_the_tokenizer(base):
    """Published models have padded vocabularies. Extra tokens are decoded as unknown ones."""
    run = base / "more words"
    train_run(base, run, model__vocab_size=60, train__steps=1)
    answers = [sample["response"] for sample in rows(run / "logs/evaluations.jsonl")[0]["samples"]]
    assert any("\u2047" in answer for answer in answers)
