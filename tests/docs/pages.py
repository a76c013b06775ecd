"""The documents and their parts, for the tests of this folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

from megatron_rpp.config import Config

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
FOLDERS = ("launch/recipes", "launch/recipes/reproduction", "examples/*")
RECIPES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.yaml"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SUFFIXES = (
    ".py",
    ".sh",
    ".md",
    ".json",
    ".jsonl",
    ".safetensors",
    ".yaml",
    ".txt",
    ".csv",
    ".parquet",
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(line.lstrip("#")) for line in prose(page).splitlines() if line.startswith("#")}


def settings() -> tuple[set[str], set[str]]:
    """(names of all settings, those of them that are mappings with keys of the user's)."""
    names, mappings = set(), set()

    def walk(values: dict, prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{key}.")
            else:
                names.add(f"{prefix}{key}")
                mappings.update({f"{prefix}{key}"} if value == {} else ())

    walk(asdict(Config()), "")
    return names, mappings


NAMES, MAPPINGS = settings()
SECTIONS = {field.name for field in fields(Config)}


def is_setting(name: str) -> bool:
    """A setting, one of a mapping such as task.params.min_terms, or a section."""
    sections = {known.rpartition(".")[0] for known in NAMES}
    return name in NAMES or name in sections or name.rpartition(".")[0] in MAPPINGS


def is_ours(word: str) -> bool:
    """Whether a word is a path of the repository: its first part is a top-level entry."""
    first = Path(word).parts[:1]
    return bool(first) and first[0] not in (".venv", "runs", ".") and (ROOT / first[0]).exists()


class Command(NamedTuple):
    place: str
    words: list[str]


def commands(place: str, text: str) -> Iterator[Command]:
    """The commands of shell lines; a backslash at the end of a line continues it."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip():
            yield Command(f"{place}: {line.strip()}", shlex.split(line, comments=True))


def all_commands() -> list[Command]:
    """The commands of all pages, in blocks and in sentences, and of the heads of recipes."""
    found: list[Command] = []
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text()):
            if language == "bash":
                found += commands(name_of(page), block)
        for code in INLINE.findall(prose(page)):
            if re.match(r"(bash|python|pytest|torchrun) ", code):
                found += commands(name_of(page), code)
    for recipe in RECIPES:
        comments = [line for line in recipe.read_text().splitlines() if line.startswith("#   ")]
        found += commands(name_of(recipe), "\n".join(line[1:] for line in comments))
    return found


def documented(heading: str = "") -> set[str]:
    """The tags of the tables of metrics.md, or of the table below one heading."""
    text = (ROOT / "docs/metrics.md").read_text()
    if heading:
        text = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `([a-z]+/\w+)` \|", text, re.MULTILINE))
