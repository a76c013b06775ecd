"""Every recipe can start: settings, layout and memory at full size, then a dry run.

The full-size checks use the config.json of the published model and allocate nothing of that size.
The dry run is the real program on one rank, with a small model of the same family and small data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rpp import reward_model, train
from megatron_rpp.config import check_world_size, cli, count_replicas
from megatron_rpp.config.yaml_files import read_yaml
from megatron_rpp.conversion.output_dir import check_output
from megatron_rpp.hf.architecture import read_architecture
from megatron_rpp.hf.families import rows_of
from megatron_rpp.runtime.host_memory import host_estimate
from megatron_rpp.runtime.memory_estimate import estimate
from tests.config.published import PUBLISHED
from tests.hf.models import save
from tests.preference_run import make_preferences
from tests.small_run import make_data
from tests.whole_runs import run_program

FOLDER = Path(__file__).resolve().parents[2] / "launch/recipes"
GPU_MEMORY = 80e9


def test_every_recipe_is_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {"quickstart", *PUBLISHED}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("**/*.yaml")), ids=lambda path: path.stem)
def test_an_export_does_not_overlap_its_checkpoints(path):
    checkpoint, trained = (
        read_yaml(str(path)).get(name, {}) for name in ("checkpoint", "reward_model")
    )
    if export := checkpoint.get("export_hf"):
        source = Path(trained.get("dir", checkpoint.get("dir")))
        check_output(Path(export), [source], marker="config.json", overwrite=True)


def words(recipe: str, folder: Path, *more: str) -> list[str]:
    """The recipe, writing into `folder`, with the model in `folder/model`."""
    return [
        f"--config={FOLDER / recipe}.yaml", f"--model.hf_path={folder / 'model'}",
        f"--checkpoint.dir={folder / 'checkpoints'}", f"--logging.dir={folder / 'logs'}",
        f"--checkpoint.export_hf={folder / 'exported'}", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_the_full_size_fits_its_machines(tmp_path, recipe):
    content, parameters, processes, _ = PUBLISHED[recipe]
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(content))
    model = read_architecture(tmp_path / "model")
    sizes = (
        size for row in rows_of(model.name, model.settings) for size in row.sizes(model.settings)
    )
    assert sum(rows * (columns or [1])[0] for rows, *columns in sizes) == parameters
    config = cli.parse(words(recipe, tmp_path)).config
    replicas = check_world_size(config, processes)
    memory = estimate(config, content["vocab_size"], replicas)
    # A tenth is left for the allocator and NCCL.
    assert memory.total < 0.9 * GPU_MEMORY, memory


def test_one_gpu_needs_the_host_memory_that_its_recipe_names(tmp_path):
    """The comments of the recipe, and room for the copies of a save, Python and the page cache."""
    content = PUBLISHED["qwen2.5-7b-one-gpu"][0]
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(content))
    config = cli.parse(words("qwen2.5-7b-one-gpu", tmp_path)).config
    need = host_estimate(config, content["vocab_size"], 1)
    text = (FOLDER / "qwen2.5-7b-one-gpu.yaml").read_text()
    assert "in a host with 192 GB of memory" in text and need.total < 0.8 * 192e9
    assert f"({need.optimizer / 1e9:.0f} and {need.reference / 1e9:.0f} GB)" in text
    device = estimate(config, content["vocab_size"], 1)
    assert device.optimizer == device.reference == 0
    assert f"gradients take {(device.weights + device.gradients) / 1e9:.0f} GB" in text


@pytest.mark.parametrize(
    ("recipe", "processes", "more"),
    [("same-gpus", 8, []), ("other-gpus", 4, ["--optimizer.offload=true"])],
)
def test_recipes_of_vllm_fit_on_top_of_another(tmp_path, recipe, processes, more):
    content = PUBLISHED["qwen2.5-7b-math"][0]
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(content))
    overlay = f"--config={FOLDER / 'vllm' / recipe}.yaml"
    config = cli.parse(words("qwen2.5-7b-math", tmp_path, overlay, *more)).config
    vllm = config.rollout.vllm
    assert config.rollout.engine == "vllm" and config.algorithm.rollout_correction == "cap"
    memory = estimate(config, content["vocab_size"], check_world_size(config, processes))
    assert memory.rollout == 0  # vLLM has the cache
    assert memory.total < 0.9 * GPU_MEMORY, memory
    assert config.rollout.ahead == (vllm.transport == "nccl")
    if vllm.transport == "ipc":
        # Beside what stays on the GPU while the server is awake.
        stays = memory.total - memory.update
        assert stays + vllm.memory_share * GPU_MEMORY < GPU_MEMORY, memory


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.mark.parametrize("recipe", ["quickstart", *PUBLISHED])
def test_dry_run(tmp_path, data, recipe, capfd):
    """The recipe on one rank, in fp32, with small data, and otherwise unchanged."""
    small = [
        f"--data.train={data / 'train.jsonl'}", f"--data.eval={data / 'eval.jsonl'}",
        f"--data.tokenizer={data / 'tokenizer.model'}", "--data.apply_chat_template=false",
        "--parallel.tensor=1", "--parallel.pipeline=1", "--parallel.sequence_parallel=false",
    ]  # fmt: skip
    if recipe == "quickstart":
        argv = [f"--config={FOLDER / recipe}.yaml", f"--checkpoint.dir={tmp_path / 'checkpoints'}"]
        argv += [f"--logging.dir={tmp_path / 'logs'}"]
    else:
        family = PUBLISHED[recipe][3]
        save(tmp_path, family, max_position_embeddings=8192, num_hidden_layers=2).rename(
            tmp_path / "model"
        )
        argv = words(recipe, tmp_path)
    run_program(train.main, [*argv, *small, "--dry-run"])
    assert "dry run: everything is built and nothing was trained" in capfd.readouterr().out
    assert not (tmp_path / "exported").exists()


REWARD_MODEL = f"--config={FOLDER / 'reward_model/llama3.1-8b.yaml'}"


def test_the_reward_model_fits_its_machine(tmp_path):
    """The estimate is that of a policy with a reference, which is more."""
    content = PUBLISHED["llama3.1-8b-general"][0]
    (tmp_path / "config.json").write_text(json.dumps(content))
    argv = [REWARD_MODEL, f"--model.hf_path={tmp_path}"]
    config = reward_model.settings_of(cli.parse(argv, "reward_model").config)
    replicas = count_replicas(config.parallel, 8)
    memory = estimate(config, content["vocab_size"], replicas)
    assert memory.total < 0.9 * GPU_MEMORY, memory


def test_a_dry_run_of_the_reward_model(tmp_path, capfd):
    """With a small random model and small data, and otherwise unchanged."""
    make_preferences(tmp_path)
    argv = [
        REWARD_MODEL, "--model.hf_path=null", "--model.max_length=128", "--parallel.tensor=1",
        "--parallel.sequence_parallel=false", "--data.apply_chat_template=false",
        f"--data.train={tmp_path / 'train.jsonl'}", f"--data.eval={tmp_path / 'eval.jsonl'}",
        f"--data.tokenizer={tmp_path / 'tokenizer.model'}",
        f"--reward_model.dir={tmp_path / 'run'}", f"--checkpoint.export_hf={tmp_path / 'hf'}",
    ]  # fmt: skip
    run_program(reward_model.main, [*argv, "--dry-run"])
    assert "dry run: everything is built and nothing was trained" in capfd.readouterr().out
