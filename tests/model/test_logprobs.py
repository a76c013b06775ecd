"""Vocabulary-parallel log-probs and entropy against one unsharded float64 softmax.

Two real ranks hold halves of the output projection; the same cases also run on a group of one.
Values and gradients must agree to 1e-5 of the largest true value: fp32 carries 6e-8 per operation,
sums over 16 channels and 128 vocabulary rows add up to 2e-6, and a wrong formula is off by far more
(see the deliberately wrong variants at the end).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from megatron_rpp.model import logprobs
from megatron_rpp.model.logprobs import vocab_parallel_logprobs
from tests.distributed import run_ranks

ROWS, HIDDEN, VOCAB_ROWS = 23, 16, 128


@dataclass(frozen=True)
class Case:
    """One call; `loss` names the outputs through which it is differentiated."""

    vocab: int = VOCAB_ROWS  # the rows from here on are padding
    rows: int = ROWS
    temperature: float = 1.0
    chunk_elements: int = 2**24
    loss: str = "both"
    scale: float = 1.0  # of the logits
    tolerance: float = 1e-5  # relative to the largest true value


CASES = {
    "plain": Case(),
    "temperature": Case(temperature=0.7),
    "padding": Case(vocab=100, temperature=1.3),
    "one valid row on the second rank": Case(vocab=65),
    "no valid row on the second rank": Case(vocab=50),
    "log-probs alone": Case(vocab=100, loss="logprobs"),
    "entropy alone": Case(vocab=100, loss="entropy"),
    "entropy without gradient": Case(vocab=100, loss="entropy reported"),
    "zero rows": Case(rows=0),
    # exp() overflows unless the maximum is subtracted first. An fp32 logit of 1,600 has an error of
    # 1e-4, so every probability has the same relative error.
    "large logits": Case(vocab=100, scale=100.0, tolerance=1e-3),
    "chunks": Case(chunk_elements=256),
    "a row a chunk": Case(vocab=100, chunk_elements=1),
    # The ranks hold 64 and 36 valid rows, so chunks sized by valid rows would differ between them.
    "chunks and padding": Case(vocab=100, chunk_elements=256, temperature=1.3),
    "chunks and no valid row on the second rank": Case(vocab=50, chunk_elements=256),
}


def inputs(case):
    """hidden [n, h], whole weight [v, h], targets [n], upstream gradients [n] x 2: fp32."""
    random = torch.Generator().manual_seed(3)
    hidden = case.scale * torch.randn(case.rows, HIDDEN, generator=random)
    weight = torch.randn(VOCAB_ROWS, HIDDEN, generator=random)
    targets = torch.randint(case.vocab, (case.rows,), generator=random)
    upstream = torch.randn(2, case.rows, generator=random)
    return hidden, weight, targets, upstream


def loss_of(case, values, entropies, upstream):
    parts = {"logprobs": [values], "entropy reported": [values], "entropy": [None, entropies]}
    chosen = parts.get(case.loss, [values, entropies])
    return sum((w * x).sum() for w, x in zip(upstream, chosen) if x is not None)


def reference(case):
    """(log-probs, entropies, gradient of hidden, gradient of the whole weight) in float64."""
    hidden, weight, targets, upstream = inputs(case)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logs = ((hidden @ weight[: case.vocab].t()) / case.temperature).log_softmax(-1)
    values = logs.gather(1, targets[:, None]).squeeze(1)
    entropies = -(logs.exp() * logs).sum(-1)
    loss_of(case, values, entropies, upstream.double()).backward()
    return values.detach(), entropies.detach(), hidden.grad, weight.grad


def compute(case, group):
    """The same four on this rank of `group`, whose weight is its shard; padding rows are NaN."""
    logprobs.CHUNK_ELEMENTS = case.chunk_elements
    hidden, weight, targets, upstream = inputs(case)
    rows = VOCAB_ROWS // group.size()
    valid_rows = max(0, min(rows, case.vocab - group.rank() * rows))
    shard = weight[group.rank() * rows :][:rows].clone()
    shard[valid_rows:] = torch.nan
    hidden.requires_grad_(), shard.requires_grad_()
    values, entropies = vocab_parallel_logprobs(
        hidden,
        shard,
        targets,
        valid_rows=valid_rows,
        temperature=case.temperature,
        group=group,
        with_entropy=case.loss != "logprobs",
    )
    assert (entropies is None) == (case.loss == "logprobs")
    loss_of(case, values, entropies, upstream).backward()
    entropies = None if entropies is None else entropies.detach()
    return values.detach(), entropies, hidden.grad, shard.grad


def by_hand(case, group, forget):
    """A second implementation of sharded log-probs, without the reduction that `forget` names."""
    hidden, weight, targets, _ = inputs(case)
    rows = VOCAB_ROWS // group.size()
    shard = weight[group.rank() * rows :][:rows]
    logits = hidden @ shard.t()
    peak = logits.amax(-1)
    if forget != "maximum":
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    local = targets - group.rank() * rows
    own = (local >= 0) & (local < rows)
    target = torch.where(own, logits.gather(1, local.clamp(0, rows - 1)[:, None]).squeeze(1), 0.0)
    total = torch.exp(logits - peak[:, None]).sum(-1)
    if forget != "sum":
        dist.all_reduce(total, group=group)
    dist.all_reduce(target, group=group)
    return target - peak - total.log()


def on_every_rank(rank):
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    pair = dist.group.WORLD
    results = {}
    for forget in (None, "maximum", "sum"):
        results["by hand", forget] = by_hand(CASES["plain"], pair, forget)
    for name, case in CASES.items():
        results[name, 1] = compute(case, alone)
    for name, case in CASES.items():
        results[name, 2] = compute(case, pair)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(on_every_rank, 2, tmp_path_factory.mktemp("ranks"))


def assert_close(found, expected, tolerance=Case.tolerance):
    assert found.shape == expected.shape
    if expected.numel():
        error = (found.double() - expected).abs().max()
        assert error <= tolerance * expected.abs().max(), f"off by {error}"


@pytest.mark.parametrize("size", [1, 2], ids=["TP1", "TP2"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(ranks, name, size):
    values, entropies, grad_hidden, grad_weight = reference(CASES[name])
    tolerance = CASES[name].tolerance
    for rank in range(2):
        found = ranks[rank][name, size]
        assert found[0].dtype == torch.float32
        assert_close(found[0], values, tolerance)
        if found[1] is not None:
            assert_close(found[1], entropies, tolerance)
        assert_close(found[2], grad_hidden, tolerance)
    parts = [ranks[rank][name, size][3] for rank in range(size)]
    assert_close(torch.cat(parts), grad_weight, tolerance)


@pytest.mark.parametrize("size", [1, 2], ids=["TP1", "TP2"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.vocab < VOCAB_ROWS])
def test_padding_rows_get_no_gradient_at_all(ranks, name, size):
    grad = torch.cat([ranks[rank][name, size][3] for rank in range(size)])
    assert (grad[CASES[name].vocab :] == 0.0).all()
    if CASES[name].scale == 1.0:  # with large logits a probability may round to zero
        assert (grad[: CASES[name].vocab] != 0.0).any(1).all()


def test_both_ranks_hold_the_same_bits(ranks):
    for name in CASES:
        for ours, theirs in zip(ranks[0][name, 2][:3], ranks[1][name, 2][:3], strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs), name


def test_an_entropy_that_is_only_reported_changes_no_gradient(ranks):
    without, reported = ranks[0]["log-probs alone", 2], ranks[0]["entropy without gradient", 2]
    assert torch.equal(without[0], reported[0])
    assert torch.equal(without[2], reported[2]) and torch.equal(without[3], reported[3])


def test_entropy_of_equal_logits_is_the_logarithm_of_the_vocabulary_size(tmp_path):
    """ln 100, by hand, with 28 rows of padding."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        hidden, weight = torch.ones(2, HIDDEN), torch.ones(VOCAB_ROWS, HIDDEN)
        found = vocab_parallel_logprobs(
            hidden,
            weight,
            torch.tensor([0, 99]),
            valid_rows=100,
            temperature=0.5,
            group=dist.group.WORLD,
            with_entropy=True,
        )
    finally:
        dist.destroy_process_group()
    for values, expected in zip(found, (-4.605170186, 4.605170186), strict=True):
        torch.testing.assert_close(values, torch.full((2,), expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("forget", ["maximum", "sum"])
def test_the_comparison_rejects_a_rank_that_forgets_the_group(ranks, forget):
    expected = reference(CASES["plain"])[0]
    assert_close(ranks[0]["by hand", None], expected)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(ranks[0]["by hand", forget], expected)
