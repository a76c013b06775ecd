"""The order of the test files where several processes share them."""

from __future__ import annotations

import pytest

# From the longest on, minutes to half a minute: what starts last would end alone.
LONGEST = (
    "test_slurm", "test_layouts", "test_torchrun", "test_hf_weights", "test_refusals",
    "test_resume", "test_preemption", "test_sft", "test_verify_conversion", "test_chaos",
    "test_convert", "test_watchdog", "test_reward_stage", "test_hf_run", "test_preflight",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # pytest-xdist hands files out in the order of its workers
        rank = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))
