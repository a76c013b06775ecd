"""Reward models in a run: scores against transformers' classifier on every layout, truncation,
offloading, and what is refused at the start.

fp32 scores agree to 1e-5 of the largest (sums in another order).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_rpp import train
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.model.language_model import chunks
from megatron_rpp.parallel import groups
from megatron_rpp.records import StepKey
from megatron_rpp.reporting.console import Console
from megatron_rpp.rewards import RewardError, RewardSet, Scores
from megatron_rpp.rollout.planning import shard
from megatron_rpp.runtime import run as runs
from megatron_rpp.runtime.host_memory import host_estimate
from megatron_rpp.runtime.identity import identities
from megatron_rpp.runtime.inputs import load_inputs
from megatron_rpp.runtime.memory_estimate import estimate
from megatron_rpp.runtime.step_progress import fingerprint
from tests.data.hf_tokenizers import make_chatml, make_tokenizer
from tests.distributed import run_ranks
from tests.hf.models import save, scores, set_config
from tests.small_run import config_of, make_data
from tests.whole_runs import VARIED, layout, rows

COUNT, TOLERANCE = 9, 1e-5
LAYOUTS = {
    "TP2 SP": {"parallel__tensor": 2, "parallel__sequence_parallel": "true"},
    "PP2 VPP2": {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2},
    "CP2": {"parallel__context": 2},
    "DP2": {},
}
IDS = {"pad_token_id": None, "eos_token_id": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    save(folder, "qwen3-score", **IDS)
    save(folder, "qwen3", **IDS)
    return folder


def settings_of(data: Path, *names: str, **more) -> dict:
    functions = ["tests.whole_runs:varied", *(f"model:{data / name}" for name in names)]
    return (
        VARIED | {"reward__functions": json.dumps(functions), "rollout__prompts_per_step": 4} | more
    )


def built(data: Path, *names: str, **more):
    config = config_of(data, data / "run", **settings_of(data, *names, **more))
    return runs.build(config, load_inputs(config), Console(False))


def samples(run):
    """Prompts and responses of different lengths, this replica's; the last response is empty."""
    prompts = [run.inputs.train[number] for number in range(COUNT)]
    responses = [[5 + number % 7] * (COUNT - 1 - number) for number in range(COUNT)]
    own = shard(COUNT, groups.data_rank(), groups.data_size())
    return [prompts[i] for i in own], [responses[i] for i in own]


def scored(rank: int, data: Path, more: dict) -> tuple[list[float], list[tuple[int, ...]]]:
    """Scores and token sequences of this replica's samples."""
    with layout(config_of(data, data / "run", **settings_of(data, "qwen3-score", **more))):
        run = built(data, "qwen3-score", **more)
        prompts, responses = samples(run)
        found = run.scorer.score(prompts, responses).parts[f"model:{data / 'qwen3-score'}"]
        texts = [run.scorer.form.text(response) for response in responses]
        return found, run.scorer.models[0].encode(prompts, texts).sequences


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory) -> list[float]:
    """The scores of transformers, of the sequences that one rank encodes."""
    ((ours, sequences),) = run_ranks(scored, 1, tmp_path_factory.mktemp("one"), data, {})
    theirs = [float(scores(data / "qwen3-score", torch.tensor([s]))[0, -1]) for s in sequences]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=TOLERANCE)
    assert torch.tensor(theirs).std() > 100 * TOLERANCE
    return theirs


@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_are_those_of_transformers_on_every_layout(data, tmp_path, expected, name):
    results = run_ranks(scored, 2, tmp_path, data, LAYOUTS[name])
    found = [part for part, _ in results]
    for ours in [found[0] + found[1]] if name == "DP2" else found:
        torch.testing.assert_close(
            torch.tensor(ours), torch.tensor(expected), rtol=0, atol=TOLERANCE
        )


@pytest.fixture(scope="module")
def alone(data):
    with layout(config_of(data, data)):
        yield


def test_a_sequence_is_text_prompt_response_and_end(data, alone):
    run = built(data, "qwen3-score")
    prompts, responses = samples(run)
    tokenizer, (model,) = run.inputs.tokenizer, run.scorer.models
    text = run.scorer.form.text(responses[0])
    (sequence, *_) = model.encode(prompts, [text] * COUNT).sequences
    expected = (*prompts[0].tokens, *tokenizer.encode(text), tokenizer.eos_id)
    assert sequence == expected


def test_the_scores_are_weighted_with_those_of_the_functions(data, alone):
    run = built(data, "qwen3-score", reward__weights="[2.0, 0.5]")
    prompts, responses = samples(run)
    result = run.scorer.score(prompts, responses)
    first, second = result.parts.values()
    expected = [2 * one + 0.5 * other for one, other in zip(first, second)]
    assert result.total == pytest.approx(expected) and len(set(second)) > 5


def test_long_inputs_lose_their_beginning_and_are_counted(data, alone):
    name = f"model:{data / 'qwen3-score'}"
    run = built(data, "qwen3-score", reward__options=json.dumps({name: {"max_length": 12}}))
    prompts, responses = samples(run)
    texts = [run.scorer.form.text(response) for response in responses]
    (model,) = run.scorer.models
    whole = [built(data, "qwen3-score").scorer.models[0].encode(prompts, texts).sequences]
    cut = model.encode(prompts, texts)
    assert cut.sequences == [sequence[-12:] for sequence in whole[0]]
    longer = sum(len(sequence) > 12 for sequence in whole[0])
    assert run.scorer.score(prompts, responses).cut == cut.cut == longer > 0


def test_offloaded_weights_give_the_same_bits(data, alone):
    resident, offloaded = (
        built(data, "qwen3-score", reward__model_placement=placement)
        for placement in ("resident", "offload")
    )
    results = [run.scorer.score(*samples(run)).total for run in (resident, offloaded)]
    assert results[0] == results[1]
    parameter = next(chunks(offloaded.scorer.models[0].model.stage)[0].parameters())
    assert parameter.data_ptr() == offloaded.scorer.models[0].model.host[0][1].data_ptr()


def test_it_is_in_the_memory_estimate(data, alone):
    plain, resident, offloaded = (
        config_of(data, data, **settings_of(data, *names, **more))
        for names, more in (
            ((), {}),
            (("qwen3-score",), {}),
            (("qwen3-score",), {"reward__model_placement": "offload"}),
        )
    )
    run = built(data, "qwen3-score")
    parameters = run.scorer.models[0].model.stage.parameters()
    size = sum(p.numel() * p.element_size() for p in parameters)
    assert estimate(resident, 101, 1).reward == size
    assert estimate(resident, 101, 1).total == estimate(plain, 101, 1).total + size
    found = estimate(offloaded, 101, 1)
    assert found.reward == 0 and found.scoring == estimate(resident, 101, 1).scoring + size
    assert host_estimate(offloaded, 101, 1).reward == size


def test_other_weights_are_noticed(data, alone, capsys):
    """In a resumed run, and if rollouts were saved with scores of the weights before."""
    folder = data / "changed"
    save(folder, "qwen3-score", **IDS)
    name, run = "changed/qwen3-score", folder / "run"
    settings = settings_of(data, name, train__steps=1, checkpoint__save_rollouts="true")
    config = config_of(data, run, **settings)
    inputs, key = load_inputs(config), StepKey(1, 0, 0)
    before = [identities(config, inputs)["reward.functions"], fingerprint(config, inputs, key)]
    train.train(config, inputs)
    save(folder, "qwen3-score", seed=4, **IDS)
    inputs = load_inputs(config)
    now = [identities(config, inputs)["reward.functions"], fingerprint(config, inputs, key)]
    assert before[0] != now[0] and before[1] != now[1]
    longer = config_of(data, run, **(settings | {"train__steps": 2}))
    train.train(longer, load_inputs(longer))
    assert "reward.functions (then" in capsys.readouterr().out


def test_it_has_its_metric_in_a_whole_run(data, alone):
    settings = settings_of(data, "qwen3-score", train__steps=1)
    config = config_of(data, data / "whole", **settings)
    train.train(config, load_inputs(config))
    (row,) = rows(data / "whole/logs/metrics.jsonl")
    assert f"reward/model:{data / 'qwen3-score'}" in row and row["reward/cut"] == 0
    assert row["reward/mean"] != row["reward/tests.whole_runs:varied"]


def test_scores_that_are_not_finite_end_the_run(data, alone):
    run = built(data, "qwen3-score")
    chunks(run.scorer.models[0].model.stage)[0].score.weight.data.fill_(torch.nan)
    with pytest.raises(RewardError, match=r"model:.*qwen3-score.* gave the score nan"):
        run.scorer.score(*samples(run))


def broken(data: Path, name: str, **keys) -> str:
    """A copy of the classifier with other keys in config.json."""
    (folder := data / name).mkdir()
    for path in (data / "qwen3-score").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    set_config(folder, **keys)
    return name


def test_what_is_refused_at_the_start(data):
    save(data / "small", "qwen3-score", vocab_size=9, **IDS)
    labels = {str(number): f"LABEL_{number}" for number in range(2)}
    cases = {
        "nothing": "no checkpoint at",
        "qwen3": "is a language model, it has no score",
        broken(data, "two labels", id2label=labels): "names 2 labels",
        "small/qwen3-score": "more than the 9 of the model",
    }
    for name, message in cases.items():
        config = config_of(data, data, **settings_of(data, name))
        with pytest.raises(ConfigError, match=message) as raised:
            load_inputs(config)
        assert f"model:{data / name}" in str(raised.value)


def test_a_layout_that_does_not_divide_is_refused(data):
    more = {"model__kv_heads": 4, "parallel__tensor": 4}
    config = config_of(data, data, **settings_of(data, "qwen3-score", **more))
    with pytest.raises(ConfigError, match=r"qwen3-score'?: model.kv_heads must be divisible"):
        load_inputs(config)


@pytest.mark.parametrize("options", [{"max_length": 1}, {"max_length": 513}, {"length": 9}])
def test_options_are_checked(data, options):
    given = json.dumps({f"model:{data / 'qwen3-score'}": options})
    config = config_of(data, data, **settings_of(data, "qwen3-score", reward__options=given))
    with pytest.raises(ConfigError, match="may hold max_length, a number from 2 to the model's"):
        load_inputs(config)


def test_a_placement_without_a_model_is_refused(data):
    with pytest.raises(SystemExit):
        config_of(data, data, **settings_of(data, reward__model_placement="offload"))


def test_conversations_need_a_chat_template(data):
    conversation = {"prompt": [{"role": "user", "content": "2 + 2 ="}], "label": "4"}
    (data / "chat.jsonl").write_text(json.dumps(conversation) + "\n")
    files = {"data__train": data / "chat.jsonl", "data__eval": data / "chat.jsonl"}
    folder = "without template/qwen3-score"
    save(data / "without template", "qwen3-score", vocab_size=400, **IDS)
    make_tokenizer(data / folder, ["<|end|>"], None, eos_token="<|end|>")
    files["data__tokenizer"] = make_chatml(data / "policy")
    files["model__max_length"] = 64
    config = config_of(data, data, **settings_of(data, folder, **files))
    with pytest.raises(ConfigError, match="without template.*chat template"):
        load_inputs(config)


def test_names_of_models_are_no_functions():
    rewards = RewardSet(["model:DIR", "exact_match"], weights=[0.5, 1.0])
    columns = (["p"] * 2, ["a", "b"], ["a", "a"], [{}] * 2)
    result = rewards.score(*columns, of_models={"model:DIR": [0.25, -1.0]})
    parts = {"model:DIR": [0.25, -1.0], "exact_match": [1.0, 0.0]}
    assert result == Scores([1.125, -0.5], parts)
