"""A user's mistake gives one message with the remedy and exit code 2 on every rank, without a hang.

Most mistakes are found before any rank waits for another, so one process is enough to test them; a
few run as the real program on real ranks. Mistakes in the configuration's values alone are in
test_config.py and test_cli_errors.py, checkpoints that do not fit in test_checkpoint.py.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_rpp import train
from megatron_rpp.lifecycle import entrypoint, exit_codes
from megatron_rpp.parallel import groups
from tests.ports import free_port
from tests.small_run import arguments, make_data
from tests.whole_runs import VARIED, rows, train_run

ROOT = Path(__file__).resolve().parents[2]
TP2 = {"parallel__tensor": 2}
LIMIT = 120.0
"""Seconds for a program to refuse; the collectives' own timeout is half an hour."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The data of small runs, and broken variants of it."""
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    good = rows(folder / "train.jsonl")[:3]
    broken = {
        "no_prompt": [good[0], {"question": good[1]["prompt"], "label": "1"}],
        "blank_prompt": [good[0], good[1], good[2] | {"prompt": " "}],
        "long_prompt": [good[0], {"prompt": "1 + " * 14, "label": "14"}],
    }
    for name, content in broken.items():
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(lines)
    (folder / "empty.jsonl").write_text("")
    (folder / "torn.jsonl").write_text(json.dumps(good[0]) + '\n{"prompt": "1 + 1 =", "la')
    (folder / "broken_reward.py").write_text("import no_such_library\n\ndef score(*batch): ...\n")
    (folder / "reward.py").write_text("def score(*batch): ...\n")
    return folder


# Settings (DATA stands for a folder), and what the message must contain: the value, the remedy.
MISTAKES = {
    "heads": (
        {"parallel__tensor": 3},
        "model.heads must be divisible by parallel.tensor = 3, got 4: change one",
    ),
    "KV heads": (
        {"parallel__tensor": 4},
        "model.kv_heads must be divisible by parallel.tensor = 4, got 2: change one",
    ),
    "layers": (
        {"parallel__pipeline": 3},
        "model.layers must be divisible by parallel.pipeline = 3, got 4: change one",
    ),
    "row without prompt": (
        {"data__train": "DATA/no_prompt.jsonl"},
        "no_prompt.jsonl, line 2 has no field 'prompt', only ['label', 'question']: set "
        "data.prompt_key",
    ),
    "blank prompt": ({"data__eval": "DATA/blank_prompt.jsonl"}, "blank_prompt.jsonl, line 3: "),
    "malformed row": ({"data__train": "DATA/torn.jsonl"}, "torn.jsonl, line 2 is not JSON"),
    "empty data set": ({"data__train": "DATA/empty.jsonl"}, "empty.jsonl is empty: it needs one"),
    "empty held-out set": ({"data__eval": "DATA/empty.jsonl"}, "empty.jsonl is empty: it needs"),
    "no data file": ({"data__train": "DATA/gone.jsonl"}, "gone.jsonl is not a file: correct"),
    "no data set named": ({"data__train": ""}, "data.train is empty: name a file with --data."),
    "no held-out set named": ({"data__eval": ""}, "data.eval is empty: name a file"),
    "no tokenizer named": ({"data__tokenizer": ""}, "data.tokenizer is empty: name a file"),
    "no tokenizer file": ({"data__tokenizer": "DATA/gone.model"}, "gone.model is not a file or"),
    "not a tokenizer": (
        {"data__tokenizer": "DATA/train.jsonl"},
        "train.jsonl is not a SentencePiece model",
    ),
    "vocabulary": (
        {"model__vocab_size": 30},
        "tokenizer.model has 41 tokens, more than model.vocab_size 30: raise model.vocab_size",
    ),
    "long prompt": (
        {"data__eval": "DATA/long_prompt.jsonl"},
        "long_prompt.jsonl, line 2: the prompt has 29 tokens, the limit is 26: raise it (the",
    ),
    "unknown reward": (
        {"reward__functions": "[exact_mach]"},
        "unknown reward function 'exact_mach': use one of ['exact_match', 'length', ",
    ),
    "no reward file": (
        {"reward__functions": "[DATA/gone.py:score]"},
        "there is no file DATA/gone.py",
    ),
    "no reward module": (
        {"reward__functions": "[no_such_package.rewards:score]"},
        "cannot be imported (ModuleNotFoundError: No module named 'no_such_package'): a module "
        "must be on PYTHONPATH",
    ),
    "broken reward file": (
        {"reward__functions": "[DATA/broken_reward.py:score]"},
        "cannot be imported (ModuleNotFoundError: No module named 'no_such_library')",
    ),
    "no reward function": (
        {"reward__functions": "[DATA/reward.py:scores]"},
        "reward.py has no 'scores', only ['score']",
    ),
    "unwritable logs": (
        {"logging__dir": "DATA/empty.jsonl/logs"},
        "logging.dir DATA/empty.jsonl/logs cannot be written (Not a directory): choose another",
    ),
    "unwritable checkpoints": (
        {"checkpoint__dir": "DATA/empty.jsonl"},
        "checkpoint.dir DATA/empty.jsonl cannot be written (File exists): choose another",
    ),
}


def error_message(argv: list[str], capsys) -> str:
    """Runs the program; checks exit code and form of the message, and returns the message."""
    with pytest.raises(SystemExit) as ended:
        entrypoint.run(lambda: train.main(argv))
    assert ended.value.code == exit_codes.REFUSED == 2
    assert not dist.is_initialized(), "found only after the ranks had joined"
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1 and errors.startswith("error: ")
    return errors


def check_error(settings: dict, message: str, data: Path, run: Path, capsys) -> None:
    """Checks that a run ends with `message` (DATA stands for `data`) and leaves no file."""
    here = {key: str(value).replace("DATA", str(data)) for key, value in settings.items()}
    errors = error_message(arguments(data, run, **here), capsys)
    assert message.replace("DATA", str(data)) in errors
    assert not [path for path in run.rglob("*") if path.is_file()]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_before_any_work(mistake, data, tmp_path, capsys):
    check_error(*MISTAKES[mistake], data, tmp_path, capsys)


WORLDS = {
    "tensor": (3, TP2, "world size 3 is not divisible by tensor 2 x pipeline 1"),
    "both": (6, TP2 | {"parallel__pipeline": 2}, "start a multiple of 4 processes"),
    "replicas": (3, {}, "rollout.prompts_per_step 8 is not divisible by the data-parallel size 3"),
}


@pytest.mark.parametrize("world", WORLDS)
def test_a_world_that_does_not_fit(world, data, tmp_path, capsys, monkeypatch):
    size, settings, message = WORLDS[world]
    monkeypatch.setenv("WORLD_SIZE", str(size))
    assert message in error_message(arguments(data, tmp_path, **settings), capsys)


def run_program(
    world_size: int, argv: list[str], ending: int | None = None
) -> list[tuple[int, str]]:
    """Starts the real program as torchrun does; returns (exit code, stderr) of each rank.

    ending: wait only for the first `ending` ranks, then kill the others.
    """
    shared = {
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "OMP_NUM_THREADS": 1,
    }
    processes = []
    try:
        for rank in range(world_size):
            own = shared | {"RANK": rank, "LOCAL_RANK": rank}
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "megatron_rpp.train", *argv],
                    cwd=ROOT,
                    env=os.environ | {name: str(value) for name, value in own.items()},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        first = processes[:ending]
        errors = [process.communicate(timeout=LIMIT)[1] for process in first]
        return [(process.returncode, text) for process, text in zip(first, errors)]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def only_error(results: list[tuple[int, str]], code: int) -> str:
    """Checks that all ranks ended with `code` and no traceback; returns their only message."""
    assert [exit_code for exit_code, _ in results] == [code] * len(results), results
    everything = "".join(text for _, text in results)
    assert "Traceback" not in everything, everything
    assert sum(line.startswith("error: ") for line in everything.splitlines()) == 1, everything
    return everything[everything.index("error: ") :]


def test_a_port_in_use_is_named(monkeypatch):
    """Without torchrun, rank 0 opens the port that the environment names. It is taken here."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        where = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in where.items():
            monkeypatch.setenv(name, str(value))
        message = f"cannot meet at 127.0.0.1:{port} .*EADDRINUSE.* choose another MASTER_PORT"
        with pytest.raises(exit_codes.RunFailure, match=message):
            groups.start(tensor=1, pipeline=1, seed=1)
    assert not dist.is_initialized()


def test_two_ranks_refuse_a_malformed_row(data, tmp_path):
    argv = arguments(data, tmp_path, data__train=data / "torn.jsonl")
    assert "torn.jsonl, line 2 is not JSON" in only_error(run_program(2, argv), 2)


def test_three_ranks_refuse_tensor_parallel_two(data, tmp_path):
    results = run_program(3, arguments(data, tmp_path, **TP2))
    assert "world size 3 is not divisible by tensor 2" in only_error(results, 2)


def test_two_ranks_refuse_a_checkpoint_of_another_shape(data, tmp_path):
    """This is found only after the ranks have joined."""
    train_run(data, tmp_path, train__steps=1)
    argv = arguments(data, tmp_path, model__hidden=48, **TP2)
    message = only_error(run_program(2, argv), 2)
    assert "iter_0000001 does not fit the model" in message and "linear_qkv" in message
    assert "Set the model section to the shape it was saved with" in message


def test_two_ranks_stop_if_a_reward_fails(data, tmp_path):
    """This is a failure (code 1), not an invalid configuration. The message shows the sample."""
    reward = tmp_path / "reward.py"
    reward.write_text("def score(prompts, *rest):\n    return [float('nan')] * len(prompts)\n")
    argv = arguments(data, tmp_path, **(VARIED | {"reward__functions": f"[{reward}:score]"}))
    message = only_error(run_program(2, argv), 1)
    assert "gave the score nan, not a finite number\nsample 0 of 8:\n  prompt:   'State" in message
