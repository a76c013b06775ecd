"""The packages: imports go one way, without circles, and only a few packages import Megatron."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_rpp"
FLOORS = (
    ("lifecycle", "records", "seeds", "algorithms"),
    ("hf", "parallel", "launcher"),
    ("config", "torchrun"),
    ("data", "model"),
    ("rewards", "checkpoint"),
    ("conversion", "rollout"),
    ("stages",),
    ("reporting",),
    ("runtime",),
    ("train", "sft", "reward_model"),
)
"""From the ground up: a room imports rooms of lower floors only."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
KNOW_MEGATRON = {"parallel", "model", "checkpoint"}


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, except those for type checking alone."""
    tree = ast.parse(path.read_text())
    unused = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in unused:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__"
)


@pytest.mark.parametrize("room", FLOOR)
def test_a_room_imports_lower_floors_only(room):
    for path in (path for path in FILES if room_of(path) == room):
        for name in imports(path):
            package, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if package == "megatron_rpp" and other in FLOOR and other != room:
                assert FLOOR[other] < FLOOR[room], f"{path} imports {name}"


def test_every_file_is_in_a_room_that_is_named_here():
    assert {room_of(path) for path in FILES} == set(FLOOR)


def test_few_rooms_know_megatron():
    knowing = {
        room_of(path)
        for path in FILES
        for name in imports(path)
        if name.split(".")[0] == "megatron"
    }
    assert knowing == KNOW_MEGATRON


def test_the_tools_import_each_other_in_no_circle():
    tools = PACKAGE.parent / "tools"
    names = {
        path.relative_to(tools).with_suffix("").as_posix().replace("/", ".")
        for path in tools.rglob("*.py")
    }
    edges = {
        name: {
            other
            for module in imports(tools / f"{name.replace('.', '/')}.py")
            for other in [module.removeprefix("tools.")]
            if other in names and other != name
        }
        for name in names
    }
    while edges:
        leaves = {name for name, others in edges.items() if not others & edges.keys()}
        assert leaves, f"a circle among {sorted(edges)}"
        edges = {name: others for name, others in edges.items() if name not in leaves}


def test_no_file_of_the_package_has_more_than_300_lines():
    long = {str(path): len(path.read_text().splitlines()) for path in FILES}
    assert not {path: lines for path, lines in long.items() if lines > 300}
