"""Generation with the key-value cache on one rank: the result depends on the request alone, never
on its batch.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from megatron_rpp.config import ModelConfig, ParallelConfig
from megatron_rpp.data.chat import prompt_tokens
from megatron_rpp.data.prompts import Example, Prompt
from megatron_rpp.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_rpp.model import attention_metadata, build
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron_rpp.records import Request, Sampling
from megatron_rpp.rollout import engine as engine_module
from megatron_rpp.rollout.batch import Abandoned, Batch
from megatron_rpp.rollout.buffer import from_generations
from megatron_rpp.rollout.engine import MegatronEngine
from megatron_rpp.rollout.scheduler import Scheduler
from megatron_rpp.stages import logprobs

SEED, STEP, MAX_LENGTH = 21, 3, 48
TEXTS = [f"{a} + {b} = {a + b}" for a in range(12) for b in range(12)]
MODEL = ModelConfig(
    layers=2, hidden=32, ffn_hidden=48, heads=4, kv_heads=2, max_length=MAX_LENGTH, init_std=0.3
)
QUESTIONS = ["1 + 2 = ", "11 + 4 = ", "7", "3 + 3 + 3 = ", "10 + 10 = ", "5 + 8 = "]


@pytest.fixture(scope="module", autouse=True)
def world():
    groups.start(1, 1, seed=7)
    torch.set_num_threads(1)  # the matrices are tiny
    yield
    groups.stop()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(TEXTS, path, 40)
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def model(tokenizer):
    return build.build_model(MODEL, ParallelConfig(), vocab_size=tokenizer.vocab_size, seed=5)


@pytest.fixture(scope="module")
def generate(model, tokenizer):
    """(requests, max_batch, **sampling) -> generations."""

    def run(requests, max_batch=64, **settings):
        sampling = Sampling(**{"max_new_tokens": 16} | settings)
        return MegatronEngine(model, tokenizer, max_batch=max_batch).generate(
            requests, sampling, seed=SEED, step=STEP
        )

    return run


@pytest.fixture(scope="module")
def requests(tokenizer):
    """Four samples of each question: prompts of different lengths, 24 sequences."""
    prompts = [prompt_tokens(text, tokenizer) for text in QUESTIONS]
    assert len({len(prompt) for prompt in prompts}) >= 3
    return [Request(prompts[i // 4], i) for i in range(4 * len(prompts))]


def tokens_of(generations):
    return [generation.tokens for generation in generations]


def assert_same(found, expected):
    """Checks that tokens are equal, and log-probs up to the rounding of another batch size."""
    assert tokens_of(found) == tokens_of(expected)
    assert [g.truncated for g in found] == [g.truncated for g in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


@torch.no_grad()
def continue_greedily(model, prompt, count, eos_id):
    """Repeats: full forward pass over all tokens so far, then the argmax."""
    tokens = list(prompt)
    for _ in range(count):
        hidden = model[0](torch.tensor([tokens]))
        tokens.append(int(model[0].sampling_logits(hidden[-1]).argmax()))
        if tokens[-1] == eos_id:
            break
    return tokens[len(prompt) :]


def test_greedy_equals_the_argmax_of_repeated_full_forwards(generate, model, requests, tokenizer):
    found = generate(requests, temperature=0.0)
    for request, generation in zip(requests, found, strict=True):
        expected = continue_greedily(model, request.prompt, 16, tokenizer.eos_id)
        assert generation.tokens == expected
    assert len({tuple(tokens) for tokens in tokens_of(found)}) == len(QUESTIONS)


@pytest.mark.parametrize("max_batch", [1, 5, 23])
def test_tokens_do_not_depend_on_the_batch_size(generate, requests, max_batch):
    assert_same(generate(requests, max_batch), generate(requests))


def test_tokens_do_not_depend_on_the_order_of_the_requests(generate, requests):
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(1)).tolist()
    whole = generate(requests)
    assert_same(generate([requests[i] for i in order], 7), [whole[i] for i in order])


def test_samples_of_one_prompt_equal_single_ones(generate, requests):
    """The prompt is read once, and its blocks are copied."""
    four = requests[:4]
    assert len({request.prompt for request in four}) == 1
    together = generate(four)
    assert_same(together, [generate([request])[0] for request in four])
    assert len({tuple(tokens) for tokens in tokens_of(together)}) == 4, "samples repeat each other"


def test_another_seed_step_or_sample_gives_other_tokens(model, tokenizer, generate, requests):
    engine, sampling = MegatronEngine(model, tokenizer, max_batch=64), Sampling(max_new_tokens=16)
    base = tokens_of(generate(requests))
    for seed, step in [(SEED + 1, STEP), (SEED, STEP + 1)]:
        assert tokens_of(engine.generate(requests, sampling, seed=seed, step=step)) != base
    moved = [Request(request.prompt, request.sample_id + 100) for request in requests]
    assert tokens_of(generate(moved)) != base


MACHINES = {
    "CPU": {},
    "GPU": {"scans_cache": False, "tokens_per_sync": 5, "padded_batch": 32},
    "GPU, read once": {"scans_cache": False, "tokens_per_sync": 100},
}
"""What devices differ in; the last two as on a GPU, without its kernels."""


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("settings", [{}, {"stop": ("1",), "min_new_tokens": 3, "top_k": 9}])
def test_tokens_do_not_depend_on_the_device(generate, requests, machine, settings, monkeypatch):
    expected = generate(requests, temperature=1.2, **settings)
    assert len({len(generation.tokens) for generation in expected}) >= 4
    monkeypatch.setattr(attention_metadata, "block_size", lambda: 4)
    for name, value in MACHINES[machine].items():
        monkeypatch.setattr(devices, name, lambda *_, value=value: value)
    assert_same(generate(requests, temperature=1.2, **settings), expected)
    assert_same(generate(requests, 5, temperature=1.2, **settings), expected)


def test_slots_are_filled_again_while_others_run(generate, requests, monkeypatch):
    """Of three slots, none is empty while requests wait: its sequence decodes, or is being read."""
    taken, batches, prepare = [], [], Batch._prepare

    def counting(batch):
        scheduler = batch.scheduler
        reading = sum(len(prompt.sequences) for prompt in scheduler._prompts)
        if scheduler._queue:
            taken.append(scheduler.running.size + reading)
        batches.append(scheduler.running.size)
        return prepare(batch)

    monkeypatch.setattr(Batch, "_prepare", counting)
    found = generate(requests, 3, temperature=1.2)
    assert set(taken) == {3}
    tokens = sum(len(generation.tokens) for generation in found)
    assert len(batches) < tokens / 2, "most tokens came one by one"
    assert_same(found, [generate([request], temperature=1.2)[0] for request in requests])


@pytest.mark.parametrize("tokens", [MAX_LENGTH, 90])
@pytest.mark.parametrize("tokens_per_sync", [1, 5])
def test_a_small_cache_makes_sequences_wait(
    model, tokenizer, generate, requests, monkeypatch, tokens, tokens_per_sync
):
    """Some leave the cache before they have ended, and go on later with the tokens that they had."""
    expected = generate(requests)
    monkeypatch.setattr(attention_metadata, "block_size", lambda: 4)
    monkeypatch.setattr(devices, "tokens_per_sync", lambda: tokens_per_sync)
    left, give_way = [], Scheduler._preempt

    def counting(scheduler):
        left.append(1)
        give_way(scheduler)

    monkeypatch.setattr(Scheduler, "_preempt", counting)
    engine = MegatronEngine(model, tokenizer, max_batch=64, max_cache_tokens=tokens)
    sampling = Sampling(max_new_tokens=16)
    assert_same(engine.generate(requests, sampling, seed=SEED, step=STEP), expected)
    assert left, "the cache was large enough"


def test_long_prompts_are_read_in_parts(generate, requests, monkeypatch):
    expected, passes, lay_out = generate(requests), [], Batch._lay_out

    def noting(batch, prompts):
        passes.append([len(tokens) for tokens in prompts.tokens])
        return lay_out(batch, prompts)

    monkeypatch.setattr(engine_module, "PASS_TOKENS", 4)
    monkeypatch.setattr(Batch, "_lay_out", noting)
    assert_same(generate(requests), expected)
    assert max(map(sum, passes)) == 4
    lengths = {len(request.prompt) - 1 for request in requests}
    assert max(lengths) > 4 and len(passes) > len(lengths)


def test_a_long_prompt_does_not_pad_many_short_ones(model, tokenizer, monkeypatch):
    """Twenty prompts of three tokens and one of thirty: side by side they would fill 609 cells."""
    passes, lay_out = [], Batch._lay_out

    def noting(batch, prompts):
        passes.append([len(tokens) for tokens in prompts.tokens])
        return lay_out(batch, prompts)

    monkeypatch.setattr(engine_module, "PASS_TOKENS", 100)
    monkeypatch.setattr(Batch, "_lay_out", noting)
    prompts = [(3 + i, 4, 5, 6) for i in range(20)] + [tuple(range(3, 34))]
    engine = MegatronEngine(model, tokenizer, max_batch=64)
    requests = [Request(prompt, i) for i, prompt in enumerate(prompts)]
    engine.generate(requests, Sampling(max_new_tokens=2), seed=SEED, step=STEP)
    assert passes == [[3] * 20, [30]]


@pytest.mark.parametrize("scans", [True, False], ids=["by block", "gathered"])
def test_prompts_of_one_token_get_all_their_blocks(generate, requests, scans, monkeypatch):
    """Five tokens are generated before the host reads them, and a block holds four."""
    single = [Request(request.prompt[:1], request.sample_id) for request in requests]
    expected = generate(single)
    for name, value in {"scans_cache": scans, "tokens_per_sync": 5}.items():
        monkeypatch.setattr(devices, name, lambda value=value: value)
    monkeypatch.setattr(attention_metadata, "block_size", lambda: 4)
    assert_same(generate(single), expected)


@pytest.mark.parametrize("scans", [True, False], ids=["by block", "gathered"])
def test_log_probs_in_bf16_are_those_of_scoring(tokenizer, requests, scans, monkeypatch):
    """The tolerance is what bf16 rounds of logits around 4, in another order."""
    monkeypatch.setattr(devices, "scans_cache", lambda: scans)
    monkeypatch.setattr(attention_metadata, "block_size", lambda: 4)
    stage = build.build_model(
        replace(MODEL, dtype="bf16"), ParallelConfig(), vocab_size=tokenizer.vocab_size, seed=5
    )
    engine = MegatronEngine(stage, tokenizer, max_batch=9)
    generations = engine.generate(requests, Sampling(max_new_tokens=16), seed=SEED, step=STEP)
    prompts = [Prompt(Example("?"), request.prompt) for request in requests]
    buffer = from_generations(prompts, requests, generations, samples_per_prompt=4)
    scored = logprobs.response_logprobs(stage, buffer, 100, temperature=1.0)
    torch.testing.assert_close(scored, buffer.rollout_logprobs, rtol=0, atol=0.1)
    assert (scored - buffer.rollout_logprobs).abs().mean() < 0.02


def test_samples_of_a_prompt_are_read_once(generate, requests, monkeypatch):
    passes, lay_out = [], Batch._lay_out

    def noting(batch, prompts):
        passes.extend(prompts.tokens)
        return lay_out(batch, prompts)

    monkeypatch.setattr(Batch, "_lay_out", noting)
    generate(requests)
    assert len(passes) == len(set(passes)) == len(QUESTIONS)


def test_a_stop_request_ends_the_work_at_the_next_token(model, tokenizer, requests):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 5

    engine = MegatronEngine(model, tokenizer, max_batch=64)
    with pytest.raises(Abandoned):
        engine.generate(requests, Sampling(max_new_tokens=16), seed=SEED, step=STEP, stop=stop)
    assert len(asked) == 7 and model.training


def test_end_of_sequence_ends_and_max_new_tokens_truncates(generate, requests, tokenizer):
    generations = generate(requests, temperature=1.2)
    assert {generation.truncated for generation in generations} == {False, True}
    for generation in generations:
        assert tokenizer.eos_id not in generation.tokens[:-1]
        assert generation.truncated == (generation.tokens[-1] != tokenizer.eos_id)
        assert len(generation.logprobs) == len(generation.tokens) <= 16
        if generation.truncated:
            assert len(generation.tokens) == 16


def test_any_of_several_ends_ends(generate, model, requests, tokenizer):
    free = generate(requests)
    other = max(set(free[0].tokens) - {tokenizer.eos_id}, key=free[0].tokens.count)
    two_ends = copy.copy(tokenizer)
    two_ends.eos_ids = (tokenizer.eos_id, other)
    engine = MegatronEngine(model, two_ends, max_batch=64)
    ended = engine.generate(requests, Sampling(max_new_tokens=16), seed=SEED, step=STEP)
    for whole, generation in zip(free, ended, strict=True):
        until = whole.tokens.index(other) + 1 if other in whole.tokens else len(whole.tokens)
        assert generation.tokens == whole.tokens[:until]
        assert generation.truncated == (generation.tokens[-1] not in two_ends.eos_ids)
    held = Sampling(max_new_tokens=16, min_new_tokens=6)
    for generation in engine.generate(requests, held, seed=SEED, step=STEP):
        assert not set(generation.tokens[:6]) & set(two_ends.eos_ids)


def test_a_shorter_limit_gives_the_beginning_of_the_same_response(generate, requests):
    longer, shorter = generate(requests), generate(requests, max_new_tokens=5)
    for long, short in zip(longer, shorter, strict=True):
        assert short.tokens == long.tokens[:5]
        assert short.truncated == (len(long.tokens) > 5 or long.truncated)


def test_min_new_tokens_forbids_the_end(generate, requests, tokenizer):
    free = generate(requests, temperature=1.2)
    assert min(len(generation.tokens) for generation in free) < 6
    held = generate(requests, temperature=1.2, min_new_tokens=6)
    for generation in held:
        assert tokenizer.eos_id not in generation.tokens[:6]
    assert any(not generation.truncated for generation in held), "no sequence ends afterwards"


def test_stop_strings_end_a_response(generate, requests, tokenizer):
    def text(generation):
        return tokenizer.decode(generation.tokens)

    free = generate(requests)
    assert sum("1" in text(generation) for generation in free) >= 6
    stopped = generate(requests, stop=("1", " + "))
    by_stop = 0
    for whole, generation in zip(free, stopped, strict=True):
        assert whole.tokens[: len(generation.tokens)] == generation.tokens
        before = tokenizer.decode(generation.tokens[:-1])
        assert "1" not in before and " + " not in before
        if "1" in text(generation) or " + " in text(generation):
            by_stop += 1
            assert not generation.truncated
        else:
            assert_same([generation], [whole])
    assert by_stop >= 6


def test_min_new_tokens_holds_back_stop_strings(generate, requests):
    stopped = generate(requests, stop=("1",), min_new_tokens=4)
    assert min(len(generation.tokens) for generation in stopped) == 4
    assert min(len(generation.tokens) for generation in generate(requests, stop=("1",))) < 4


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 5, "top_p": 0.8, "min_new_tokens": 4}],
    ids=["plain", "temperature", "truncated"],
)
def test_log_probs_equal_those_of_scoring(generate, model, requests, settings):
    """fp32 through the cache agrees with whole sequences in micro-batches to 1e-4."""
    generations = generate(requests, **settings)
    prompts = [Prompt(Example("?"), request.prompt) for request in requests]
    buffer = from_generations(prompts, requests, generations, samples_per_prompt=4)
    temperature = settings.get("temperature", 1.0)
    scored = logprobs.response_logprobs(model, buffer, 100, temperature=temperature)
    torch.testing.assert_close(scored, buffer.rollout_logprobs, rtol=0, atol=1e-4)
    other = logprobs.response_logprobs(model, buffer, 100, temperature=temperature * 1.01)
    assert (other - buffer.rollout_logprobs).abs().max() > 1e-3, "the tolerance hides mistakes"


def test_the_model_is_left_as_it_was(generate, model, requests, tokenizer):
    finished = []
    sampling = Sampling(max_new_tokens=2)
    MegatronEngine(model, tokenizer, max_batch=10).generate(
        requests, sampling, seed=0, step=0, progress=finished.append
    )
    assert sum(finished) == len(requests) and max(finished) <= 10
    assert model.training
    assert generate([]) == []
