"""The curves and the closing report, from logs written by hand."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
PANELS = (
    "Reward (rollouts)",
    "Held-out accuracy (greedy)",
    "KL from the reference (k1)",
    "Response length",
)


def tool(name: str, *words) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(TOOLS / name), *map(str, words)],
        capture_output=True, text=True, timeout=120, env={"COLUMNS": "160", "PATH": ""},
    )  # fmt: skip


def metrics_row(step: int) -> dict:
    return {
        "step": step,
        "reward/mean": 0.1 * step,
        "kl/k1": 0.01 * step,
        "response/length_mean": 4.0 + step,
        "throughput/tokens_per_second": 1000.0 * step,
        "time/step": 20.0,
        "time/checkpoint": 10.0 if step == 7 else 0.0,
    }


def without_kl(step: int) -> dict:
    row = metrics_row(step)
    del row["kl/k1"]
    return row


def evaluation(step: int, accuracy: float, response: str) -> dict:
    sample = {"prompt": "1 + 2 =", "response": response, "label": "3", "score": accuracy}
    return {
        "step": step, "count": 8, "accuracy": accuracy, "reward": accuracy + 0.05,
        "samples": [sample],
    }  # fmt: skip


def write(path: Path, content: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))


@pytest.fixture
def logs(tmp_path) -> Path:
    folder = tmp_path / "logs"
    write(folder / "metrics.jsonl", [metrics_row(step) for step in range(1, 8)])
    answers = [evaluation(0, 0.25, "5"), evaluation(7, 0.875, "3")]
    write(folder / "evaluations.jsonl", answers)
    return folder


def test_plot_writes_a_picture_of_four_panels(logs, tmp_path):
    done = tool("plot.py", logs, "--out", tmp_path / "new/curves.png")
    assert done.returncode == 0, done.stderr
    content = (tmp_path / "new/curves.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", content[16:24])
    assert width >= 1000 and height >= 600
    # matplotlib writes by the suffix, and in an SVG every text is there to read.
    tool("plot.py", logs, "--out", tmp_path / "curves.svg")
    drawing = (tmp_path / "curves.svg").read_text()
    assert all(f"<!-- {title} -->" in drawing for title in PANELS)
    assert drawing.count('<g id="axes_') == len(PANELS)
    assert "nan" not in drawing


def test_plot_draws_every_run(logs, tmp_path):
    write(tmp_path / "other/metrics.jsonl", [metrics_row(1), metrics_row(2)])
    write(tmp_path / "other/evaluations.jsonl", [evaluation(0, 0.5, "3")])
    assert tool("plot.py", logs, tmp_path / "other", "--out", tmp_path / "two.svg").returncode == 0
    drawing = (tmp_path / "two.svg").read_text()
    assert all(f"<!-- {name} -->" in drawing for name in (logs, tmp_path / "other"))


def test_plot_without_kl_leaves_its_panel_empty(logs, tmp_path):
    write(logs / "metrics.jsonl", [without_kl(1), without_kl(2)])
    assert tool("plot.py", logs, "--out", tmp_path / "curves.png").returncode == 0


def test_plot_of_a_run_under_way_leaves_out_the_torn_line(logs, tmp_path):
    with open(logs / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "reward/me')
    done = tool("plot.py", logs, "--out", tmp_path / "curves.png")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl"])
@pytest.mark.parametrize("state", ["missing", "empty"])
def test_plot_of_a_run_without_rows_is_an_error(logs, tmp_path, name, state):
    (logs / name).unlink()
    if state == "empty":
        (logs / name).write_text("")
    done = tool("plot.py", logs, "--out", tmp_path / "curves.png")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {logs / name} is {state}: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "curves.png").exists()


def table_rows(output: str) -> dict[str, list[str]]:
    """First cell: the other cells of every line of the printed tables."""
    lines = [line.strip("│┃ ").split("│") for line in output.splitlines() if "│" in line]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_report_prints_what_the_run_achieved(logs, tmp_path):
    done = tool("report.py", "--logging.dir", logs, "--checkpoint.dir", tmp_path / "checkpoints")
    assert done.returncode == 0, done.stderr
    assert "reinforce++, 7 steps" in done.stdout
    # "after" of the rollouts is the mean of the last five steps: (0.3 + .. + 0.7) / 5.
    assert table_rows(done.stdout) == {
        "held-out accuracy": ["25.0%", "87.5%"],
        "held-out reward": ["0.300", "0.925"],
        "reward of rollouts": ["0.100", "0.500"],
        "KL from the reference": ["0", "0.050"],
        "tokens a second": ["", "4,000"],
        "minutes": ["", "2.5"],
        "1 + 2 =": ["3", "5", "3"],
    }
    assert f"tensorboard --logdir {logs}" in done.stdout
    assert str(tmp_path / "checkpoints") in done.stdout
    assert (logs / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_report_of_a_run_without_kl(logs):
    write(logs / "metrics.jsonl", [without_kl(1)])
    done = tool("report.py", "--logging.dir", logs)
    assert table_rows(done.stdout)["KL from the reference"] == ["0", "not measured"]


def test_report_of_a_run_without_steps_is_an_error(tmp_path):
    done = tool("report.py", "--logging.dir", tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path / 'metrics.jsonl'} is missing: give the")
