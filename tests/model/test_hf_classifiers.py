"""Classifiers with one label (reward models): loaded, converted, and on other layouts, against the
scores of transformers.

fp32 scores at every position agree to 1e-5 of the largest (sums in another order). A model with a
scalar head takes the layers of a language model and keeps its own head; a language model takes
nothing from a classifier.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from megatron_rpp.checkpoint import state as checkpoint
from megatron_rpp.config import ParallelConfig
from megatron_rpp.conversion.convert import to_hf, to_megatron
from megatron_rpp.conversion.settings import model_settings
from megatron_rpp.hf.safetensors_in import Weights
from megatron_rpp.model import build, hf_tensors, pipeline
from megatron_rpp.model.hf_weights import load_hf
from megatron_rpp.model.language_model import LanguageModel, chunks
from megatron_rpp.model.scalar_model import ScalarModel
from megatron_rpp.parallel import groups
from tests.distributed import run_ranks
from tests.hf.models import CLASSIFIERS, save, scores

from megatron.core import dist_checkpointing

TOKENS = torch.randint(101, (2, 24), generator=torch.Generator().manual_seed(1))
TOLERANCE = 1e-5
LAYOUTS = {
    "TP2": ParallelConfig(tensor=2, sequence_parallel=True),
    "PP2": ParallelConfig(pipeline=2),
}
PAIR = {"classifier": "qwen3-score", "language model": "qwen3"}
"""Two directories of one shape."""
IDS = {"pad_token_id": None, "eos_token_id": 2}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Maps each family to its directory; the checkpoints converted from PAIR lie next to theirs."""
    folder = tmp_path_factory.mktemp("classifiers")
    paths = {family: save(folder, family, **IDS) for family in (*CLASSIFIERS, "qwen3")}
    for family in PAIR.values():
        to_megatron(paths[family], converted(paths[family]))
    return paths


def converted(directory):
    return directory.with_name(f"{directory.name}-megatron")


def built(directory, parallel=ParallelConfig(), kind=ScalarModel):
    settings = model_settings(directory)
    vocab_size = settings.settings["vocab_size"]
    return build.build_model(
        settings.config(), parallel, vocab_size=vocab_size, seed=8, kind=kind
    ).requires_grad_(False)


def our_scores(stage):
    """Scores [b, s] on the last stage, None on the others."""
    hidden = pipeline.stage_forward(stage, TOKENS)
    last = chunks(stage)[-1]
    if not last.post_process:
        return None
    return last.score(hidden.flatten(0, 1)).view(hidden.shape[:2]).t()


def from_either(directory, parallel):
    """The scores of the directory; asserts that the converted checkpoint gives the same weights."""
    stage = built(directory, parallel)
    load_hf(stage, directory)
    if converted(directory).exists():
        other = built(directory, parallel)
        checkpoint.load_weights(other, converted(directory))
        theirs = dict(other.named_parameters())
        assert all(torch.equal(value, theirs[name]) for name, value in stage.named_parameters())
    return our_scores(stage)


def on_every_layout(rank, directories):
    found = {}
    for layout, parallel in LAYOUTS.items():
        groups.start(**parallel.sizes(), seed=1)
        found |= {(layout, f): from_either(directories[f], parallel) for f in CLASSIFIERS}
        found[layout, "kept"] = kept_heads(directories, parallel)
        groups.destroy()
    return found


def kept_heads(directories, parallel=ParallelConfig()):
    """A scalar model filled from a language model in either form: whether only its head is old."""
    found = []
    for load, source in (
        (load_hf, directories["qwen3"]),
        (checkpoint.load_weights, converted(directories["qwen3"])),
    ):
        stage = built(directories["qwen3-score"], parallel)
        before = {name: value.clone() for name, value in stage.named_parameters()}
        load(stage, source)
        same = {n for n, value in stage.named_parameters() if torch.equal(value, before[n])}
        found.append(same == {n for n in before if n.endswith("score.weight")})
    return all(found)


@pytest.fixture(scope="module")
def alone(directories):
    groups.start(1, 1, seed=1)
    yield {
        ("TP1", family): from_either(directories[family], ParallelConfig())
        for family in CLASSIFIERS
    }
    groups.stop()


@pytest.fixture(scope="module")
def found(directories, alone, tmp_path_factory):
    ranks = run_ranks(on_every_layout, 2, tmp_path_factory.mktemp("ranks"), directories)
    assert all(rank[layout, "kept"] for rank in ranks for layout in LAYOUTS)
    return alone | ranks[1]


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_scores_equal_those_of_transformers(found, directories, family):
    expected = scores(directories[family], TOKENS)
    assert expected.std() > 0.3, "weights too small to tell right from wrong"
    bound = TOLERANCE * float(expected.abs().max())
    for layout in ("TP1", *LAYOUTS):
        torch.testing.assert_close(found[layout, family], expected, rtol=0, atol=bound)


def test_a_running_model_gives_the_tensors_that_it_was_loaded_from(alone, directories):
    directory = directories["qwen2-score"]
    stage, files = built(directory), Weights(directory)
    load_hf(stage, directory)
    tensors = dict(pair for row in hf_tensors.on_every_rank(stage) for pair in row)
    assert tensors.keys() == files.shapes.keys()
    assert all(torch.equal(value, files.read(name)) for name, value in tensors.items())


def test_a_language_model_leaves_the_head_of_a_scalar_model(alone, directories):
    assert kept_heads(directories)


def test_a_policy_is_not_filled_from_a_classifier(alone, directories):
    stage, directory = built(directories["qwen3"], kind=LanguageModel), directories["qwen3-score"]
    message = "qwen3-score.* holds a reward model .* cannot generate: give the directory of a lang"
    with pytest.raises(ValueError, match=message):
        load_hf(stage, directory)
    with pytest.raises(ValueError, match=f"^checkpoint .*{message}"):
        checkpoint.load_weights(stage, converted(directory))


def test_tied_embeddings_have_no_effect(alone, directories, tmp_path):
    """transformers gives the same scores with either value, and so do we."""
    directory = directories["llama-score"]
    other = shutil.copytree(directory, tmp_path / "other")
    content = json.loads((other / "config.json").read_text())
    assert content["tie_word_embeddings"] is True
    assert "lm_head.weight" not in Weights(directory).shapes
    (other / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": False}))
    assert torch.equal(scores(other, TOKENS[:, :3]), scores(directory, TOKENS[:, :3]))
    stage = built(directory)
    load_hf(stage, other)
    assert torch.equal(our_scores(stage), alone["TP1", "llama-score"])
    to_megatron(other, tmp_path / "megatron")
    checkpoint.load_weights(stage, tmp_path / "megatron")


def trained(stage, folder, side_files=None):
    """A checkpoint as a run writes it: the model and, with prefixes, a critic and its moments."""
    (folder / "iter_0000007").mkdir(parents=True)
    (chunk,) = chunks(stage)
    state = {"model": chunk.sharded_state_dict(metadata={}), "architecture": chunk.architecture}
    for prefix in ("critic.", "optimizer.state.exp_avg.critic."):
        more = built(folder.parent / "critic")[0].sharded_state_dict(metadata={})
        for entry in more.values():
            entry.key = f"{prefix}{entry.key}"
        state[prefix] = more
    dist_checkpointing.save(state, str(folder / "iter_0000007"))
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    if side_files is not None:
        ignored = shutil.ignore_patterns("*.safetensors*")
        shutil.copytree(side_files, folder / "hf", ignore=ignored)
    return folder


@pytest.fixture
def critic(directories, tmp_path):
    return shutil.copytree(directories["qwen3-score"], tmp_path / "critic")


def test_a_policy_is_exported_without_its_critic(alone, directories, critic, tmp_path):
    stage = built(directories["qwen3"], kind=LanguageModel)
    load_hf(stage, directories["qwen3"])
    to_hf(trained(stage, tmp_path / "run"), tmp_path / "back")
    source, back = Weights(directories["qwen3"]), Weights(tmp_path / "back")
    assert source.shapes == back.shapes
    assert all(torch.equal(source.read(name), back.read(name)) for name in source.shapes)
    assert not model_settings(tmp_path / "run").scalar


@pytest.mark.parametrize("origin", ["random weights", "language model", "classifier"])
def test_a_trained_reward_model_is_a_classifier_for_transformers(
    alone, directories, critic, tmp_path, origin
):
    """Whatever its side files are of: the checkpoint has a scalar head."""
    stage, side = built(directories["qwen3-score"]), directories.get(PAIR.get(origin))
    run = trained(stage, tmp_path / "run", side)
    if origin == "language model":
        files = {
            "tokenizer_config.json": {"pad_token": "<pad>"},
            "tokenizer.json": {"added_tokens": [{"id": 5, "content": "<pad>"}]},
        }
        for name, content in files.items():
            (run / "hf" / name).write_text(json.dumps(content))
    found = model_settings(run)
    assert found.scalar and found.side_files == (run / "hf" if side else None)
    to_hf(run, tmp_path / "back")
    expected = our_scores(stage)[:, :6]
    torch.testing.assert_close(scores(tmp_path / "back", TOKENS[:, :6]), expected)
    content = json.loads((tmp_path / "back/config.json").read_text())
    assert content["architectures"] == ["Qwen3ForSequenceClassification"]
    assert content["id2label"] == {"0": "LABEL_0"}
    assert content.get("pad_token_id") == (5 if origin == "language model" else None)
    assert model_settings(tmp_path / "back").scalar
