"""The session around a run's steps. Locks, signals, watchdog and exports have their own tests."""

from __future__ import annotations

import gc
import weakref

from megatron_rpp.runtime.session import freeze_heap


class Cycle:
    def __init__(self):
        self.self = self


def test_collections_leave_out_what_the_run_found_and_nothing_else():
    before = Cycle()
    found = weakref.ref(before)
    freeze_heap()
    del before
    inside = Cycle()
    made = weakref.ref(inside)
    del inside
    gc.collect()
    assert found() is not None and made() is None
