"""Mistakes on the command line and in files: one line on stderr of rank 0, exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rpp.config.cli import parse


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


@pytest.fixture
def error_line(capsys):
    """Parses a faulty command line; returns the one line printed for it."""

    def run(*argv, program="train"):
        with pytest.raises(SystemExit) as exit_info:
            parse(list(argv), program)
        printed = capsys.readouterr()
        assert exit_info.value.code == 2
        assert printed.out == ""
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
        return printed.err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "--rollout.temprature 1",
            "unknown key 'rollout.temprature' on the command line: "
            "did you mean 'rollout.temperature'?",
        ),
        (
            "--top_p 1",
            "unknown key 'top_p' on the command line: did you mean 'rollout.top_p'?",
        ),
        (
            "--num-layer=1",
            "unknown key 'num-layer' on the command line: did you mean 'num-layers'?",
        ),
        ("--zzz 1", "unknown key 'zzz' on the command line: --help lists the known ones"),
        (
            "--reward 1",
            "unknown key 'reward' on the command line: it is a section, set a key of it, such as "
            "'reward.functions'",
        ),
        ("--lr --seed 3", "--lr needs a value, got none"),
        ("--lr", "--lr needs a value, got none"),
        ("12", "unexpected argument '12': write settings as --section.key value"),
        ("--bf16=1", "--bf16 is a switch and takes no value, got '1'"),
        ("--optimizer.lr fast", "optimizer.lr must be a number, got fast"),
        ("--lr null", "optimizer.lr must be a number, got None"),
        ("--train.steps 1.5", "train.steps must be an integer, got 1.5"),
        ("--model.kv_heads two", "model.kv_heads must be an integer or null, got two"),
        ("--model.dtype fp16", "model.dtype must be one of fp32, bf16, got fp16"),
        ("--reward.normalize 2", "reward.normalize must be true or false, got 2"),
        ("--rollout.stop a", "rollout.stop must be a list [...], each a text, got a"),
        ("--task.params 3", "task.params must be a mapping {name: value}, got 3"),
        ("--optimizer.lr -1e-3", "optimizer.lr must be above 0, got -0.001"),
        ("--sft.optimizer.lr -1", "sft.optimizer.lr must be above 0, got -1.0"),
        ("--micro-batch-size 0", "--micro-batch-size must be at least 1, got 0"),
        (
            "--micro-batch-size 2 --train.max_tokens_per_microbatch 9",
            "--micro-batch-size 2 and --train.max_tokens_per_microbatch set the same budget: "
            "give one of them",
        ),
        (
            "--config none.yaml",
            f"cannot read config file '{Path.cwd()}/none.yaml': No such file or directory",
        ),
        ("--config", "argument --config: expected one argument"),
        (
            "--tensor-model-parallel-size 3",
            "model.heads must be divisible by parallel.tensor = 3, got 4: change one of them",
        ),
    ],
)
def test_mistake_on_the_command_line_is_one_line(error_line, argv, message):
    assert error_line(*argv.split()) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "rollout:\n  temprature: 1\n",
            "unknown key 'rollout.temprature' in config file 'FILE': "
            "did you mean 'rollout.temperature'?",
        ),
        (
            "sft:\n  optimizer:\n    lrr: 1\n",
            "unknown key 'sft.optimizer.lrr' in config file 'FILE': "
            "did you mean 'sft.optimizer.lr'?",
        ),
        (
            "rollouts:\n  top_p: 1\n",
            "unknown key 'rollouts' in config file 'FILE': did you mean 'rollout'?",
        ),
        (
            "sft:\n  lr: 1\n",
            "unknown key 'sft.lr' in config file 'FILE': did you mean 'sft.optimizer.lr'?",
        ),
        (
            "rollout.top_p: 1\n",
            "unknown key 'rollout.top_p' in config file 'FILE': write the field on an indented "
            "line below its section",
        ),
        ("train: {steps: many}\n", "config file 'FILE': train.steps must be an integer, got many"),
        ("train: {steps: null}\n", "config file 'FILE': train.steps must be an integer, got null"),
        (
            "data: {train: 12}\n",
            "config file 'FILE': data.train must be a text or a list [...], each a text, got 12",
        ),
        (
            "model: 5\n",
            "config file 'FILE': 'model' is a section, write its keys on indented lines below it, "
            "got 5",
        ),
        ("- 1\n", "config file 'FILE' must hold 'section:' lines, got [1]"),
        (
            "seed: 1\nmodel:\n  heads: 4\nseed: 2\n",
            "config file 'FILE': key 'seed' is given again in line 4: join the two",
        ),
        ("train: {steps: 0}\n", "train.steps must be at least 1, got 0"),
    ],
)
def test_mistake_in_a_file_is_one_line(error_line, write, text, message):
    file = write(text)
    assert error_line("--config", file) == message.replace("FILE", file)


def test_yaml_that_does_not_parse_is_one_line(error_line, write):
    file = write("model: [\n")
    assert error_line("--config", file).startswith(f"config file '{file}': while parsing")


@pytest.mark.parametrize("argv", [["--zzz", "1"], ["--config", "none.yaml"], ["--train.steps=0"]])
def test_other_ranks_exit_alike_but_silently(monkeypatch, capsys, argv):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as exit_info:
        parse(argv)
    assert exit_info.value.code == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("flag", ["--help", "--print-config"])
def test_other_ranks_print_neither_help_nor_config(monkeypatch, capsys, flag):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as exit_info:
        parse([flag])
    assert exit_info.value.code == 0
    assert capsys.readouterr() == ("", "")


def test_flags_that_the_warm_start_never_reads_are_errors(error_line):
    assert "unknown key 'save-interval'" in error_line("--save-interval", "3", program="sft")


def test_rank_zero_prints_the_error(monkeypatch, error_line):
    monkeypatch.setenv("RANK", "0")
    assert error_line("--train.steps=0") == "train.steps must be at least 1, got 0"


def test_invalid_config_is_not_printed(error_line):
    assert (
        error_line("--print-config", "--train.steps=0") == "train.steps must be at least 1, got 0"
    )
