"""A label is the text in the file, even if a library would convert its type."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pandas
import pyarrow
import pyarrow.parquet
import pytest

from megatron_rpp.data.examples import Example, open_examples


def labels(path: Path, key: str = "label") -> list[str | None]:
    examples = open_examples(str(path), "prompt", key, cache_dir=str(path.parent / "cache"))
    return [example.label for example in examples]


NUMBERS = ["5", "5.0", "1.50", "-0", "1e3", "1E+2", "0.1", "1e999", "NaN", "-Infinity", "7" * 400]


def test_json_numbers_keep_their_text(tmp_path):
    lines = [f'{{"prompt": "p", "label": {number}}}\n' for number in NUMBERS]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    assert labels(tmp_path / "a.jsonl") == NUMBERS
    nested = [f'{{"prompt": "p", "r": {{"t": {number}}}}}\n' for number in NUMBERS]
    (tmp_path / "b.jsonl").write_text("".join(nested))
    assert labels(tmp_path / "b.jsonl", "r.t") == NUMBERS


def test_json_numbers_in_metadata_stay_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "label": 5.0, "metadata": {"n": 5.0}}\n')
    assert open_examples(str(tmp_path / "a.jsonl"), "prompt", "label")[0] == Example(
        "p", "5.0", {"n": 5.0}
    )


def test_an_integer_beyond_pythons_limit_is_an_error_that_names_the_row(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "p"}\n{"prompt": "p", "label": ' + "7" * 5000 + "}\n"
    )
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 2 cannot be read .*limit \(4300 digits\)"
    ):
        labels(tmp_path / "a.jsonl")


CELLS = [
    "007",
    "1.50",
    "NA",
    "None",
    "null",
    "nan",
    "1e5",
    "TRUE",
    " 8",
    "12345678901234567890",
    "-",
]


@pytest.mark.parametrize("source", ["a.csv", "folder"])
def test_csv_cells_arrive_as_they_are_written(tmp_path, source):
    rows = [f'"What, {i}?",{cell},{i:03}\n' for i, cell in enumerate(CELLS)]
    path = tmp_path / source / "train.csv" if source == "folder" else tmp_path / source
    path.parent.mkdir(exist_ok=True)
    path.write_text("\ufeffprompt,label,level\n" + "".join(rows) + "no label,,1\n")
    examples = open_examples(
        str(tmp_path / source), "prompt", "label", cache_dir=str(tmp_path / "cache")
    )
    assert [example.label for example in examples] == [*CELLS, None]
    assert examples[7] == Example("What, 7?", "TRUE", {"level": "007"})


def test_whole_numbers_beside_a_gap_stay_whole(tmp_path):
    """pandas turns 7 into 7.0 if another row has no value."""
    frame = pandas.DataFrame({"prompt": list("abc"), "label": [7, None, -12345678901]})
    assert frame["label"].dtype == float
    frame.to_parquet(tmp_path / "a.parquet")
    assert labels(tmp_path / "a.parquet") == ["7", None, "-12345678901"]
    nested = pyarrow.array([{"t": 7.0}, {"t": None}, {"t": float("nan")}])
    table = pyarrow.table({"prompt": list("abc"), "r": nested})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    assert labels(tmp_path / "b.parquet", "r.t") == ["7", None, None]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pyarrow.array([7, None], pyarrow.int64()), ["7", None]),
        (pyarrow.array([5.0, 0.5]), ["5.0", "0.5"]),
        (pyarrow.array([5.0, 6.0]), ["5.0", "6.0"]),
        (pyarrow.array([5.0, 0.5, None]), ["5.0", "0.5", None]),
        (pyarrow.array([0.1, 2.5], pyarrow.float32()), ["0.1", "2.5"]),
        (pyarrow.array([Decimal("1.50"), None]), ["1.50", None]),
        (pyarrow.array([2**63 - 1, 0]), ["9223372036854775807", "0"]),
        (pyarrow.array(["007", None]).dictionary_encode(), ["007", None]),
        (pyarrow.array([float("inf"), None]), ["inf", None]),
    ],
)
def test_columns_of_parquet(tmp_path, values, expected):
    table = pyarrow.table({"prompt": ["p"] * len(values), "label": values})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert labels(tmp_path / "a.parquet") == expected


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pyarrow.array([True]), "true or false"),
        (pyarrow.array([b"x"]), "of type bytes"),
        (pyarrow.array([0], pyarrow.timestamp("s")), "of type datetime"),
    ],
)
def test_other_types_are_errors_that_name_them(tmp_path, values, kind):
    table = pyarrow.table({"prompt": ["p"], "label": values})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=f"a.parquet, row 1: 'label' is {kind}, it must be"):
        labels(tmp_path / "a.parquet")


def test_half_of_a_surrogate_pair_is_an_error_that_names_the_row(tmp_path):
    rows = [
        {"prompt": "whole \U0001f600", "label": "x"},
        {"prompt": "p", "metadata": {"source": ["half \ud83d"]}},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError) as error:
        labels(tmp_path / "a.jsonl")
    assert str(error.value) == (
        f"{tmp_path}/a.jsonl, line 2 holds \\ud83d alone, half of a surrogate pair and not a "
        "character: write both halves, or remove it"
    )
