"""The session around a run's steps. Locks, signals, watchdog and exports have their own tests."""

from __future__ import annotations

import gc
import weakref

import pytest

from megatron_rpp import sft, train
from megatron_rpp.runtime.session import freeze_heap
from tests.small_run import arguments, make_data
from tests.whole_runs import run_program


class Cycle:
    def __init__(self):
        self.self = self


def test_collections_leave_out_what_exists_and_nothing_else():
    before = Cycle()
    found = weakref.ref(before)
    freeze_heap()
    del before
    inside = Cycle()
    made = weakref.ref(inside)
    del inside
    gc.collect()
    assert found() is not None and made() is None


@pytest.mark.parametrize("program", [train, sft])
def test_programs_leave_their_modules_out(tmp_path, program):
    make_data(tmp_path)
    gc.unfreeze()
    run_program(program.main, [*arguments(tmp_path, tmp_path), "--dry-run"])
    assert gc.get_freeze_count() > len(gc.get_objects())
