"""The short queue between a thread that produces and one that consumes."""

from __future__ import annotations

import queue
import threading

import pytest

from replicator.handoff import Handoff


def test_items_come_out_in_order_and_make_place() -> None:
    handoff = Handoff[int](2)
    assert handoff.put(1, 0) and handoff.put(2, 0)
    assert not handoff.put(3, 0)
    taken = handoff.get(0)
    assert taken == 1
    assert handoff.put(3, 0)
    assert [handoff.get(0), handoff.get(0)] == [2, 3]
    with pytest.raises(queue.Empty):
        handoff.get(0)


def test_what_came_before_the_end_is_still_delivered() -> None:
    handoff = Handoff[int](1)
    handoff.put(1, 0)
    handoff.end()
    assert handoff.get(0) is not None
    assert handoff.get(0) is None


def test_the_end_wakes_who_waits() -> None:
    handoff = Handoff[int](1)
    ended: list[int | None] = []
    waiting = threading.Thread(target=lambda: ended.append(handoff.get(60)))
    waiting.start()
    handoff.end()
    waiting.join(30)
    assert ended == [None]


def test_draining_discards_items_and_keeps_the_end() -> None:
    released: list[int] = []
    handoff = Handoff[int](2)
    handoff.put(1, 0)
    handoff.put(2, 0)
    handoff.end()
    handoff.drain(released.append)
    assert released == [1, 2]
    assert handoff.get(0) is None
    assert handoff.put(3, 0) and handoff.put(4, 0) and not handoff.put(5, 0)
