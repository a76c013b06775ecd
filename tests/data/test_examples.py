"""Rows of every source and layout become examples; faulty ones name their place."""

from __future__ import annotations

import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from megatron_rpp.data.examples import Example, open_examples


def read_examples(source, prompt_key: str, label_key: str, cache=None) -> list[Example]:
    return list(open_examples(str(source), prompt_key, label_key, cache_dir=cache))


def write(tmp_path, *lines: str):
    path = tmp_path / "rows.jsonl"
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return path


def test_rows_come_back_in_order_with_labels_as_text(tmp_path):
    path = write(
        tmp_path,
        '{"prompt": "1+1=", "label": "2", "metadata": {"level": 1}, "other": []}',
        '{"prompt": "1+2=", "label": 3}',
        '{"prompt": "1/2=", "label": 0.5, "metadata": {}}',
        '{"prompt": "write a poem", "label": null}',
        '{"prompt": "separator\u2028inside, \u00e9"}',
    )
    assert read_examples(path, "prompt", "label") == [
        Example("1+1=", "2", {"level": 1}),
        Example("1+2=", "3", {}),
        Example("1/2=", "0.5", {}),
        Example("write a poem", None, {}),
        Example("separator\u2028inside, \u00e9", None, {}),
    ]


def test_keys_are_the_users_and_a_missing_last_newline_is_fine(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}')
    assert read_examples(path, "question", "answer") == [Example("a", "b", {})]


@pytest.mark.parametrize(
    "line, problem",
    [
        ('{"prompt": "a"', "is not JSON"),
        ("", "is not JSON"),
        ("[1, 2]", "is a list"),
        ("null", "is null"),
        ('{"question": "a"}', r"no field 'prompt', only \['question'\]: set data.prompt_key"),
        ('{"prompt": ""}', "non-empty string"),
        ('{"prompt": " \\n"}', "non-empty string"),
        ('{"prompt": 7}', "'prompt' is 7"),
        ('{"prompt": []}', r"'prompt' is \[\], it must be a non-empty string or a list of messa"),
        ('{"prompt": [{"content": "a"}]}', "message 0 is .* must be an object with the fields"),
        ('{"prompt": "a", "label": true}', "'label' is true or false"),
        ('{"prompt": "a", "label": ["b"]}', "'label' is a list"),
        ('{"prompt": "a", "metadata": "b"}', "'metadata' is a string"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, line, problem):
    path = write(tmp_path, '{"prompt": "fine"}', line, '{"prompt": "fine"}')
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2.*{problem}"):
        read_examples(path, "prompt", "label")


def test_bytes_that_are_not_utf8_name_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1 is not JSON"):
        read_examples(path, "prompt", "label")


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match="absent.jsonl is not a file"):
        read_examples(tmp_path / "absent.jsonl", "prompt", "label")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty.jsonl is empty"):
        read_examples(tmp_path / "empty.jsonl", "prompt", "label")


VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "2 + 2?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"split": "train", "index": 3},
}


def same_rows(tmp_path) -> dict[str, str]:
    """The rows of VERL in every kind of source, by name."""
    rows = [VERL | {"extra_info": {"split": "train", "index": i}} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "folder").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "folder" / "test-0.parquet")
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset(table)
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": saved}).save_to_disk(tmp_path / "splits")
    sources = ("a.jsonl", "a.parquet", "folder@test", "saved", "splits@test")
    return {name: str(tmp_path / name) for name in sources}


def test_every_kind_of_source_gives_the_same_examples(tmp_path):
    for name, source in same_rows(tmp_path).items():
        examples = read_examples(source, "prompt", "reward_model.ground_truth", tmp_path / "cache")
        assert len(examples) == 3, name
        assert examples[2] == Example(
            "2 + 2?",
            "4",
            {key: VERL[key] for key in ("data_source", "ability", "reward_model")}
            | {"extra_info": {"split": "train", "index": 2}},
            tuple(VERL["prompt"]),
        ), name


def test_sources_that_cannot_be_opened_are_errors(tmp_path):
    same_rows(tmp_path)
    with pytest.raises(ValueError, match=r"splits has the splits \['test'\]: add '@' and one"):
        open_examples(str(tmp_path / "splits"), "prompt", "label")
    with pytest.raises(ValueError, match="folder@absent cannot be opened .*: correct the name"):
        open_examples(f"{tmp_path}/folder@absent", "prompt", "label", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="gone.parquet is not a file: correct the path"):
        open_examples(str(tmp_path / "gone.parquet"), "prompt", "label")
    (tmp_path / "bad.parquet").write_text("not Parquet")
    with pytest.raises(ValueError, match="bad.parquet cannot be opened"):
        open_examples(
            str(tmp_path / "bad.parquet"), "prompt", "label", cache_dir=tmp_path / "cache"
        )
    with pytest.raises(ValueError, match="a.parquet, row 1 has no field 'question'"):
        read_examples(tmp_path / "a.parquet", "question", "label", tmp_path / "cache")


def test_openrlhfs_layouts(tmp_path):
    messages = [{"role": "user", "content": "2 + 2?"}]
    path = write(
        tmp_path,
        json.dumps({"input": "2 + 2?", "label": "4", "datasource": "x"}),
        json.dumps({"context_messages": messages, "dataset": "y"}),
    )
    examples = open_examples(str(path), "input", "label")
    assert examples[0] == Example("2 + 2?", "4", {"datasource": "x"})
    examples = open_examples(str(path), "context_messages", "label")
    assert examples[1] == Example("2 + 2?", None, {"dataset": "y"}, tuple(messages))


def test_a_key_with_a_dot_and_a_path_of_keys(tmp_path):
    row = {"a.b": "dotted", "c": {"d": {"e": 5}}, "f": "text"}
    path = str(write(tmp_path, json.dumps(row)))
    assert read_examples(path, "a.b", "c.d.e")[0].label == "5"
    assert read_examples(path, "a.b", "f.g")[0].label is None
    with pytest.raises(ValueError, match="no field 'c.x'"):
        read_examples(path, "c.x", "label")


MEMORY = """
import resource, sys
from megatron_rpp.data.chat import PromptFormat
from megatron_rpp.data.examples import open_examples
from megatron_rpp.data.prompts import fitting_rows
from tests.data.code_points import CodePoints

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

before = peak()
examples = open_examples(sys.argv[1], "prompt", "label")
rows = fitting_rows(examples, PromptFormat(CodePoints(2)), limit=20, drop=False).rows
print(len(rows), len(examples[len(examples) - 1].metadata["text"]), peak() - before)
"""


def test_memory_stays_flat_over_a_large_file(tmp_path):
    """Reads 80 MB line by line in less than 20 MB of memory, which 2,000 of the rows would
    exceed."""
    row = json.dumps({"prompt": "What?", "text": "x" * 10_000}) + "\n"
    with open(tmp_path / "large.jsonl", "w") as file:
        for _ in range(8):
            file.write(row * 1000)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "large.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, length, megabytes = map(int, done.stdout.split())
    assert (count, length) == (8_000, 10_000)
    assert megabytes < 20
