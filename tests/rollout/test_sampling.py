"""Sampling of the next token: random numbers, the truncated distribution, and the log-prob."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rpp.records import Sampling
from megatron_rpp.rollout import sampling as rollout_sampling
from megatron_rpp.rollout.sampling import choose, uniforms_at
from megatron_rpp.seeds import sample_keys, uniforms

WORD = 2**64


def splitmix64(state):
    """The output function in plain integers (Steele, Lea, Flood 2014)."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % WORD
    return state ^ (state >> 31)


def uniform_by_hand(seed, step, sample, position):
    state = 0
    for word in (seed, step, sample, position):
        state = splitmix64((state + (word + 1) * 0x9E3779B97F4A7C15) % WORD)
    return (state >> 11) / 2**53


def test_the_oracle_is_splitmix64():
    """The first output of the published generator from state 0."""
    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


def test_first_uniforms_are_pinned():
    """A resumed run must draw the same numbers as before, so these may never change."""
    expected = [0.1296456182997474, 0.591449498199162, 0.6733110260843622]
    assert uniforms(0, 0, np.arange(3), position=0).tolist() == expected
    expected = [0.6752719604205119, 0.18589817664719255, 0.4088239612034299]
    assert uniforms(1234, 5, np.array([0, 7, 31]), position=9).tolist() == expected


numbers = st.integers(-2, 2**40)  # -1 and -2 are the keys of other uses


@given(numbers, numbers, st.lists(numbers, max_size=5), st.integers(0, 10**6))
def test_uniforms_equal_plain_integers(seed, step, samples, position):
    found = uniforms(seed, step, np.array(samples, dtype=np.int64), position=position)
    assert found.tolist() == [uniform_by_hand(seed, step, s, position) for s in samples]
    assert ((found >= 0) & (found < 1)).all()


@given(numbers, numbers, st.lists(numbers, max_size=5), st.lists(st.integers(0, 10**6), max_size=3))
def test_torch_draws_the_numbers_of_numpy(seed, step, samples, positions):
    """For several positions at once."""
    ids = np.array(samples, dtype=np.int64)
    keys = torch.from_numpy(sample_keys(seed, step, ids))
    found = uniforms_at(keys, torch.tensor(positions, dtype=torch.int64)[:, None])
    assert found.dtype == torch.float64
    assert found.tolist() == [uniforms(seed, step, ids, position=p).tolist() for p in positions]


def test_uniforms_do_not_depend_on_the_batch():
    ids = np.arange(100)
    whole = uniforms(3, 4, ids, position=5)
    order = np.random.default_rng(0).permutation(100)
    assert (uniforms(3, 4, ids[order], position=5) == whole[order]).all()
    assert uniforms(3, 4, ids[17:18], position=5)[0] == whole[17]


def test_each_word_of_the_key_matters():
    base = uniforms(3, 4, np.arange(50), position=5)
    for other in [(4, 4, 5), (3, 5, 5), (3, 4, 6)]:
        assert not (uniforms(other[0], other[1], np.arange(50), position=other[2]) == base).any()
    assert uniforms(4, 3, np.arange(50), position=5).tolist() != base.tolist()


@pytest.mark.parametrize("along", ["samples", "positions", "steps"])
def test_uniforms_are_uniform(along):
    """10,000 numbers in 20 bins: chi-square of 19 degrees stays below its 99.9 % point, 43.8."""
    if along == "samples":
        values = uniforms(1, 2, np.arange(10_000), position=3)
    elif along == "positions":
        values = np.concatenate([uniforms(1, 2, np.arange(10), position=t) for t in range(1000)])
    else:
        values = np.concatenate(
            [uniforms(1, step, np.arange(10), position=3) for step in range(1000)]
        )
    assert chi_square(np.floor(values * 20).astype(int), np.full(20, 1 / 20)) < 43.8
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / math.sqrt(len(values))


def chi_square(drawn, probabilities):
    expected = probabilities * len(drawn)
    counts = np.bincount(drawn, minlength=len(probabilities))
    return ((counts - expected) ** 2 / expected).sum()


LOGITS = torch.tensor([1.0, -0.5, 0.3, 2.0, -1.0, 0.0, 1.5, -2.0])
CHI_SQUARE_7 = 24.3  # 99.9 % point of 7 degrees of freedom


def draw(logits, count=2000, step=0, forbid=(), **settings):
    """Draws `count` tokens of one distribution, each for another sample."""
    sampling = Sampling(max_new_tokens=1, **settings)
    uniform = uniforms(11, step, np.arange(count), position=0)
    return choose(logits.expand(count, -1), torch.from_numpy(uniform), sampling, forbid=forbid)


def softmax(values):
    exponentials = np.exp(values - values.max())
    return exponentials / exponentials.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_are_those_of_the_softmax(temperature):
    tokens = draw(LOGITS, 50_000, temperature=temperature)[0].numpy()
    logits = LOGITS.double().numpy()
    assert chi_square(tokens, softmax(logits / temperature)) < CHI_SQUARE_7
    # The test is sharp enough to see a temperature that is 10 % off.
    assert chi_square(tokens, softmax(logits / (1.1 * temperature))) > CHI_SQUARE_7


def allowed_by_hand(logits, sampling, forbid):
    """The truncated distribution in plain float64 loops."""
    values = np.asarray(logits, np.float64) / sampling.temperature
    values[list(forbid)] = -np.inf
    ranked = sorted(range(len(values)), key=lambda i: -values[i])
    candidates = ranked[: sampling.top_k] if sampling.top_k else ranked
    probabilities = dict(zip(candidates, softmax(values[candidates]), strict=True))
    nucleus, total = [], 0.0
    for token in candidates:
        nucleus.append(token)
        total += probabilities[token]
        if total >= sampling.top_p:
            break
    result = np.zeros(len(values))
    result[nucleus] = softmax(values[nucleus])
    return result


RANDOM_LOGITS = torch.from_numpy(np.random.default_rng(2).normal(size=(40, 50)) * 2).float()


@pytest.mark.parametrize("top_k", [0, 1, 5, 50, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 0.01])
@pytest.mark.parametrize("forbid", [(), (7,), (7, 30)], ids=["", "one", "two"])
def test_tokens_are_the_inverse_of_the_truncated_distribution(top_k, top_p, forbid):
    sampling = Sampling(max_new_tokens=1, temperature=0.8, top_k=top_k, top_p=top_p)
    for step in range(10):
        uniform = uniforms(5, step, np.arange(40), position=0)
        tokens, _ = choose(RANDOM_LOGITS, torch.from_numpy(uniform), sampling, forbid=forbid)
        for row, token in enumerate(tokens.tolist()):
            probabilities = allowed_by_hand(RANDOM_LOGITS[row].numpy(), sampling, forbid)
            below = probabilities[:token].sum()
            # The token's interval contains the number, up to fp32 rounding of its ends.
            assert probabilities[token] > 0
            assert below - 1e-6 <= uniform[row] <= below + probabilities[token] + 1e-6


@pytest.mark.parametrize("size", [rollout_sampling.CHUNK + 1, 2 * rollout_sampling.CHUNK, 2500])
def test_a_large_vocabulary_is_searched_in_two_steps(size, monkeypatch):
    """Exactly the tokens of a search in one step, also at the ends of chunks and of the unit
    interval."""
    chunk = rollout_sampling.CHUNK
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(1, size, generator=generator).expand(3000, -1)
    uniform = torch.rand(3000, generator=generator, dtype=torch.float64)
    ends = logits[0].double().softmax(-1).cumsum(-1)
    edges = ends[[0, chunk - 2, chunk - 1, chunk, -2]]
    uniform[:10] = torch.cat([edges - 1e-6, edges + 1e-6])
    uniform[10:12] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    once = Sampling(max_new_tokens=1)
    found = choose(logits, uniform, once)
    monkeypatch.setattr(rollout_sampling, "CHUNK", size)  # one chunk holds all: a single step
    expected = choose(logits, uniform, once)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert {0, chunk - 1} <= set(found[0].tolist())


def test_top_k_and_top_p_by_hand():
    """Probabilities 0.5, 0.3, 0.15, 0.05."""
    logits = torch.log(torch.tensor([0.3, 0.5, 0.05, 0.15]))
    assert set(draw(logits, top_k=2)[0].tolist()) == {1, 0}
    assert set(draw(logits, top_p=0.79)[0].tolist()) == {1, 0}  # 0.5 + 0.3 reach 0.79
    assert set(draw(logits, top_p=0.81)[0].tolist()) == {1, 0, 3}
    assert set(draw(logits, top_p=0.001)[0].tolist()) == {1}  # the most likely always stays
    # top-k comes first, so the nucleus is that of 0.625 and 0.375.
    assert set(draw(logits, top_k=2, top_p=0.6)[0].tolist()) == {1}
    tokens = draw(logits, top_k=2)[0].numpy()
    assert chi_square(tokens, np.array([0.375, 0.625])) < 10.8  # 99.9 % point of 1 degree


def test_greedy_takes_the_largest_logit():
    sampling = Sampling(max_new_tokens=1, temperature=0.0, top_k=3, top_p=0.5)
    uniform = np.linspace(0, 0.999, 40)
    tokens, logprobs = choose(RANDOM_LOGITS, torch.from_numpy(uniform), sampling)
    assert torch.equal(tokens, RANDOM_LOGITS.argmax(1))
    expected = RANDOM_LOGITS.double().log_softmax(-1).amax(-1)
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-5)


def test_forbidden_tokens_are_never_chosen():
    best, second = LOGITS.topk(2).indices.tolist()
    assert best in draw(LOGITS, temperature=1.0)[0]
    assert best not in draw(LOGITS, temperature=1.0, forbid=[best])[0]
    assert best not in draw(LOGITS, 3, temperature=0.0, forbid=[best])[0]
    assert best not in draw(LOGITS, 100, top_k=1, forbid=[best])[0]
    assert not {best, second} & set(draw(LOGITS, forbid=[best, second])[0].tolist())
    assert LOGITS[best] == 2.0, "the caller's logits were written to"


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.9}])
def test_tokens_are_forbidden_in_some_rows(settings):
    """Every other row is sampled as if nothing was forbidden, and the rest as if all rows were."""
    sampling = Sampling(max_new_tokens=1, **settings)
    uniform = torch.from_numpy(uniforms(2, 0, np.arange(40), position=0))
    best = RANDOM_LOGITS.argmax(1).mode().values.item()
    rows = torch.arange(40) % 2 == 0
    free, held, mixed = (
        choose(RANDOM_LOGITS, uniform, sampling, forbid=forbid, rows=only)
        for forbid, only in [((), None), ([best], None), ([best], rows)]
    )
    for found, one, other in zip(mixed, held, free, strict=True):
        assert torch.equal(found, torch.where(rows, one, other))
    assert not torch.equal(free[0], held[0])


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.5])
def test_log_probs_are_of_the_whole_distribution_at_the_temperature(temperature):
    """Training uses this distribution: before top-k, top-p and `forbid`."""
    sampling = Sampling(max_new_tokens=1, temperature=temperature, top_k=4, top_p=0.7)
    uniform = uniforms(1, 1, np.arange(40), position=1)
    tokens, logprobs = choose(RANDOM_LOGITS, torch.from_numpy(uniform), sampling, forbid=[7])
    whole = (RANDOM_LOGITS.double() / (temperature or 1.0)).log_softmax(-1)
    expected = whole.gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-5)
    assert logprobs.dtype == torch.float32 and tokens.dtype == torch.int64


LARGEST = 1 - 2.0**-53  # the largest number that `uniforms` can give


@pytest.mark.parametrize("number", [0.0, 2.0**-53, 0.5, LARGEST])
def test_no_token_of_probability_zero_at_the_ends(number):
    impossible = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.1, -500.0, -torch.inf])
    tokens, logprobs = choose(
        impossible[None], torch.tensor([number], dtype=torch.float64), Sampling(max_new_tokens=1)
    )
    assert tokens.item() in (1, 3) and torch.isfinite(logprobs).all()


logit = st.floats(-30, 30, width=32) | st.just(-math.inf)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(logit, min_size=2, max_size=8).filter(lambda row: max(row[1:]) > -math.inf),
    st.sampled_from([0.0, 2.0**-53, LARGEST]) | st.floats(0, 1, exclude_max=True),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(0, 3),
    st.sampled_from([1.0, 0.9, 0.1]),
    st.sampled_from([(), (0,)]),
)
def test_never_a_token_of_probability_zero(row, number, temperature, top_k, top_p, forbid):
    sampling = Sampling(max_new_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p)
    tokens, _ = choose(
        torch.tensor([row]), torch.tensor([number], dtype=torch.float64), sampling, forbid=forbid
    )
    assert 0 <= tokens.item() < len(row)
    assert row[tokens.item()] > -math.inf and tokens.item() not in forbid


def test_both_ends_of_a_large_vocabulary():
    """150,000 equal logits: the inverse of the cumulative sum still reaches both ends."""
    logits = torch.zeros(3, 150_000)
    tokens, logprobs = choose(
        logits, torch.tensor([0.0, 0.5, LARGEST], dtype=torch.float64), Sampling(max_new_tokens=1)
    )
    assert tokens.tolist() == [0, 75_000, 149_999]
    torch.testing.assert_close(logprobs, torch.full((3,), -math.log(150_000)))


def test_rounding_does_not_add_up_over_a_large_vocabulary():
    """The numbers lie 2e-9 below and above the border of two tokens; an fp32 sum errs by 1e-7."""
    logits = torch.randn(1, 150_000, generator=torch.Generator().manual_seed(0))
    borders = logits.double().softmax(-1).cumsum(-1).squeeze(0).numpy()
    left = np.arange(10) * 15_000 + 7_000
    uniform = np.concatenate([borders[left] - 2e-9, borders[left] + 2e-9])
    tokens, _ = choose(logits.expand(20, -1), torch.from_numpy(uniform), Sampling(max_new_tokens=1))
    assert tokens.tolist() == [*left, *(left + 1)]
