"""Rows of results from logs written by hand, and the tables made of them."""

from __future__ import annotations

import pytest
from reproduction import document, results

from megatron_rpp.lifecycle.config_error import ConfigError


def step(number: int, **values: float) -> dict:
    return {
        "step": number, "reward/mean": 0.1 * number, "kl/k1": 0.01 * number,
        "response/length_mean": 10.0 + number, "time/step": 2.0 * number, "time/update": 1.0 * number,
        "time/checkpoint": 9.0,
    } | values  # fmt: skip


STEPS = [step(number) for number in range(1, 5)]
EVALUATIONS = [
    {"step": 0, "accuracy": 0.5, "reward": 0.6},
    {"step": 2, "accuracy": 0.75, "reward": 0.8},
    {"step": 4, "accuracy": 0.7, "reward": 0.9},
]


def test_a_curve_has_the_means_since_the_point_before():
    start, middle, end = results.curve(EVALUATIONS, STEPS, right="reward/mean")
    assert start == {
        "step": 0, "accuracy": 0.5, "held_out_reward": 0.6, "reward": 0.1, "right": 0.1,
        "kl": pytest.approx(0.01 * 11), "length": 11.0,
    }  # fmt: skip
    assert middle["reward"] == pytest.approx(0.15) and middle["length"] == 11.5
    assert end["kl"] == pytest.approx((0.03 * 13 + 0.04 * 14) / 2)


def test_time_to_an_accuracy_is_the_sum_of_the_steps_before_it():
    assert results.time_to(0.75, EVALUATIONS, STEPS) == {"steps": 2, "seconds": 6.0}
    assert results.time_to(0.5, EVALUATIONS, STEPS) == {"steps": 0, "seconds": 0.0}
    assert results.time_to(0.8, EVALUATIONS, STEPS) is None


def test_seconds_are_medians_without_the_first_step():
    assert results.median_seconds(STEPS) == {"step": 6.0, "update": 3.0}


def row(algorithm: str, seed: int, *, accuracy: float, rate: float = 1e-4) -> dict:
    first = {"accuracy": 0.5, "held_out_reward": 0.0, "kl": 0.0, "length": 3.0}
    end = {"accuracy": accuracy, "held_out_reward": 1.0, "kl": 0.5, "length": 4.0}
    return {
        "algorithm": algorithm, "seed": seed, "learning_rate": rate, "commits": ["abc"],
        "seconds": {"step": 1.0}, "peak_memory_gb": 1.0, "target": None, "curve": [first, end, end],
    }  # fmt: skip


def test_the_best_rate_is_that_of_the_highest_accuracy_or_the_lowest_of_equal_ones():
    rates = {5e-5: 0.7, 2e-4: 0.8, 1e-4: 0.8}
    rows = [row("ppo", 101, accuracy=value, rate=rate) for rate, value in rates.items()]
    assert results.best_rate(rows) == 1e-4
    assert "| `ppo` | 0.700 | **0.800** | **0.800** |" in document.rates_table(rows)


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_a_comparison_is_paired_by_seed():
    rows = [row("reinforce++", seed, accuracy=0.5 + 0.125 * seed) for seed in (1, 2, 3)]
    rows += [row("ppo", seed, accuracy=0.375 + 0.125 * seed) for seed in (1, 2, 3)]
    rows += [row("rloo", seed, accuracy=[0.625, 0.875, 0.75][seed - 1]) for seed in (1, 2, 3)]
    table = document.comparison(rows, {"accuracy": results.final_accuracy})
    # 0.625, 0.75, 0.875: s = 0.125, margin 4.3027 * 0.125 / sqrt(3) = 0.3105.
    # rloo - reinforce++: 0, 0.125, -0.125.
    assert cells(table)[2:] == [
        ["accuracy", "`reinforce++`", "0.75 ± 0.31", "", ""],
        ["", "`rloo`", "0.75 ± 0.31", "+0 ± 0.31", "no difference shown"],
        ["", "`ppo`", "0.625 ± 0.31", "-0.125 ± 0", "differs"],
    ]


def test_a_mean_over_a_part_of_the_seeds_is_not_shown():
    rows = [row("reinforce++", seed, accuracy=0.6) for seed in (1, 2)]
    rows += [row("ppo", seed, accuracy=0.6) for seed in (1, 2)]
    rows[0]["target"] = rows[2]["target"] = rows[3]["target"] = {"steps": 5}
    table = document.comparison(rows, {"steps": document.to_target("steps")})
    assert cells(table)[2:] == [
        ["steps", "`reinforce++`", "in 1 of 2 runs", "", ""],
        ["", "`ppo`", "5 ± 0", "", ""],
    ]


def test_savings_are_shares_of_the_seconds_of_ppo():
    rows = [row(name, seed, accuracy=0.6) for name in ("reinforce++", "ppo") for seed in (1, 2)]
    for each, seconds in zip(rows, (3.0, 2.0, 4.0, 4.0)):
        each["seconds"]["step"] = seconds
    # 25% and 50%: mean 37.5, s = 12.5 * sqrt(2), margin 12.7062 * 12.5 = 158.8.
    expected = "`ppo`: 37.5 ± 1.6e+02% per step. The paper"
    assert expected in document.savings(rows)
    rows[0]["target"] = rows[2]["target"] = {"seconds": 1.0}
    assert expected in document.savings(rows), "not of one of two seeds"


@pytest.mark.parametrize("name", ["models", "choose", "speed", "math", "math-model", "length"])
def test_every_section_has_a_table(name):
    rows = [
        row(algorithm, seed, accuracy=0.7)
        for seed in (1, 2)
        for algorithm in ("reinforce++", "ppo")
    ]
    if name == "models":
        rows = [{"model": "warm start", "steps": 9, "accuracy": 0.5, "commits": ["abc"]}]
    text = document.section(name, rows)
    assert "| --- |" in text and f"{len(rows)} rows, made on `abc`" in text


def test_rows_are_in_the_order_of_seeds_algorithms_and_rates():
    rows = [row("ppo", 1, accuracy=0.5), row("grpo", 2, accuracy=0.5),
            row("reinforce++", 1, accuracy=0.5, rate=2e-4), row("reinforce++", 1, accuracy=0.5)]  # fmt: skip
    ordered = results.in_order(rows)
    assert [(r["seed"], r["algorithm"], r["learning_rate"]) for r in ordered] == [
        (1, "reinforce++", 1e-4), (1, "reinforce++", 2e-4), (1, "ppo", 1e-4), (2, "grpo", 1e-4)
    ]  # fmt: skip


def test_gain_per_nat():
    assert document.per_nat("accuracy")(row("ppo", 1, accuracy=0.75)) == 0.5


def test_text_between_markers_is_replaced():
    page = "a\n<!-- results: x -->\nold\n<!-- end -->\nb\n<!-- results: y -->\nkept\n<!-- end -->\n"
    filled = document.fill(page, {"x": r"new \1"})
    assert filled == page.replace("\nold\n", "\n\nnew \\1\n\n")
    assert document.fill(filled, {"x": r"new \1"}) == filled
    with pytest.raises(ConfigError, match="results: z"):
        document.fill(page, {"z": ""})
