"""Long work of a verb: shown while it goes on, stopped at a resumable point by Ctrl-C.

The work runs in a thread of its own; this one draws, and hears signals.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, TypeVar

from rich.console import Console
from rich.live import Live

from replicator.cancellation import Cancellation
from replicator.cli import output
from replicator.cli.output import safe, styled
from replicator.cli.tables import OUTCOMES, amount, left, progress_table, short
from replicator.control import Happening, Listener, Note, RunReport
from replicator.model import Progress
from replicator.units import format_rate, format_size
from replicator.verification import Method, Resync, Verification

DRAW_SECONDS = 0.1
LINE_SECONDS = 5.0
"""Between two lines of one transfer where there is no terminal."""

T = TypeVar("T")


class Display(Protocol):
    """Shows what happens. Used by one thread only."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def show(self, happening: Happening) -> None:
        """Something happened."""

    def say(self, text: str) -> None:
        """Something to know."""

    def draw(self) -> None:
        """Some time went by."""


def sentence(happening: Happening) -> tuple[str, str] | None:
    """A happening that ends something, in words and with a style."""
    match happening:
        case RunReport(outcome="ok"):
            what = f"{format_size(happening.done)} in {short(happening.seconds)}" if happening.steps else "nothing new"
            return f"{happening.volume} → {happening.target}: done, {what}", OUTCOMES["ok"]
        case RunReport():
            reason = f": {happening.message}" if happening.message else ""
            style = OUTCOMES.get(happening.outcome, "red")
            return f"{happening.volume} → {happening.target}: {happening.outcome}{reason}", style
        case Verification():
            if happening.method is Method.SCRUB:
                did, result = "looked at the scrubs for", "right" if happening.equal else "not right"
            else:
                did, result = "compared", "equal" if happening.equal else f"{format_size(happening.differing)} differ"
            style = "green" if happening.equal else "red"
            return f"{happening.volume} → {happening.target}: {did} {happening.snapshot}, {result}", style
        case Resync():
            return f"{happening.volume} → {happening.target}: right again at {happening.snapshot}", "green"
        case _:
            return None


class PlainDisplay:
    """Lines: at the beginning, every few seconds, at the end. For logs and pipes."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._told: dict[tuple[str, str, str], float] = {}
        self._newest: dict[tuple[str, str, str], Progress] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for item in self._newest.values():
            self._line(item)

    def show(self, happening: Happening) -> None:
        """See Display."""
        if isinstance(happening, Progress):
            key = (happening.volume, happening.target, happening.step)
            for other in [k for k in self._newest if k[:2] == key[:2] and k != key]:
                self._line(self._newest.pop(other))
            now = self._clock()
            if now - self._told.setdefault(key, now) >= LINE_SECONDS:
                self._told[key] = now
                self._newest.pop(key, None)
                self._line(happening)
            else:
                self._newest[key] = happening
            return
        if isinstance(happening, Note):
            self.say(happening.message)
        else:
            for key in [k for k in self._newest if k[:2] == (happening.volume, happening.target)]:
                self._line(self._newest.pop(key))
        words = sentence(happening)
        if words:
            self.say(words[0])

    def _line(self, item: Progress) -> None:
        if not item.done:
            return
        rest = f", {left(item)}" if left(item) else ""
        self.say(f"{item.volume} → {item.target}: {item.step}: {amount(item)}, {format_rate(item.rate)}{rest}")

    def say(self, text: str) -> None:
        """See Display."""
        self._console.print(styled(text), soft_wrap=True)

    def draw(self) -> None:
        """See Display."""


class TerminalDisplay:
    """A bar for each transfer; what is worth keeping is printed above them."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._running: dict[tuple[str, str], Progress] = {}
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._drawn = 0.0

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def show(self, happening: Happening) -> None:
        """See Display."""
        if isinstance(happening, Progress):
            self._running[happening.volume, happening.target] = happening
            return
        if isinstance(happening, Note):
            self.say(happening.message)
            return
        self._running.pop((happening.volume, happening.target), None)
        words = sentence(happening)
        if words:
            self._console.print(styled(*words), soft_wrap=True)

    def say(self, text: str) -> None:
        """See Display."""
        self._console.print(safe(text), style="dim", soft_wrap=True)

    def draw(self) -> None:
        """See Display."""
        now = self._clock()
        if now - self._drawn >= DRAW_SECONDS:
            self._drawn = now
            self._live.update(progress_table(self._running.values(), width=self._console.width), refresh=True)


@dataclass(frozen=True, slots=True)
class _Ended:
    """The work is over."""

    result: object = None
    error: BaseException | None = None


def display() -> Display:
    """The one that fits stderr."""
    console = output.console(stderr=True)
    return TerminalDisplay(console) if console.is_terminal else PlainDisplay(console)


def run(work: Callable[[Listener, Cancellation], T]) -> T:
    """Do it, and show how it goes on; its result or its error.

    The first Ctrl-C (or SIGTERM) stops the work at a resumable point, the second at once.
    """
    happenings: queue.SimpleQueue[Happening | _Ended] = queue.SimpleQueue()
    cancel = Cancellation()

    def do() -> None:
        try:
            happenings.put(_Ended(result=work(happenings.put, cancel)))
        except BaseException as error:  # noqa: BLE001  it is raised in the thread that waits
            happenings.put(_Ended(error=error))

    with _terminable(), display() as shown:
        # Not waited for at exit: whatever is cut off hard is resumable as well.
        worker = threading.Thread(target=do, name="work", daemon=True)
        try:
            worker.start()
            ended = _follow(happenings, shown)
        except KeyboardInterrupt:
            shown.say("stopping where the next run continues; Ctrl-C once more stops at once")
            cancel.cancel()
            ended = _follow(happenings, shown)
    if ended.error is not None:
        raise ended.error
    return ended.result  # type: ignore[return-value]


def _follow(happenings: queue.SimpleQueue[Happening | _Ended], shown: Display) -> _Ended:
    while True:
        try:
            happening = happenings.get(timeout=DRAW_SECONDS)
        except queue.Empty:
            shown.draw()
            continue
        if isinstance(happening, _Ended):
            return happening
        shown.show(happening)
        shown.draw()


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is as Ctrl-C, for the time of the work."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
