"""How long work is shown, and how it is stopped."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from rich.console import Console

from replicator.cancellation import Cancellation
from replicator.cli import work
from replicator.cli.work import PlainDisplay, TerminalDisplay
from replicator.control import Listener, Note, RunReport
from replicator.errors import Cancelled, NoSpace
from replicator.model import Progress

NOW = datetime(2026, 11, 20, tzinfo=UTC)
PATIENCE = 20.0


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Ctrl-C means what it does on a terminal, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Clock:
    """Time that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def progress(done: int, total: int | None = 1000 << 20, step: str = "one", volume: str = "images:a") -> Progress:
    return Progress(volume, "prox2:backup", step, done, total, done, float(100 << 20), NOW)


def plain() -> tuple[PlainDisplay, io.StringIO, Clock]:
    text, clock = io.StringIO(), Clock()
    return PlainDisplay(Console(file=text, width=200, markup=False), clock=clock), text, clock


def test_plain_lines_come_every_few_seconds_and_at_the_end() -> None:
    display, text, clock = plain()
    with display:
        for second in range(12):
            display.show(progress(second * 50 << 20))
            display.show(progress(second << 20, None, volume="images:b"))
            clock.now += 1.0
    lines = text.getvalue().splitlines()
    mine = [line for line in lines if "images:a" in line]
    assert mine == [
        "images:a → prox2:backup: one: 250 MiB of 1000 MiB, 25%, 100 MiB/s, 8s left",
        "images:a → prox2:backup: one: 500 MiB of 1000 MiB, 50%, 100 MiB/s, 5s left",
        "images:a → prox2:backup: one: 550 MiB of 1000 MiB, 55%, 100 MiB/s, 4s left",
    ]
    assert len(lines) == 6


def test_a_step_s_last_line_is_told_before_what_follows() -> None:
    display, text, _ = plain()
    with display:
        display.show(progress(1000 << 20))
        display.show(progress(1 << 20, step="two"))
        display.show(Note("a note"))
        display.show(RunReport("vms", "images:a", "prox2:backup", "failed", 1.0, 1, 1, 1, message="the cause"))
    starts = [line.split("prox2:backup: ")[-1] for line in text.getvalue().splitlines()]
    assert [start[:18] for start in starts] == [
        "one: 1000 MiB of 1",
        "a note",
        "two: 1.00 MiB of 1",
        "failed: the cause",
    ]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_bars_for_several_transfers_fit(width: int) -> None:
    text, clock = io.StringIO(), Clock()
    with TerminalDisplay(Console(file=text, width=width, force_terminal=True, markup=False), clock=clock) as display:
        display.show(progress(500 << 20))
        display.show(progress(5 << 30, None, volume="images:b"))
        display.show(Note("a note"))
        display.draw()
        drawn = text.getvalue()
        display.show(RunReport("vms", "images:a", "prox2:backup", "ok", 1.0, 1, 1, 1))
    assert "images:a → " in drawn
    assert "images:b → " in drawn
    assert "a note" in drawn
    if width >= 80:
        assert "500 MiB of 1000 MiB, 50%" in drawn
        assert "5s left" in drawn
        assert "100 MiB/s" in drawn
    assert "done, " in text.getvalue()


def test_the_result_and_the_error_come_through(capsys: pytest.CaptureFixture[str]) -> None:
    def fine(listen: Listener, _cancel: Cancellation) -> int:
        listen(Note("working"))
        return 7

    def bad(_listen: Listener, _cancel: Cancellation) -> int:
        raise NoSpace("full")

    assert work.run(fine) == 7
    assert "working" in capsys.readouterr().err
    with pytest.raises(NoSpace):
        work.run(bad)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_at_a_resumable_point(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stopped = threading.Event()

    def endless(_listen: Listener, cancel: Cancellation) -> int:
        os.kill(os.getpid(), number)
        assert cancel.wait(PATIENCE)
        stopped.set()
        cancel.check()
        return 0

    with pytest.raises(Cancelled):
        work.run(endless)
    assert stopped.is_set()
    assert "stopping where the next run continues" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_second_signal_stops_at_once() -> None:
    release = threading.Event()

    def stubborn(_listen: Listener, cancel: Cancellation) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        cancel.wait(PATIENCE)
        os.kill(os.getpid(), signal.SIGINT)
        release.wait(PATIENCE)
        return 0

    with pytest.raises(KeyboardInterrupt):
        work.run(stubborn)
    release.set()
