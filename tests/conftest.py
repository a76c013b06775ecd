"""The tiers of the tests, and their order if several processes share them.

The folders and files of SLOW start processes, train, or convert whole models. All other tests take
less than two minutes in total. A single slow test elsewhere has the marker itself.
"""

from __future__ import annotations

import gc

import hypothesis
import pytest

# A busy machine is slow, not wrong.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

# The longest files, from minutes to half a minute, start first: a late start would end alone.
LONGEST = (
    "test_layouts", "test_slurm", "test_reproduce", "test_stop_in_rollout", "test_pretended_steps",
    "test_resume", "test_torchrun", "test_preemption", "test_reward_model", "test_chaos",
    "test_recompute", "test_requirements", "test_single_node", "test_memory_peak",
    "test_quick_answers", "test_gpu_acceptance", "test_config_errors", "test_docs",
    "test_verify_conversion", "test_rollouts_ahead", "test_hf_weights", "test_reward_stage",
    "test_offloaded_adam", "test_watchdog", "test_sft",
)  # fmt: skip


SLOW = {
    "checkpoint", "conversion", "hf", "launch", "parallel", "runs", "runtime", "stages", "tools",
    "test_statistics_distributed", "test_pool", "test_http", "test_engine", "test_hf_weights",
    "test_hf_classifiers", "test_watchdog",
}  # fmt: skip


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()  # what the modules hold is no garbage, but every collection would look through it


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW & {item.path.parent.name, item.path.stem}:
            item.add_marker("slow")
        if item.path.stem == "test_slurm":
            item.add_marker("slurm")
    if hasattr(config, "workerinput"):  # pytest-xdist hands files out in the order of its workers
        rank = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))
