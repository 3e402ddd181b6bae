"""The short queue between the thread that reads a connection and the one that consumes."""

from __future__ import annotations

import queue
import threading

import pytest

from transport.frames import Frame, FrameType
from transport.inbox import Inbox


def frame(number: int, released: list[int] | None = None) -> Frame:
    return Frame(
        FrameType.DATA, 0, 1, number, b"", 0, lambda: (released if released is not None else []).append(number)
    )


def test_frames_come_out_in_order_and_make_place() -> None:
    inbox = Inbox(2)
    assert inbox.put(frame(1), 0) and inbox.put(frame(2), 0)
    assert not inbox.put(frame(3), 0)
    taken = inbox.get(0)
    assert taken is not None and taken.sequence == 1
    assert inbox.put(frame(3), 0)
    assert [one.sequence for one in (inbox.get(0), inbox.get(0)) if one is not None] == [2, 3]
    with pytest.raises(queue.Empty):
        inbox.get(0)


def test_what_came_before_the_end_is_still_delivered() -> None:
    inbox = Inbox(1)
    inbox.put(frame(1), 0)
    inbox.end()
    assert inbox.get(0) is not None
    assert inbox.get(0) is None


def test_the_end_wakes_who_waits() -> None:
    inbox = Inbox(1)
    ended: list[Frame | None] = []
    waiting = threading.Thread(target=lambda: ended.append(inbox.get(60)))
    waiting.start()
    inbox.end()
    waiting.join(30)
    assert ended == [None]


def test_draining_releases_buffers_and_keeps_the_end() -> None:
    released: list[int] = []
    inbox = Inbox(2)
    inbox.put(frame(1, released), 0)
    inbox.put(frame(2, released), 0)
    inbox.end()
    inbox.drain()
    assert released == [1, 2]
    assert inbox.get(0) is None
    assert inbox.put(frame(3), 0) and inbox.put(frame(4), 0) and not inbox.put(frame(5), 0)
