"""Long work behind an HTTP request: a thread does it, the response streams what happens as NDJSON.

The work's :class:`~replicator.cancellation.Cancellation` is called when the client closes the connection or the server
stops, so the work ends at a resumable point. A slow reader costs bounded memory: of each transfer only the newest
progress waits to be sent.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from replicator.cancellation import Cancellation
from replicator.control import Happening, Listener
from replicator.errors import Cancelled, ReplicatorError, VolumeBusy
from replicator.model import Progress
from replicator.web.messages import FAILURE, HEARTBEAT, HEARTBEAT_SECONDS, NDJSON, Failure, event, happening_event

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

MAX_WAITING = 10_000
"""Happenings that wait for a slow reader; later ones are left out (the result has all that matters)."""
MAX_WORKS = 32
"""Works at once, at most."""

_log = logging.getLogger(__name__)

Work = Callable[[Listener, Cancellation], bytes]
"""Does it and returns the result as JSON."""


class Works:
    """The long works that run for clients now."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: set[Cancellation] = set()
        self._stopping: ReplicatorError | None = None

    def begin(self) -> Cancellation:
        """Have another one.

        :raises Cancelled: the server stops
        :raises VolumeBusy: too many at once
        """
        with self._changed:
            if self._stopping is not None:
                raise self._stopping
            if len(self._running) >= MAX_WORKS:
                raise VolumeBusy(f"{MAX_WORKS} requests are being worked on already", hint="wait for one to end")
            cancel = Cancellation()
            self._running.add(cancel)
            return cancel

    def end(self, cancel: Cancellation) -> None:
        """One is over."""
        with self._changed:
            self._running.discard(cancel)
            self._changed.notify_all()

    def stop(self) -> None:
        """Cancel all there are, and take no more."""
        error = Cancelled("the daemon is stopping", hint="the next run continues where this one ended")
        with self._changed:
            self._stopping = error
            running = tuple(self._running)
        for cancel in running:
            cancel.cancel(error)

    def wait(self, seconds: float) -> bool:
        """Wait until none is left; whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, seconds)


class Mailbox:
    """Carries happenings from working threads to the event loop; of each transfer only the newest progress."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._waiting: dict[object, Happening] = {}
        self._last: bytes | None = None
        self._count = 0
        self.ready = asyncio.Event()

    def put(self, happening: Happening) -> None:
        """From any thread; never blocks."""
        with self._lock:
            key: object = self._count
            if isinstance(happening, Progress):
                key = (happening.volume, happening.target, happening.step)
            else:
                self._count += 1
            if key not in self._waiting and len(self._waiting) >= MAX_WAITING:
                return
            self._waiting[key] = happening
        self._wake()

    def end(self, line: bytes) -> None:
        """Nothing comes any more but this last line."""
        with self._lock:
            self._last = line
        self._wake()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self.ready.set)
        except RuntimeError:
            return  # the server has ended; nobody reads any more

    def take(self) -> tuple[bytes, bool]:
        """The lines that wait, and whether they are the last. In the event loop only."""
        self.ready.clear()
        with self._lock:
            waiting, self._waiting = self._waiting, {}
            last = self._last
        lines = b"".join(happening_event(happening) for happening in waiting.values())
        return lines + (last or b""), last is not None


class EventStream(Response):
    """A response that does long work while it is being sent."""

    media_type = NDJSON

    def __init__(self, works: Works, work: Work) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._work = work
        self._works = works

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Answer: heartbeats while nothing happens, the result or the error last."""
        cancel = self._works.begin()
        mailbox = Mailbox(asyncio.get_running_loop())
        gone = asyncio.ensure_future(_disconnected(receive))
        # A thread of its own: the pool of the framework is for short answers, and work may last for hours.
        threading.Thread(target=self._run, args=(mailbox, cancel), name="request", daemon=True).start()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._pump(mailbox, gone, send)
        finally:
            gone.cancel()
            cancel.cancel()

    async def _pump(self, mailbox: Mailbox, gone: asyncio.Future[None], send: Send) -> None:
        ended = False
        while not ended:
            ready = asyncio.ensure_future(mailbox.ready.wait())
            either: tuple[asyncio.Future[Any], ...] = (ready, gone)
            await asyncio.wait(either, timeout=HEARTBEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
            if gone.done():
                return
            lines, ended = mailbox.take()
            await send(_body(lines or HEARTBEAT, more=not ended))

    def _run(self, mailbox: Mailbox, cancel: Cancellation) -> None:
        try:
            try:
                last = event("result", self._work(mailbox.put, cancel))
            except ReplicatorError as error:
                last = event("error", FAILURE.dump_json(Failure.of(error)))
            except Exception as error:  # noqa: BLE001  the boundary: a mistake must reach the client and the log
                _log.exception("a request ended with an internal error")
                last = event("error", FAILURE.dump_json(Failure.of(error)))
        finally:
            self._works.end(cancel)
        mailbox.end(last)


def _body(lines: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": lines, "more_body": more}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
