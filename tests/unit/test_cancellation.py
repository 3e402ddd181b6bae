"""Stopping long work, from any thread, once."""

from __future__ import annotations

import threading

import pytest

from replicator.cancellation import Cancellation
from replicator.errors import Cancelled, DeadlineExceeded


def test_nothing_is_cancelled_by_itself() -> None:
    cancel = Cancellation()
    cancel.check()
    assert not cancel.cancelled
    assert cancel.error is None
    assert not cancel.wait(0)


def test_cancelling() -> None:
    cancel = Cancellation()
    cancel.cancel()
    assert cancel.cancelled
    assert cancel.wait(100)
    with pytest.raises(Cancelled) as caught:
        cancel.check()
    assert caught.value is cancel.error
    assert caught.value.hint


def test_the_first_reason_counts() -> None:
    cancel = Cancellation()
    cancel.cancel(DeadlineExceeded("stalled"))
    cancel.cancel(Cancelled("stopped"))
    with pytest.raises(DeadlineExceeded, match="stalled"):
        cancel.check()


def test_whoever_waits_is_woken() -> None:
    cancel = Cancellation()
    woken = threading.Event()
    waiting = threading.Event()

    def wait() -> None:
        waiting.set()
        if cancel.wait(60):
            woken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(60)
    cancel.cancel()
    thread.join(60)
    assert woken.is_set()


def test_callbacks_run_once_and_only_inside_their_block() -> None:
    cancel = Cancellation()
    called: list[str] = []
    with cancel.unblock(lambda: called.append("over")):
        pass
    with cancel.unblock(lambda: called.append("outer")), cancel.unblock(lambda: called.append("inner")):
        cancel.cancel()
        cancel.cancel()
    assert called == ["outer", "inner"]


def test_a_callback_of_cancelled_work_runs_at_once() -> None:
    cancel = Cancellation()
    cancel.cancel()
    called: list[int] = []
    with cancel.unblock(lambda: called.append(1)):
        assert called == [1]
    assert called == [1]


def test_the_error_is_there_when_callbacks_run() -> None:
    cancel = Cancellation()
    seen: list[bool] = []
    with cancel.unblock(lambda: seen.append(cancel.cancelled and cancel.error is not None)):
        cancel.cancel()
    assert seen == [True]


def test_a_part_is_cancelled_with_the_whole_and_not_the_other_way_round() -> None:
    cancel = Cancellation()
    with cancel.child() as part:
        part.cancel(DeadlineExceeded("stalled"))
        assert not cancel.cancelled
    with cancel.child() as part:
        cancel.cancel(DeadlineExceeded("the whole stalled"))
        with pytest.raises(DeadlineExceeded, match="the whole"):
            part.check()
    with cancel.child() as part:
        assert part.cancelled
    assert cancel.cancelled


def test_a_part_that_is_over_is_not_cancelled_any_more() -> None:
    cancel = Cancellation()
    with cancel.child() as part:
        pass
    cancel.cancel()
    assert not part.cancelled
