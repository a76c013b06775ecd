"""Finding reward functions by name."""

from __future__ import annotations

import pytest

from megatron_rpp.rewards import load_reward
from megatron_rpp.rewards.builtin import exact_match, reasoning_gym

LENGTHS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Helper:
    factor: float

def length(prompts, responses, labels, metadata):
    return [Helper(2.0).factor * len(r) for r in responses]

number = 3
"""


def test_built_in_names():
    assert load_reward("exact_match") is exact_match
    assert load_reward("reasoning_gym") is reasoning_gym


def test_function_of_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(LENGTHS)
    function = load_reward(f"{tmp_path / 'mine.py'}:length")
    assert function(["p", "p"], ["", "abc"], [None, None], [{}, {}]) == [0.0, 6.0]


def test_relative_paths_and_equal_file_names(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "reward.py").write_text(f"def f(p, r, l, m): return ['{folder}']")
    monkeypatch.chdir(tmp_path)
    assert load_reward("a/reward.py:f")([], [], [], []) == ["a"]
    assert load_reward("b/reward.py:f")([], [], [], []) == ["b"]


def test_function_of_a_module(tmp_path, monkeypatch):
    (tmp_path / "some_package").mkdir()
    (tmp_path / "some_package" / "inner.py").write_text(LENGTHS)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward("some_package.inner:length")(["p"], ["ab"], [None], [{}]) == [4.0]


@pytest.mark.parametrize("name", ["exactmatch", "", ":", "mine.py", "mine.py:", ":f"])
def test_names_of_no_known_form(name):
    with pytest.raises(ValueError, match="unknown reward function.*exact_match.*package.module"):
        load_reward(name)


def test_missing_file_module_and_function(tmp_path):
    (tmp_path / "mine.py").write_text(LENGTHS)
    with pytest.raises(ValueError, match="no file .*absent.py"):
        load_reward(f"{tmp_path / 'absent.py'}:f")
    with pytest.raises(ValueError, match="ModuleNotFoundError: No module named 'no_such_module'"):
        load_reward("no_such_module.inner:f")
    with pytest.raises(ValueError, match=r"no 'height', only \['Helper', 'dataclass', 'length'\]"):
        load_reward(f"{tmp_path / 'mine.py'}:height")
    with pytest.raises(ValueError, match="number is a int, not a function"):
        load_reward(f"{tmp_path / 'mine.py'}:number")


@pytest.mark.parametrize(
    "code, problem",
    [("1 / 0", "ZeroDivisionError: division by zero"), ("def f(:", "SyntaxError: invalid syntax")],
)
def test_import_errors_are_reported_each_time(tmp_path, code, problem):
    (tmp_path / "broken.py").write_text(code)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"broken.py:f' cannot be imported .{problem}"):
            load_reward(f"{tmp_path / 'broken.py'}:f")
