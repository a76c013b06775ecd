"""Checks of the commands in documents and recipes: the files and settings that they name exist, and a
run that they start is accepted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_rpp.config import check_world_size, cli, count_replicas
from megatron_rpp.config.yaml_files import read_yaml
from tests.config.published import PUBLISHED
from tests.docs.pages import ROOT, all_commands, is_ours, is_setting

QUICKSTART = "launch/recipes/quickstart.yaml"
A_MODEL = PUBLISHED["llama3.1-8b-general"][0]
"""The config.json that stands for a directory such as MODEL_DIR."""


class Launch(NamedTuple):
    """A run that a command starts."""

    place: str
    program: str
    settings: list[str]
    processes: int | None
    """None if the command does not say how many."""


def all_launches() -> Iterator[Launch]:
    """The runs of all commands, and the tools that take a recipe; not those whose recipe is a
    placeholder such as RECIPE or my_recipe.yaml."""
    for place, words in all_commands():
        programs = [word for word in words if word in ("train", "sft", "reward_model")]
        options = dict(zip(words, words[1:]))
        environment = dict(word.split("=", 1) for word in words if re.match("[A-Z_]+=", word))
        if "launch/quickstart.sh" in words:
            more = words[words.index("launch/quickstart.sh") + 1 :]
            processes = int(environment.get("NPROC", 2))
            yield Launch(place, "train", ["--config", QUICKSTART, *more], processes)
        elif "--config" in words and not (ROOT / options["--config"]).exists():
            continue
        elif programs:
            nodes = options.get("--nnodes", options.get("--nodes", "1"))
            ranks = options.get("--nproc-per-node", options.get("--gpus-per-node", "0"))
            settings = words[words.index(programs[0]) + 1 :]
            yield Launch(place, programs[0], settings, int(nodes) * int(ranks) or None)
        elif "--config" in words:
            yield Launch(place, "train", words[words.index("--config") :], None)


@pytest.mark.parametrize("command", all_commands(), ids=lambda command: command.place)
def test_commands_name_files_and_settings_that_exist(command):
    words = [word for word in command.words if not re.match(r"[A-Z_]+=", word)]
    if words[0] in ("bash", "python", "sbatch"):
        scripts = [word for word in words if word.endswith((".sh", ".sbatch", ".py", "/run"))]
        assert scripts and (ROOT / scripts[0]).exists(), f"there is no {scripts[:1]}"
    for word in words:
        if word.startswith("--") and "." in word:
            name = word.removeprefix("--").partition("=")[0]
            assert is_setting(name), f"there is no setting {name}"
        elif is_ours(word):
            assert (ROOT / word.partition(":")[0]).exists(), f"there is no {word}"


@pytest.mark.parametrize("launch", all_launches(), ids=lambda launch: launch.place)
def test_runs_are_accepted(launch, tmp_path, monkeypatch):
    """The settings and the number of processes. A model that is not here has a config.json only."""
    monkeypatch.chdir(ROOT)
    settings = dict(zip(launch.settings, launch.settings[1:]))
    recipe = Path(settings.get("--config", ""))
    model = read_yaml(str(recipe)).get("model", {}) if recipe.is_file() else {}
    words = list(launch.settings)
    path = settings.get("--model.hf_path", model.get("hf_path"))
    if path is not None and not Path(path).exists():
        published = PUBLISHED[recipe.stem][0] if recipe.stem in PUBLISHED else A_MODEL
        (tmp_path / "config.json").write_text(json.dumps(published))
        words.append(f"--model.hf_path={tmp_path}")
    config = cli.parse(words, launch.program).config
    if launch.processes is not None and launch.program == "train":
        check_world_size(config, launch.processes)
    elif launch.processes is not None:
        count_replicas(config.parallel, launch.processes)
    if settings.keys() & {"--data.train", "--reward.functions"}:
        own = {
            "sft": {"--sft.dir"},
            "reward_model": {"--reward_model.dir"},
            "train": {"--checkpoint.dir", "--logging.dir"},
        }
        assert own[launch.program] <= settings.keys(), "another run needs its own directories"
