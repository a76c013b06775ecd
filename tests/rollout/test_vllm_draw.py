"""A rollout in a thread: what it raises is told, what it counts is reported, and it gives up."""

from __future__ import annotations

import time

from megatron_rpp.rollout.vllm.draw import Draw, Round


def test_what_the_thread_raises_is_kept_with_its_name_and_place():
    def work(draw):
        return 1 // len(draw.requests)

    draw = Draw([], None)
    draw.start(work)
    problem = draw.wait(lambda finished: None, lambda: False).problem
    assert "ZeroDivisionError: integer division" in problem
    assert "failed at work (" in problem and "test_vllm_draw.py" in problem


def test_finished_responses_are_counted_once():
    def work(draw):
        for _ in range(3):
            draw.count(2)
            time.sleep(0.15)
        return Round(abandoned=draw.given_up.is_set())

    draw, reports = Draw([], None), []
    draw.start(work)
    assert not draw.wait(reports.append, lambda: False).abandoned
    assert sum(reports) == 6 and draw.done
    assert not draw.wait(reports.append, lambda: True).abandoned, "it was over before the stop"
    assert sum(reports) == 6


def test_a_stop_ends_the_thread():
    def work(draw):
        return Round(abandoned=draw.given_up.wait(20))

    for end in (Draw.give_up, lambda draw: draw.wait(lambda finished: None, lambda: True)):
        draw, start = Draw([], None), time.monotonic()
        draw.start(work)
        assert not draw.done
        end(draw)
        assert draw.done and draw.wait(lambda finished: None, lambda: False).abandoned
        assert time.monotonic() - start < 5


def test_a_rank_that_sends_no_requests_has_nothing_to_wait_for():
    draw = Draw([], None)
    assert draw.done and draw.wait(lambda finished: None, lambda: False) == Round()
    draw.give_up()
