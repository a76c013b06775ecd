"""Optional packages: if one is missing, the message names the extra that installs it."""

from __future__ import annotations

import sys

import pytest

from megatron_rpp.data.sources import open_rows
from megatron_rpp.data.tasks import make_task
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.lifecycle.extras import EXTRAS, require_extra
from megatron_rpp.rewards import RewardSet
from tools.plot import draw


def message_without(monkeypatch, module, use) -> str:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ConfigError) as error:
        use()
    return str(error.value)


def test_installed_packages_pass():
    for extra in EXTRAS:
        require_extra(extra, "this test")


def test_math_verify_names_its_extra(monkeypatch):
    assert message_without(monkeypatch, "math_verify", lambda: RewardSet(["math_verify"])) == (
        "reward function 'math_verify' needs the package math_verify, which is not installed: "
        "install it with pip install -e '.[math]' in the repository"
    )


def test_reasoning_gym_names_its_extra(monkeypatch):
    text = "needs the package reasoning_gym, which is not installed: install it with "
    text += "pip install -e '.[tasks]' in the repository"
    found = message_without(monkeypatch, "reasoning_gym", lambda: RewardSet(["reasoning_gym"]))
    assert found == f"reward function 'reasoning_gym' {text}"
    use = lambda: make_task("chain_sum", {}, train_size=2, eval_size=2, train_seed=1, eval_seed=2)  # noqa: E731
    assert message_without(monkeypatch, "reasoning_gym", use) == f"task 'chain_sum' {text}"


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "folder"])
def test_tables_name_their_extra(monkeypatch, tmp_path, name):
    path = tmp_path / name
    path.touch() if path.suffix else path.mkdir()
    found = message_without(monkeypatch, "datasets", lambda: open_rows(str(path)))
    assert found == (
        f"data set {path} needs the package datasets, which is not installed: install it with "
        "pip install -e '.[data]' in the repository"
    )


def test_json_lines_need_no_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.jsonl").write_text('{"prompt": "1 + 1"}\n')
    assert open_rows(str(tmp_path / "a.jsonl"))[0] == {"prompt": "1 + 1"}


def test_plots_name_their_extra(monkeypatch, tmp_path):
    found = message_without(monkeypatch, "matplotlib", lambda: draw([], tmp_path / "curves.png"))
    assert found == (
        "tools/plot.py needs the package matplotlib, which is not installed: install it with "
        "pip install -e '.[plot]' in the repository"
    )
