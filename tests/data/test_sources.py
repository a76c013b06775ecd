"""An existing path is used literally, never as a pattern, a split or an address."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_rpp.config import cli
from megatron_rpp.data.sources import open_rows

NAMES = ["train@v2", "[math] a", "part[1]", "all*", "b c", "what?", "a#b", "50%20", "{x}", "ü"]
DECOYS = ["part1", "all-old", "m a", "whatX"]
"""Names that a pattern among NAMES would match."""


def write(path: Path, prompts: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    rows = [{"prompt": prompt, "label": "x"} for prompt in prompts]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        path.write_text("prompt,label\n" + "".join(f"{prompt},x\n" for prompt in prompts))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prompts_of(source: str | Path, cache: Path) -> list[str]:
    rows = open_rows(str(source), str(cache))
    return [rows[index]["prompt"] for index in range(len(rows))]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_a_file_is_read_whatever_its_name_is(tmp_path, suffix):
    for name in DECOYS:
        write(tmp_path / f"{name}{suffix}", ["another file"] * 3)
    for name in NAMES:
        write(tmp_path / f"{name}{suffix}", [name, "second"])
    for name in NAMES:
        assert prompts_of(tmp_path / f"{name}{suffix}", tmp_path / "cache") == [name, "second"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_directory_is_read_whatever_its_name_is(tmp_path, suffix):
    for name in DECOYS:
        write(tmp_path / name / f"train{suffix}", ["another file"])
    for name in NAMES:
        write(tmp_path / name / f"train-0{suffix}", [name])
        write(tmp_path / name / f"test-0{suffix}", [f"{name} held out"])
    for name in NAMES:
        assert prompts_of(tmp_path / name, tmp_path / "cache") == [name]
        assert prompts_of(f"{tmp_path / name}@test", tmp_path / "cache") == [f"{name} held out"]


def test_several_files_of_a_split_are_one_source(tmp_path):
    for number in range(3):
        write(tmp_path / "d" / f"train-{number}.jsonl", [f"{number}a", f"{number}b"])
    assert prompts_of(tmp_path / "d", tmp_path / "cache") == ["0a", "0b", "1a", "1b", "2a", "2b"]
    rows = open_rows(str(tmp_path / "d"), str(tmp_path / "cache"))
    assert rows.where(3) == f"{tmp_path}/d/train-1.jsonl, line 2"


def test_a_relative_path_is_shown_as_an_absolute_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("a.jsonl"), ["one"])
    assert open_rows("a.jsonl").where(0) == f"{tmp_path}/a.jsonl, line 1"
    for name in ("gone.jsonl", "gone.parquet", "gone@test", "all*.jsonl"):
        with pytest.raises(ValueError, match="is not a file: correct the path") as error:
            open_rows(name)
        assert str(tmp_path / name) in str(error.value)


def test_a_suffix_may_be_in_capitals(tmp_path):
    write(tmp_path / "a.parquet", ["one"])
    (tmp_path / "a.parquet").rename(tmp_path / "B.PARQUET")
    assert prompts_of(tmp_path / "B.PARQUET", tmp_path / "cache") == ["one"]


def test_a_directory_of_several_formats_is_an_error(tmp_path):
    """The library would read the files of one format and silently ignore the others."""
    for name in ("train-0.jsonl", "train-1.parquet"):
        write(tmp_path / "d" / name, ["one"])
    with pytest.raises(ValueError, match=r"/d holds files of the formats .jsonl, .parquet: name"):
        open_rows(str(tmp_path / "d"), str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("prompt,label\np,1,2,3\nq,1\n", "Length of header or names does not match"),
        ("prompt,label\np,1\nq,1,2,3\n", "Expected 2 fields in line 3, saw 4"),
        ("prompt,label,label\np,1,2\n", "names a column twice in ['prompt', 'label', 'label']"),
        ('prompt,label\n"p,1\n', "EOF inside string"),
        ("", "No columns to parse from file"),
        ("prompt,label\ncaf\udce9,1\n", "'utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_csv_rows_that_do_not_fit_the_header_are_errors(tmp_path, content, problem):
    (tmp_path / "a.csv").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as error:
        open_rows(str(tmp_path / "a.csv"), str(tmp_path / "cache"))
    assert str(tmp_path / "a.csv") in str(error.value) and problem in str(error.value)


@pytest.mark.parametrize("name", ["", "a" * 5000, "nul\0.jsonl", "file:///a.jsonl"])
def test_invalid_paths_are_errors(name):
    with pytest.raises(ValueError, match="correct"):
        open_rows(name)


def test_a_dangling_link_is_an_error(tmp_path):
    for suffix in (".jsonl", ".parquet"):
        os.symlink(tmp_path / "gone", tmp_path / f"link{suffix}")
        with pytest.raises(ValueError, match=f"link{suffix} is not a file: correct the path"):
            open_rows(str(tmp_path / f"link{suffix}"))


def test_a_name_like_a_list_is_a_name_where_the_file_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("[a, b]"), ["one"])
    assert cli.parse(["--data.train", "[a, b]"]).config.data.sources == ["[a, b]"]
    assert cli.parse(["--data.train", "[a, c]"]).config.data.sources == ["a", "c"]


def test_copies_go_elsewhere_if_the_cache_cannot_be_used(tmp_path, monkeypatch):
    import datasets

    write(tmp_path / "a.parquet", ["one"])
    load = datasets.load_dataset

    def of_another_user(*arguments, cache_dir, **settings):
        if cache_dir == str(tmp_path / "theirs"):
            raise PermissionError(13, "Permission denied", cache_dir)
        return load(*arguments, cache_dir=cache_dir, **settings)

    monkeypatch.setattr(datasets, "load_dataset", of_another_user)  # root may write anywhere
    said: list[str] = []
    rows = open_rows(str(tmp_path / "a.parquet"), str(tmp_path / "theirs"), said.append)
    assert rows[0]["prompt"] == "one"
    assert said == [
        f"the cache {tmp_path}/theirs cannot be used (Permission denied): data set "
        f"{tmp_path}/a.parquet is copied to a temporary directory; set data.cache_dir to a "
        "directory of yours"
    ]
