"""Draws reward, held-out accuracy, KL and response length of one or more runs as a PNG.

    python tools/plot.py LOG_DIR [LOG_DIR ...] --out curves.png

Needs matplotlib (pip install -e '.[plot]').
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an installation

from megatron_rpp.lifecycle.config_error import ConfigError, reading
from megatron_rpp.lifecycle.extras import require_extra

# Panel title -> (file, tag, unit of the vertical axis)
PANELS = {
    "Reward (rollouts)": ("metrics.jsonl", "reward/mean", "mean score"),
    "Held-out accuracy (greedy)": ("evaluations.jsonl", "accuracy", "share correct"),
    "KL from the reference (k1)": ("metrics.jsonl", "kl/k1", "nats per token"),
    "Response length": ("metrics.jsonl", "response/length_mean", "tokens"),
}


def rows_of(path: Path) -> list[dict]:
    """The rows of a JSONL file of a run. Raises ConfigError if it is missing or empty."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing: give the logging.dir of a run that took a step")
    lines = path.read_bytes().splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, 1):
        if line.endswith(b"\n"):  # else it is half written
            with reading(f"{path.absolute()}, line {number}", "remove the damaged line"):
                rows.append(json.loads(line))
    if not rows:
        raise ConfigError(f"{path} is empty: the run has not finished a step")
    return rows


def draw(log_dirs: list[Path], out: Path) -> None:
    """Writes the picture `out`: one panel per quantity, one line per run."""
    require_extra("plot", "tools/plot.py")
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    for axis, (title, (name, tag, unit)) in zip(axes.flat, PANELS.items()):
        for log_dir in log_dirs:
            points = [(row["step"], row[tag]) for row in rows_of(log_dir / name) if tag in row]
            if points:
                axis.plot(*zip(*points), marker="o", markersize=2.5, label=str(log_dir))
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.grid(alpha=0.3)
    if len(log_dirs) > 1:
        axes.flat[0].legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log_dirs", nargs="+", type=Path, help="logging.dir of each run")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="default: curves.png")
    arguments = parser.parse_args()
    try:
        draw(arguments.log_dirs, arguments.out)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
