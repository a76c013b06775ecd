"""Which checkpoints stay, and which are errors because they are of another model.

Damaged checkpoints are in test_checkpoint_store.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_rpp.checkpoint import state as checkpoint
from megatron_rpp.checkpoint.store import BEST, POINTER
from megatron_rpp.parallel import groups
from tests.small_run import config_of
from tests.whole_runs import VARIED, compare_weights, train_run, weights, with_whole_run

SETTINGS = {"train__steps": 2, "checkpoint__interval": 1, "checkpoint__keep": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The folder of the data and of run "whole" with its two checkpoints."""
    return with_whole_run(tmp_path_factory.mktemp("checkpoint"), **SETTINGS)


def stored_weights(base: Path, run: str, step: int) -> dict:
    config = config_of(base, base / run, **VARIED)
    return weights(config, base / run / f"checkpoints/iter_{step:07d}")


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_newest_are_kept(base, keep):
    run = f"keep {keep}"
    train_run(base, base / run, **(SETTINGS | {"train__steps": 3, "checkpoint__keep": keep}))
    names = sorted(path.name for path in (base / run / "checkpoints").iterdir())
    assert names == [*(f"iter_000000{step}" for step in range(4 - keep, 4)), POINTER]
    assert checkpoint.newest(base / run / "checkpoints").name == "iter_0000003"
    if keep == 2:
        pair = (stored_weights(base, name, 2) for name in (run, "whole"))
        assert compare_weights(*pair).size == 0


def test_the_best_is_kept_beside_the_newest(base):
    """The reward `falling` gives accuracies 0.25 (step 1), 0 and 0 on sixteen held-out prompts."""
    run = base / "best"
    settings = {
        "train__steps": 3, "checkpoint__keep": 1, "checkpoint__keep_best": "true",
        "evaluation__interval": 1, "reward__functions": "[tests.checkpoint.test_checkpoint:falling]",
    }  # fmt: skip
    _falling_calls.clear()
    train_run(base, run, **(SETTINGS | settings))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [BEST, "iter_0000001", "iter_0000003", POINTER]
    assert (run / "checkpoints" / BEST).read_text() == "1\n"


_falling_calls: list[int] = []


def falling(prompts, responses, labels, metadata) -> list[float]:
    """Gives 1 to a quarter of the evaluation after step 1 and 0 to all others."""
    _falling_calls.append(len(prompts))
    evaluations = _falling_calls.count(16)
    right = len(prompts) == 16 and evaluations == 2
    return [float(right and index < 4) for index in range(len(prompts))]


def test_each_checkpoint_has_the_weights_of_its_step(base):
    assert compare_weights(*(stored_weights(base, "whole", step) for step in (1, 2))).size > 1e-3


def test_a_save_that_was_killed_is_written_again(base):
    rubbish = base / "killed/checkpoints/.saving_iter_0000002_4711"
    rubbish.mkdir(parents=True)
    (rubbish / "common.pt").write_bytes(b"half of it")
    train_run(base, base / "killed", **SETTINGS)
    assert not rubbish.exists()
    pair = (stored_weights(base, name, 2) for name in ("killed", "whole"))
    assert compare_weights(*pair).size == 0


def test_another_save_of_the_same_process_stands_alone(base, tmp_path):
    """Megatron keeps the results of a save in a global variable, here those of `base`'s saves."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    def content(values: torch.Tensor) -> dict:
        return {"other": ShardedTensor.from_rank_offsets("other", values)}

    groups.start(1, 1, seed=1)
    try:
        (tmp_path / "other").mkdir()
        dist_checkpointing.save(content(torch.arange(5.0)), str(tmp_path / "other"))
        found = dist_checkpointing.load(content(torch.zeros(5)), str(tmp_path / "other"))
    finally:
        groups.stop()
    assert found["other"].tolist() == [0, 1, 2, 3, 4]


def test_load_from_a_directory_without_checkpoint_is_an_error(base, tmp_path):
    with pytest.raises(ValueError, match=f"no checkpoint at {tmp_path}.*directory of an earlier"):
        train_run(base, tmp_path / "run", checkpoint__load=tmp_path)


# Settings of another model, and the setting that the message names.
OTHER_MODELS = {
    "hidden": ({"model__hidden": 48}, r"linear_qkv.*\[4, 32\] there, \[4, 48\] here"),
    "layers": ({"model__layers": 2}, r"decoder\.layers.*\[4, 32\] there, \[2, 32\] here"),
    "ffn_hidden": ({"model__ffn_hidden": 32}, r"linear_fc.*there"),
    # The tensors have the same shapes, but the model computes another function.
    "heads": ({"model__heads": 8, "model__kv_heads": 4}, "heads is 4 there, 8 here"),
    "vocab_size": ({"model__vocab_size": 300}, "vocab_size is 41 there, 300 here"),
    "rope_theta": ({"model__rope_theta": 500}, "rope_theta is 10000.0 there, 500.0 here"),
    "tied": ({"model__tied_embeddings": "true"}, "tied_embeddings is False there, True here"),
}
SOURCES = [("checkpoint__load", other) for other in OTHER_MODELS] + [("model__init_path", "hidden")]


@pytest.mark.parametrize(("setting", "other"), SOURCES)
def test_a_checkpoint_of_another_model_is_an_error(base, tmp_path, setting, other):
    settings, message = OTHER_MODELS[other]
    source = {setting: base / "whole/checkpoints"}
    with pytest.raises(ValueError, match=f"does not fit the model.*{message}"):
        train_run(base, tmp_path, **(source | settings))


def test_another_kind_of_optimizer_is_an_error(base, tmp_path):
    source = {"checkpoint__load": base / "whole/checkpoints", "optimizer__distributed": "false"}
    with pytest.raises(ValueError, match="optimizer.distributed"):
        train_run(base, tmp_path, train__steps=3, **source)
