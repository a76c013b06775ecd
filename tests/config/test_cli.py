"""The command line: files under flags, Megatron's names, help, and the printed configuration."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, is_dataclass, replace

import docstring_parser
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rpp.config import (
    Config,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RewardModelConfig,
    RolloutConfig,
    SftConfig,
    TrainConfig,
)
from megatron_rpp.config.cli import parse
from megatron_rpp.config.yaml_files import dump_yaml, read_yaml


@pytest.fixture(autouse=True)
def _rank_zero(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def write(tmp_path):
    """Writes a YAML file, returns its path."""

    def write_file(text, name="run.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write_file


def _leaves(values, prefix=""):
    """(dotted name, value) of every setting."""
    for name, value in vars(values).items():
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_no_arguments_give_the_defaults():
    assert parse([]) == (Config(), False)


def test_later_file_wins_and_the_command_line_wins_over_files(write):
    first = write("optimizer:\n  lr: 1e-4\n  beta1: 0.5\n  beta2: 0.5\nseed: 1\n", "a.yaml")
    second = write("optimizer:\n  beta2: 0.6\nseed: 2\n", "b.yaml")
    config, _ = parse(["--seed", "3", "--config", first, f"--config={second}"])
    assert config == Config(seed=3, optimizer=OptimizerConfig(lr=1e-4, beta1=0.5, beta2=0.6))


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "0.0001", "1.0e-04", "+1e-4", ".1e-3"])
def test_yaml_floats_without_a_dot_are_numbers(write, text):
    config, _ = parse(["--config", write(f"optimizer:\n  lr: {text}\n")])
    assert config.optimizer.lr == 1e-4


def test_empty_file_and_empty_section_change_nothing(write):
    sections = write("# all defaults\nmodel:\nsft:\n  optimizer:\n", "sections.yaml")
    assert parse(["--config", sections, "--config", write("")]).config == Config()


def test_command_line_values_of_every_type():
    argv = "--reward.weights [1,2e-1] --reward.functions [exact_match,a.py:f] --rollout.stop=['x']"
    argv += " --rollout.stop+=y --task.params.min_terms 2 --task.params.ratio=1e-1"
    argv += " --model.kv_heads null --data.label_key 12 --model.tied_embeddings true"
    argv += " --reward.clip 5"
    config = parse(argv.split()).config
    assert config.reward == RewardConfig(
        functions=["exact_match", "a.py:f"], weights=[1.0, 0.2], clip=5.0
    )
    assert config.rollout.stop == ["x", "y"]
    assert config.task.params == {"min_terms": 2, "ratio": 0.1}
    assert config.model == ModelConfig(kv_heads=None, tied_embeddings=True)
    assert config.data.label_key == "12"


def test_a_command_line_changes_nothing_for_the_next():
    """Defaults are read once in a process."""
    argv = "--rollout.stop+=y --task.params.ratio=1e-1 --sft.optimizer.lr 1"
    first = parse(argv.split()).config
    first.rollout.stop.append("z")
    assert parse([]).config == Config()


def test_nested_section_has_an_optimizer_of_its_own():
    config = parse(["--sft.optimizer.lr", "3e-3"]).config
    assert (config.sft.optimizer.lr, config.optimizer.lr) == (3e-3, 1e-4)


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run"])
def test_dry_run_is_handed_to_the_caller(flag):
    assert parse(["--seed=5", flag]) == (Config(seed=5), True)


@pytest.mark.parametrize("flag", ["--print-config", "--print_config"])
def test_print_config_is_read_back_as_the_same_config(write, capsys, flag):
    source = write(
        "rollout: {stop: ['1e5', 'null', 'a: b', \"\\n\", ü, '#']}\n"
        "task: {params: {min_terms: 2, ratio: 1e-3, names: [a, '7', true], nothing: null}}\n"
        "optimizer: {lr: 1e-20}\nmodel: {init_path: '1e5', kv_heads: 2}\ndata: {train: 'yes'}\n"
    )
    argv = ["--config", source, "--seed=7", "--sft.optimizer.lr=2e-5"]
    with pytest.raises(SystemExit) as exit_info:
        parse([*argv, flag])
    printed = capsys.readouterr()
    assert (exit_info.value.code, printed.err) == (0, "")
    config = parse(["--config", write(printed.out, "printed.yaml")]).config
    assert config == parse(argv).config
    assert config.rollout.stop == ["1e5", "null", "a: b", "\n", "ü", "#"]
    assert config.task.params == {
        "min_terms": 2,
        "ratio": 1e-3,
        "names": ["a", "7", True],
        "nothing": None,
    }


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(), st.text() | st.floats(allow_nan=False) | st.integers()))
def test_dumped_yaml_is_read_back(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("yaml") / "x.yaml"
    file.write_text(dump_yaml(content), encoding="utf-8")
    assert read_yaml(str(file)) == content


def test_help_shows_every_docstring_and_alias(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(["--train.steps=0", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit_info.value.code == 0
    for name, _ in _leaves(Config()):
        assert f"--{name} " in text
    for section in (Config, ModelConfig, RolloutConfig, SftConfig, OptimizerConfig):
        for field in docstring_parser.parse_from_object(section).params:
            assert " ".join(field.description.split()) in text
    assert "--num-query-groups VALUE --model.kv_heads" in text
    assert "train.max_tokens_per_microbatch = N x model.max_length" in text


def test_yaml_merge_key_may_override_what_it_merges(write):
    file = write("sft:\n  optimizer: &o {lr: 1e-3, beta1: 0.5}\noptimizer: {<<: *o, lr: 1e-5}\n")
    assert parse(["--config", file]).config.optimizer == OptimizerConfig(lr=1e-5, beta1=0.5)


_VALUE_ALIASES = [
    ("--tensor-model-parallel-size", "2", "parallel.tensor", 2),
    ("--pipeline-model-parallel-size", "2", "parallel.pipeline", 2),
    ("--num-layers", "6", "model.layers", 6),
    ("--hidden-size", "64", "model.hidden", 64),
    ("--ffn-hidden-size", "160", "model.ffn_hidden", 160),
    ("--num-attention-heads", "8", "model.heads", 8),
    ("--num-query-groups", "2", "model.kv_heads", 2),
    ("--kv-channels", "16", "model.head_dim", 16),
    ("--vocab-size", "99", "model.vocab_size", 99),
    ("--seq-length", "512", "model.max_length", 512),
    ("--max-position-embeddings", "512", "model.max_length", 512),
    ("--rotary-base", "500000", "model.rope_theta", 500000.0),
    ("--norm-epsilon", "1e-6", "model.norm_eps", 1e-6),
    ("--init-method-std", "0.01", "model.init_std", 0.01),
    ("--tokenizer-model", "t.model", "data.tokenizer", "t.model"),
    ("--lr", "3e-4", "optimizer.lr", 3e-4),
    ("--min-lr", "1e-5", "optimizer.min_lr", 1e-5),
    ("--lr-warmup-iters", "10", "optimizer.warmup_steps", 10),
    ("--lr-decay-iters", "20", "optimizer.decay_steps", 20),
    ("--lr-decay-style", "linear", "optimizer.decay_style", "linear"),
    ("--weight-decay", "0.1", "optimizer.weight_decay", 0.1),
    ("--adam-beta1", "0.8", "optimizer.beta1", 0.8),
    ("--adam-beta2", "0.8", "optimizer.beta2", 0.8),
    ("--adam-eps", "1e-7", "optimizer.eps", 1e-7),
    ("--clip-grad", "0.5", "optimizer.clip_grad", 0.5),
    ("--train-iters", "7", "train.steps", 7),
    ("--save", "out", "checkpoint.dir", "out"),
    ("--load", "in", "checkpoint.load", "in"),
    ("--save-interval", "3", "checkpoint.interval", 3),
    ("--eval-interval", "3", "evaluation.interval", 3),
    ("--tensorboard-dir", "tb", "logging.dir", "tb"),
    ("--seed", "9", "seed", 9),
]


def test_megatron_names_set_our_settings_and_no_other():
    expected = dict(_leaves(Config())) | {name: value for _, _, name, value in _VALUE_ALIASES}
    spaced = [word for flag, text, _, _ in _VALUE_ALIASES for word in (flag, text)]
    assert dict(_leaves(parse(spaced).config)) == expected
    joined = [f"{flag}={text}" for flag, text, _, _ in _VALUE_ALIASES]
    assert dict(_leaves(parse(joined).config)) == expected


def test_names_of_the_same_setting_are_both_read():
    assert parse(["--max-position-embeddings", "300"]).config.model.max_length == 300
    assert parse(["--seq-length", "300"]).config.model.max_length == 300


def test_megatron_switches(write):
    file = write("optimizer: {distributed: false}\n")
    argv = ["--bf16", "--sequence-parallel", "--use-distributed-optimizer", "--config", file]
    config = parse([*argv, "--tensor-model-parallel-size", "2"]).config
    assert config == Config(
        model=ModelConfig(dtype="bf16"), parallel=ParallelConfig(tensor=2, sequence_parallel=True)
    )


def test_later_of_alias_and_setting_wins():
    assert parse(["--lr=1", "--optimizer.lr=2"]).config.optimizer.lr == 2
    assert parse(["--optimizer.lr=2", "--lr=1"]).config.optimizer.lr == 1


def test_micro_batch_size_is_a_token_budget_of_the_final_length(write):
    file = write("train: {max_tokens_per_microbatch: 5}\nmodel: {max_length: 300}\n")
    argv = ["--micro-batch-size", "4", "--config", file, "--seq-length=512"]
    assert parse(argv).config.train.max_tokens_per_microbatch == 4 * 512


def test_aliases_set_what_sft_and_reward_model_read():
    argv = "--lr 3e-4 --train-iters 7 --eval-interval 2 --save warm --num-layers 2".split()
    expected = SftConfig(steps=7, eval_interval=2, dir="warm", optimizer=OptimizerConfig(lr=3e-4))
    assert parse(argv, "sft").config == Config(sft=expected, model=ModelConfig(layers=2))
    rated = RewardModelConfig(
        steps=7, eval_interval=2, dir="warm", optimizer=OptimizerConfig(lr=3e-4)
    )
    found = parse(argv, "reward_model").config
    assert found == Config(reward_model=rated, model=ModelConfig(layers=2))


_SCRIPT = """
import sys, time
from megatron_rpp.config.cli import parse
config = parse(program="train").config
slow = [name for name in ("torch", "megatron", "numpy") if name in sys.modules]
print(config.train.steps, slow, time.process_time() < 1.0)
"""


def _run(*argv):
    command = [sys.executable, "-W", "error", "-c", _SCRIPT, *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_process_starts_within_a_second_and_without_torch(write):
    result = _run("--config", write("train:\n  steps: 12\n"))
    assert (result.returncode, result.stdout, result.stderr) == (0, "12 [] True\n", "")


def test_process_prints_config_and_reports_mistakes():
    printed = _run("--print-config", "--train.steps=3")
    assert printed.returncode == 0
    assert yaml.safe_load(printed.stdout) == asdict(replace(Config(), train=TrainConfig(steps=3)))
    failed = _run("--train.stepz=3")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == (
        "error: unknown key 'train.stepz' on the command line: did you mean 'train.steps'?\n"
    )
