"""Iterators that run ahead in a thread of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from replicator.cancellation import Cancellation
from replicator.errors import ReplicatorError, UsageError
from replicator.prefetch import ahead

DEADLINE = 30.0


def test_items_come_in_order_and_all() -> None:
    with ahead(lambda: iter(range(1000)), Cancellation()) as items:
        assert list(items) == list(range(1000))


def test_it_runs_ahead_and_no_further_than_told() -> None:
    made: list[int] = []
    third = threading.Event()

    def numbers() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            if number == 2:
                third.set()
            yield number

    with ahead(numbers, Cancellation(), depth=2) as items:
        assert third.wait(DEADLINE)  # two wait in the queue, one for a place
        assert len(made) == 3
        assert list(items) == list(range(10))


def test_an_error_reaches_the_consumer_after_what_came_before() -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise UsageError("no more", hint="")

    with ahead(numbers, Cancellation()) as items:
        assert next(items) == 1
        with pytest.raises(UsageError, match="no more"):
            next(items)


def test_leaving_early_closes_the_iterator() -> None:
    closed = threading.Event()

    def numbers() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    with ahead(numbers, Cancellation()) as items:
        next(items)
    assert closed.is_set()


def test_a_consumer_that_is_cancelled_waits_no_longer() -> None:
    go_on = threading.Event()

    def numbers() -> Iterator[int]:
        go_on.wait(DEADLINE)
        yield 1

    cancel = Cancellation()
    with pytest.raises(ReplicatorError), ahead(numbers, cancel) as items:
        cancel.cancel()
        try:
            next(items)
        finally:
            go_on.set()
