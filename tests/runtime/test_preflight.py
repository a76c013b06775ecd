"""Preflight on two real ranks: its checks, and that a failed check is an error on every rank."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch.distributed as dist

from megatron_rpp.config import Config
from megatron_rpp.lifecycle import entrypoint
from megatron_rpp.parallel import groups
from megatron_rpp.reporting.console import Console
from megatron_rpp.runtime import preflight, shared_directory, startup
from megatron_rpp.runtime.inputs import check_writable
from tests.distributed import run_ranks
from tests.small_run import arguments, config_of, make_data
from tools import preflight as tool

HUGE = {"model__layers": 96, "model__hidden": 16384, "model__ffn_hidden": 65536}


def outcome(config: Config) -> tuple[str, str]:
    """Runs preflight; returns this rank's output and the error, or ""."""
    printed, error_text = io.StringIO(), ""
    groups.start(**config.parallel.sizes(), seed=1)
    with contextlib.redirect_stdout(printed):
        try:
            preflight.run(config, 100, Console(groups.is_main()))
        except ValueError as error:
            error_text = str(error)
    groups.destroy()
    return printed.getvalue(), error_text


def outcomes(rank, folder):
    """Outcomes of a good run, of one too large, of one whose ranks see different directories, and of one
    without vLLM."""
    good = config_of(folder, folder / "good", parallel__tensor=2)
    apart = config_of(folder, folder / f"apart{rank}")
    for config in (good, apart):
        check_writable("checkpoint.dir", config.checkpoint.dir)
        check_writable("logging.dir", config.logging.dir)
    dist.barrier()
    shared_directory.VISIBLE_SECONDS = 1  # what is on no shared directory is not seen later either
    best_too = replace(good.checkpoint, keep_best=True)
    too_large = replace(good, model=huge(folder), checkpoint=best_too)
    vllm = config_of(
        folder, folder / "good", parallel__tensor=2, rollout__engine="vllm",
        rollout__vllm__python="/no/such/python", rollout__vllm__dir=folder,
    )  # fmt: skip
    return [outcome(good), outcome(too_large), outcome(apart), outcome(vllm)]


def huge(folder):
    return config_of(folder, folder / "good", **HUGE).model


def test_two_ranks(tmp_path):
    first, second = run_ranks(outcomes, 2, tmp_path, tmp_path)
    (table, error_text), (_, too_large), (_, unshared), (_, no_vllm) = first
    assert error_text == "" and "all 9 checks passed" in table
    assert "tensor 2 × pipeline 1 × context 1 × data 1" in table and "2 rank(s) on 1 host" in table
    assert "over 2 ranks: " in table and "B/s" in table and "FAILED" not in table
    assert "2 of 9 checks failed: memory: " in too_large
    assert "disk: 3 + 1 checkpoints of" in too_large
    assert "lower train.max_tokens_per_microbatch" in too_large
    assert "2 of 9 checks failed: shared directory: " in unshared
    assert "is not one directory on all nodes" in unshared
    assert "1 of 10 checks failed: rollout engine: " in no_vllm
    assert "rollout.vllm.python /no/such/python cannot be started" in no_vllm
    # The other rank is silent and ends alike.
    assert [text for text, _ in second] == [""] * 4
    assert [error_text for _, error_text in second] == ["", too_large, unshared, no_vllm]


@pytest.mark.parametrize(("settings", "code"), [({}, None), (HUGE, 2)], ids=["ready", "too large"])
def test_the_tool(settings, code, tmp_path, monkeypatch, capsys):
    make_data(tmp_path)
    argv = arguments(tmp_path, tmp_path / "run", **settings)
    monkeypatch.setattr(sys, "argv", ["preflight.py", *argv])
    monkeypatch.setattr(entrypoint, "_leave", sys.exit)  # else it ends the test's process
    ended = None
    try:
        entrypoint.run(partial(tool.main, startup.for_training()))
    except SystemExit as exit_:
        ended = exit_.code
        groups.stop()
    assert ended == code
    output, errors = capsys.readouterr()
    assert "preflight" in output and ("memory" in errors) == (code == 2)
