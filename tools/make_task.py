"""Makes the data of a run: training and held-out prompts of a task, and a tokenizer for them.

    python tools/make_task.py --config launch/recipes/quickstart.yaml [--section.key value]

Writes data.train, data.eval and data.tokenizer, and next to data.train the settings they were made
with, as task.json. Files made with the same settings are left as they are; files made with other
settings are an error unless --overwrite is given. Left out: data from anywhere but reasoning-gym's
procedural tasks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.markup import escape

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an installation

from megatron_rpp.config import Config, DataConfig, cli
from megatron_rpp.data.chat import prompt_tokens
from megatron_rpp.data.tasks import Row, jsonl, make_task
from megatron_rpp.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_rpp.lifecycle.atomic_files import write_atomic
from megatron_rpp.lifecycle.config_error import ConfigError

console = Console(highlight=False)


def main(argv: list[str]) -> int:
    """Makes what is missing; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="make_task.py",
        description=__doc__.splitlines()[0],
        epilog="The settings are those of training, above all --config, --task.* and --data.*: "
        "python -m megatron_rpp.train --help lists them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that were made with other settings"
    )
    options, words = parser.parse_known_args(argv)
    config = cli.parse(words).config
    try:
        paths, settings_path = output_paths(config.data)
        settings = settings_of(config, settings_path.parent)
        if not options.overwrite and is_made(paths, settings_path, settings):
            for path in paths:
                console.print(f"unchanged, kept {escape(str(path))}", soft_wrap=True)
        else:
            contents = make(config)
            replace(paths, contents, settings_path=settings_path, settings=settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def output_paths(data: DataConfig) -> tuple[tuple[Path, ...], Path]:
    """The files (train, eval, tokenizer) to write, and the one that holds their settings.

    If data.tokenizer is a directory, that of a pretrained model, no tokenizer is made.
    """
    names = {"train": data.train, "eval": data.eval, "tokenizer": data.tokenizer}
    if Path(data.tokenizer).is_dir() and data.tokenizer:
        del names["tokenizer"]
    for key, value in names.items():
        if not value:
            raise ConfigError(f"data.{key} is empty: set it to the file to write")
        if not isinstance(value, str):
            raise ConfigError(f"data.{key} must be one file to write, got {value}")
    settings_path = Path(data.train).parent / "task.json"
    paths = tuple(Path(value) for value in names.values())
    if len({path.absolute() for path in (*paths, settings_path)}) != len(names) + 1:
        raise ConfigError(
            f"{', '.join(f'data.{key}' for key in names)} and {settings_path} must be different "
            f"files, got {names}"
        )
    return paths, settings_path


def settings_of(config: Config, folder: Path) -> dict[str, Any]:
    """All that the files depend on, as JSON; paths are relative to ``folder``, so it can be
    moved."""
    data = {key: getattr(config.data, key) for key in ("prompt_key", "label_key")}
    for key in ("train", "eval", "tokenizer"):
        data[key] = os.path.relpath(getattr(config.data, key), folder)
    return json.loads(json.dumps({"task": asdict(config.task), "data": data}))


def is_made(paths: Sequence[Path], settings_path: Path, settings: dict[str, Any]) -> bool:
    """Whether all files are there, made with ``settings``.

    Raises:
        ConfigError: there are files made with other or unknown settings.
    """
    present = [path for path in paths if path.exists()]
    found = read_settings(settings_path)
    if found == settings:
        return len(present) == len(paths)
    if present or found is not None:
        raise ConfigError(
            f"{settings_path.parent} holds data made with other settings "
            f"({difference(found, settings)}): choose other paths, or add --overwrite"
        )
    return False


def replace(
    paths: Sequence[Path],
    contents: Sequence[bytes],
    *,
    settings_path: Path,
    settings: dict[str, Any],
) -> None:
    """Writes the files and their settings over what is there.

    Removes the old files first, then writes the settings, then the new files. So after a kill at
    any point, every file was made with the settings next to it.
    """
    for path in paths:
        path.unlink(missing_ok=True)
    write_atomic(settings_path, (json.dumps(settings, indent=2) + "\n").encode())
    for path, content in zip(paths, contents, strict=True):
        write_atomic(path, content)
        console.print(f"wrote {escape(str(path))}", soft_wrap=True)


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings in a task.json: None if there is none, {} if it holds something else."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return found if isinstance(found, dict) and found.keys() == {"task", "data"} else {}


def difference(found: dict[str, Any] | None, wanted: dict[str, Any]) -> str:
    """The settings in which two task.json differ, in words."""
    if found is None:
        return "there is no task.json next to data.train"
    if not found:
        return "its task.json is not one of this tool"
    old, new = flat(found), flat(wanted)
    missing = "nothing"
    return ", ".join(
        f"{key} was {old.get(key, missing)!r} and is {new.get(key, missing)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, missing) != new.get(key, missing)
    )


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Two levels of settings as ``section.key``."""
    return {
        f"{name}.{key}": value
        for name, section in settings.items()
        for key, value in section.items()
    }


def make(config: Config) -> tuple[bytes, ...]:
    """Contents of the files (train, eval, tokenizer); prints what is in them."""
    task = config.task
    with console.status(f"drawing {task.train_size} + {task.eval_size} problems of {task.name}"):
        train, held_out = make_task(
            task.name,
            task.params,
            train_size=task.train_size,
            eval_size=task.eval_size,
            train_seed=task.train_seed,
            eval_seed=task.eval_seed,
        )
    for kind, rows in (("training", train), ("held-out", held_out)):
        different = len({row["prompt"] for row in rows})
        console.print(f"{len(rows)} {kind} prompts, {different} different")
    files = [jsonl(file_row(row, config.data) for row in rows) for rows in (train, held_out)]
    if len(output_paths(config.data)[0]) > len(files):
        with console.status("training the tokenizer"):
            files.append(make_tokenizer(train + held_out, task.vocab_size))
    return tuple(files)


def file_row(row: Row, data: DataConfig) -> Row:
    """The row under the field names that the trainer will look for."""
    return {
        data.prompt_key: row["prompt"],
        data.label_key: row["label"],
        "metadata": row["metadata"],
    }


def make_tokenizer(rows: list[Row], vocab_size: int) -> bytes:
    """A tokenizer for all rows, also the held-out ones: a character seen only there needs a piece.

    Raises:
        ConfigError: ``vocab_size`` is too small, or a text does not survive the tokenizer.
    """
    texts = [text for row in rows for text in (row["prompt"], row["label"]) if text]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        train_sentencepiece(texts, path, vocab_size)
        tokenizer, model = load_tokenizer(path), path.read_bytes()
    for text in texts:
        if tokenizer.decode(tokenizer.encode(text)) != text:
            raise ConfigError(
                f"no tokenizer keeps the task's text {text!r} (NUL, U+2581 and the names of "
                "special pieces, such as <s>, are lost): choose another task"
            )
    prompts = max(len(prompt_tokens(row["prompt"], tokenizer)) for row in rows)
    labels = max(len(tokenizer.encode(row["label"] or "")) for row in rows)
    console.print(
        f"{tokenizer.vocab_size} pieces; the longest prompt has {prompts} tokens, the longest "
        f"answer {labels}"
    )
    return model


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
