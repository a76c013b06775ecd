"""The settings of rollout.engine vllm: what is refused before anything runs."""

from __future__ import annotations

import pytest

from megatron_rpp.config import cli
from megatron_rpp.lifecycle.config_error import ConfigError

PYTHON = ["--rollout.vllm.python=python"]
URLS = ["--rollout.vllm.urls=[http://a:8000, http://b:8000]"]


def parse(*words: str):
    return cli.parse(["--rollout.engine=vllm", *words]).config.rollout.vllm


def test_servers_of_the_run_or_those_that_are_there():
    assert parse(*PYTHON).urls == []
    assert parse(*URLS).urls == ["http://a:8000", "http://b:8000"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs rollout.vllm.python or rollout.vllm.urls, and not both: got None and []"),
        ([*PYTHON, *URLS], "and not both: got python and"),
        ([*URLS, "--rollout.vllm.transport=nccl"], "transport must be shared with"),
        ([*URLS, "--rollout.vllm.replicas=2"], "rollout.vllm.replicas must be null with"),
        ([*PYTHON, "--rollout.vllm.tensor=3"], "must be divisible by rollout.vllm.tensor = 3"),
        ([*PYTHON, "--rollout.vllm.memory_share=1"], "rollout.vllm.memory_share must be above 0"),
        ([*PYTHON, "--rollout.vllm.transport=mpi"], "one of shared, nccl, ipc, got mpi"),
        (["--rollout.vllm.urls=[a:8000]"], "urls must each be http://host:port, got 'a:8000'"),
        (["--rollout.vllm.urls=[https://a:1]"], "must each be http://host:port"),
        (["--rollout.vllm.urls=[http://me:secret@a:1]"], "must each be http://host:port"),
        (["--rollout.vllm.urls=[http://a:1/?x=1]"], "must each be http://host:port"),
        (["--rollout.vllm.urls=[http://a:port]"], "must each be http://host:port"),
        (["--rollout.vllm.urls=[http://a:1, http://A:1/]"], "urls must differ from each other"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


AHEAD = ["--rollout.ahead=1", *PYTHON]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (AHEAD, "rollout.ahead 1 needs a correction for samples of older weights"),
        ([*AHEAD, "--rollout.vllm.transport=ipc"], "needs servers on other devices than the train"),
        ([*AHEAD, "--rollout.engine=megatron"], "needs rollout.engine vllm, got megatron"),
        ([*AHEAD, "--rollout.ahead=2"], "rollout.ahead must be at least 0 and at most 1, got 2"),
        ([*AHEAD, "--rollout.ahead=-1"], "rollout.ahead must be at least 0 and at most 1, got -1"),
    ],
)
def test_ahead_is_refused_where_it_makes_no_sense(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--algorithm.rollout_correction=cap"],
        ["--algorithm.rollout_correction=mask", "--rollout.vllm.transport=nccl"],
        ["--algorithm.old_logprobs=rollout"],
    ],
)
def test_ahead_with_a_correction(words):
    config = cli.parse(["--rollout.engine=vllm", *AHEAD, *words]).config
    assert config.rollout.ahead == 1


def test_without_the_engine_its_settings_are_free():
    assert cli.parse(PYTHON + URLS).config.rollout.engine == "megatron"


def test_an_engine_that_does_not_exist_is_refused():
    from megatron_rpp.config import RolloutConfig

    with pytest.raises(ConfigError, match="rollout.engine must be one of megatron, vllm"):
        RolloutConfig(engine="sglang")
