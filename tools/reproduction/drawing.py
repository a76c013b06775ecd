"""Pictures of the results: a line per algorithm, the mean over seeds, in a band from the lowest to the
highest seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rpp.lifecycle.extras import require_extra
from reproduction.protocol import ALGORITHMS
from reproduction.results import Row

LABELS = {
    "step": "step",
    "accuracy": "held-out accuracy",
    "held_out_reward": "held-out reward",
    "kl": "KL, nats per response",
    "length": "response length, tokens",
}
PANELS = {
    "speed": (("step", "accuracy"),),
    "math": (("step", "accuracy"), ("step", "length"), ("step", "kl"), ("kl", "accuracy")),
    "math-model": (("step", "accuracy"), ("step", "held_out_reward"), ("step", "kl"),
                   ("kl", "held_out_reward"), ("kl", "accuracy"), ("step", "length")),
    "length": (("step", "length"), ("step", "held_out_reward"), ("step", "accuracy"),
               ("step", "kl"), ("kl", "held_out_reward"), ("kl", "length")),
}  # fmt: skip
"""The panels of each experiment that has a picture: horizontal and vertical quantity."""


def draw(experiment: str, rows: list[Row], out: Path) -> None:
    """Writes the picture of an experiment."""
    require_extra("plot", "tools/reproduce.py")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = PANELS[experiment]
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    size = (4 * across, 3 * down)
    figure, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for axis, (x, y) in zip(axes.flat, panels):
        _draw_panel(axis, rows, x=x, y=y)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def _draw_panel(axis: Any, rows: list[Row], *, x: str, y: str) -> None:
    for number, algorithm in enumerate(ALGORITHMS):
        curves = [row["curve"] for row in rows if row["algorithm"] == algorithm]
        if not curves:
            continue
        places = [mean for _, mean, _ in bands(curves, x)]
        lowest, means, highest = zip(*bands(curves, y))
        axis.plot(places, means, color=f"C{number}", marker="o", markersize=2, label=algorithm)
        if x == "step":
            axis.fill_between(places, lowest, highest, color=f"C{number}", alpha=0.15)
    axis.set(xlabel=LABELS[x], ylabel=LABELS[y])
    axis.grid(alpha=0.3)


def bands(curves: Sequence[list[Row]], quantity: str) -> list[tuple[float, float, float]]:
    """(lowest, mean, highest) over the curves at each of the points that all have."""
    points = zip(*([point[quantity] for point in curve] for curve in curves))
    return [(min(values), statistics.fmean(values), max(values)) for values in points]
