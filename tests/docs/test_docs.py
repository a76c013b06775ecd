"""Checks of the documents: links resolve, settings and files in the text exist, every metric is
described, and the examples run. test_commands.py checks the commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_rpp.config import cli
from megatron_rpp.data.examples import open_examples
from tests.docs.pages import (
    FENCE,
    INLINE,
    LINK,
    PAGES,
    ROOT,
    SECTIONS,
    SUFFIXES,
    anchors,
    commands,
    documented,
    is_ours,
    is_setting,
    name_of,
    prose,
)
from tests.test_rooms import FLOORS

FIELD_OF_VERL = "reward_model.ground_truth"
"""A field of rows in verl's layout, and no setting."""
ONLY_WHERE = {"throughput/mfu", "reward/NAME", "time/values", "time/critic"}
"""Tags that a run has on a GPU, with several reward functions, or with a critic."""


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    for target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} leads to nothing"
        assert not anchor or anchor in anchors(linked), f"{target}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_are_in_the_files_that_are_named_with_them(page):
    for name, target in re.findall(r"`(\w+)`\s+(?:in|of)\s+\[[^\]]*\]\(([^)#]+)\)", prose(page)):
        linked = page.parent / target
        if linked.suffix == ".py":
            assert re.search(rf"\b{name}\b", linked.read_text()), f"{target} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_in_the_text_exist(page):
    for code in INLINE.findall(prose(page)):
        for word in code.split():
            if "/" in word and is_ours(word):
                assert (ROOT / word.partition(":")[0]).exists(), f"there is no {word}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_in_the_text_exist(page):
    for code in INLINE.findall(prose(page)):
        for word in code.split():
            name = word.removeprefix("--").partition("=")[0]
            section, dot, key = name.partition(".")
            if name == FIELD_OF_VERL:
                continue
            if dot and section in SECTIONS and key != "*" and not name.endswith(SUFFIXES):
                assert is_setting(name), f"there is no setting {name}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 110


def test_every_section_is_described():
    table = (ROOT / "docs/training.md").read_text().partition("## Settings by section")[2]
    assert {row for row in re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)} >= SECTIONS


def test_every_page_of_docs_is_linked_from_the_readme():
    linked = LINK.findall((ROOT / "README.md").read_text())
    assert {name_of(page) for page in ROOT.glob("docs/*.md")} <= set(linked)


def test_the_floors_of_the_packages_are_described():
    text = (ROOT / "docs/architecture.md").read_text()
    floors: list[set[str]] = [set() for _ in FLOORS]
    for number, rooms in re.findall(r"^\| (\d+) \| (.+?) \|", text, re.MULTILINE):
        floors[int(number) - 1].update(re.findall(r"`(\w+)[./]", rooms))
    assert floors == [set(rooms) for rooms in FLOORS]


def test_every_tag_in_the_code_is_described():
    families = "|".join(sorted({tag.partition("/")[0] for tag in documented()}))
    literal = re.compile(rf"""["']((?:{families})/[a-z_0-9]+)["']""")
    code = "".join(path.read_text() for path in ROOT.glob("megatron_rpp/**/*.py"))
    assert set(literal.findall(code)) <= documented()


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("examples/*/*.yaml")), ids=name_of)
def test_recipes_of_the_examples_are_valid(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = cli.parse(["--config", str(recipe)]).config
    functions = [name.partition(":")[0] for name in config.reward.functions if ":" in name]
    for path in (*config.data.sources, config.data.tokenizer, *functions):
        assert Path(path).exists()


def test_the_conversations_load():
    examples = open_examples(str(ROOT / "examples/chat/conversations.jsonl"), "messages", "label")
    assert len(examples) == 12
    third = examples[2]
    assert third.prompt == "And the next one?" and third.label == "The next prime is 13."
    assert [message["role"] for message in third.messages] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert examples[8].prompt == "What gas do plants take in?"  # a list of text parts


def test_the_reward_of_the_example():
    from examples.own_reward.reward import score

    responses = ["110", " 12\n", "1a2b", "", "1" * 5000]
    count = len(responses)
    scores = score([""] * count, responses, ["100"] * count, [{"tolerance": 0.1}] * count)
    assert scores == [1.0, 0.5, 0.2, 0.0, 0.5]


def run_example(folder: str, out: Path, *more: str) -> list[dict]:
    """Runs the first command of an example's page; returns the rows of metrics.jsonl in `out`."""
    blocks = FENCE.findall((ROOT / "examples" / folder / "README.md").read_text())
    (command,) = commands(folder, blocks[0][1])
    done = subprocess.run(
        [*command.words, *more], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_example_of_a_reward_runs_and_its_tags_are_described(tmp_path):
    rows = run_example(
        "own_reward",
        tmp_path,
        f"--checkpoint.dir={tmp_path}/checkpoints",
        f"--logging.dir={tmp_path}",
    )
    assert [row["step"] for row in rows] == [1, 2]
    others = ONLY_WHERE.union(
        *map(documented, ("Supervised fine-tuning", "Reward models", "TensorBoard only", "Critic"))
    )
    assert set().union(*rows) - {"step"} == documented() - others


@pytest.mark.slow
def test_the_example_of_conversations_runs_and_its_tags_are_described(tmp_path):
    rows = run_example("chat", tmp_path, f"--sft.dir={tmp_path}")
    assert len(rows) == 20 and rows[-1]["sft/loss"] < rows[0]["sft/loss"]
    others = {"time/step", "time/checkpoint", "eval/accuracy", "eval/reward"}
    assert set().union(*rows) - {"step"} == documented("Supervised fine-tuning") | others


@pytest.mark.slow
def test_the_example_of_preferences_runs_and_its_tags_are_described(tmp_path):
    rows = run_example("preferences", tmp_path, f"--reward_model.dir={tmp_path}")
    assert len(rows) == 20 and rows[-1]["rm/loss"] < 0.5 * rows[0]["rm/loss"]
    others = {"time/step", "time/checkpoint", "eval/accuracy"}
    expected = documented("Reward models") - {"eval/correlation"}  # of rows with scores
    assert set().union(*rows) - {"step"} == expected | others
