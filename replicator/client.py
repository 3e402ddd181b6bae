"""The daemon's :class:`~replicator.control.Control`, over its Unix socket.

Long work streams what happens to the listener. Cancelling it closes the connection, upon which the daemon stops the
work at a resumable point.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pydantic_core
from pydantic import TypeAdapter

from replicator.cancellation import Cancellation
from replicator.control import (
    Finding,
    HistoryEntry,
    Listener,
    OrphanReport,
    PlannedReplica,
    PruneReport,
    Restored,
    ResyncPreview,
    RoleOrder,
    RolePreview,
    RoleReport,
    RunReport,
    SideSnapshots,
    Status,
)
from replicator.errors import ConnectionLost, DaemonUnreachable, DeadlineExceeded, ProtocolError
from replicator.verification import Resync, Verification
from replicator.web import messages
from replicator.web.messages import SOCKET_NAME, Event, Failure, Health

__all__ = ["SOCKET_NAME", "DaemonClient", "Timeouts", "daemon_answers"]

MAX_ANSWER = 256 * 1024 * 1024
"""Bytes of one answer, or of one line of a stream, at most."""

_LOG_HINT = "see the daemon's log: journalctl -u replicator"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Longest waits, in seconds.

    :ivar connect: until the daemon takes the connection
    :ivar answer: until an answer to a question is there, and for each part of it
    :ivar silence: on a stream of events, which has a heartbeat every two seconds
    """

    connect: float = 5.0
    answer: float = 180.0
    silence: float = 20.0


def daemon_answers(path: Path) -> bool:
    """Whether somebody takes connections on the socket.

    :raises DaemonUnreachable: somebody may, but this user may not ask
    """
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    probe.settimeout(Timeouts().connect)
    try:
        probe.connect(os.fspath(path))
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        return False
    except OSError as error:
        if "too long" in str(error):
            return False
        raise _unreachable(path, error) from error
    finally:
        probe.close()
    return True


def _unreachable(path: Path, error: Exception) -> DaemonUnreachable:
    refused = isinstance(error, PermissionError) or "Permission denied" in str(error)
    if refused:
        return DaemonUnreachable(
            f"this user may not talk to the daemon on {path}", hint="run the command as root, for example with sudo"
        )
    return DaemonUnreachable(
        f"no daemon answers on {path}: {error}",
        hint="start it with `systemctl start replicator` or `replicator serve`",
    )


class DaemonClient:
    """Implements :class:`~replicator.control.Control`; thread-safe; a context manager.

    Every method raises, besides the errors of the work itself: DaemonUnreachable (nobody answers), DeadlineExceeded
    (no answer in time), ConnectionLost (the daemon ended in the middle), ProtocolError (an answer that cannot be read).
    """

    def __init__(self, socket_path: Path, *, timeouts: Timeouts | None = None) -> None:
        self._path = socket_path
        self._timeouts = timeouts or Timeouts()
        self._http = httpx.Client(
            # Connections are not kept: making one costs nothing here, and a kept one may just be closing.
            transport=httpx.HTTPTransport(uds=os.fspath(socket_path), limits=httpx.Limits(max_keepalive_connections=0)),
            base_url=f"http://localhost{messages.PREFIX}/",
            timeout=httpx.Timeout(self._timeouts.answer, connect=self._timeouts.connect),
            trust_env=False,
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def status(self) -> Status:
        """See :meth:`Control.status <replicator.control.Control.status>`, as for all that follow."""
        found: Status = self._ask("GET", "status", messages.STATUS)
        return found

    def health(self) -> Health:
        """That it answers, and what it says of itself."""
        found: Health = self._ask("GET", "health", messages.HEALTH)
        return found

    def plan(self, job: str | None) -> tuple[PlannedReplica, ...]:
        found: tuple[PlannedReplica, ...] = self._ask("GET", "plan", messages.PLAN, job=job)
        return found

    def sync(
        self, job: str, volume: str | None, target: str | None, listen: Listener, cancel: Cancellation
    ) -> tuple[RunReport, ...]:
        order = messages.SyncRequest(job, volume, target)
        found: tuple[RunReport, ...] = self._work("sync", order, messages.REPORTS, listen, cancel)
        return found

    def preview_resync(self, volume: str, target: str | None, full: bool) -> tuple[ResyncPreview, ...]:
        found: tuple[ResyncPreview, ...] = self._ask(
            "GET", "resync", messages.PREVIEWS, volume=volume, target=target, full=full or None
        )
        return found

    def resync(
        self, volume: str, target: str | None, full: bool, listen: Listener, cancel: Cancellation
    ) -> tuple[Resync, ...]:
        order = messages.ResyncRequest(volume, target, full)
        found: tuple[Resync, ...] = self._work("resync", order, messages.RESYNCS, listen, cancel)
        return found

    def verify(
        self,
        volume: str,
        target: str | None,
        snapshot: str | None,
        repair: bool,
        scrub: bool,
        listen: Listener,
        cancel: Cancellation,
    ) -> tuple[Verification, ...]:
        order = messages.VerifyRequest(volume, target, snapshot, repair, scrub)
        found: tuple[Verification, ...] = self._work("verify", order, messages.VERIFICATIONS, listen, cancel)
        return found

    def snapshots(self, volume: str) -> tuple[SideSnapshots, ...]:
        found: tuple[SideSnapshots, ...] = self._ask("GET", "snapshots", messages.SNAPSHOTS, volume=volume)
        return found

    def prune(self, job: str, dry_run: bool) -> tuple[PruneReport, ...]:
        order = messages.PruneOrder(job, dry_run)
        found: tuple[PruneReport, ...] = self._work("prune", order, messages.PRUNES, lambda _: None, Cancellation())
        return found

    def orphans(self, job: str) -> tuple[OrphanReport, ...]:
        found: tuple[OrphanReport, ...] = self._ask("GET", "orphans", messages.ORPHANS, job=job)
        return found

    def remove_orphans(self, job: str, wanted: tuple[OrphanReport, ...]) -> tuple[OrphanReport, ...]:
        order = messages.OrphanOrder(job, wanted)
        found: tuple[OrphanReport, ...] = self._work(
            "remove-orphans", order, messages.ORPHANS, lambda _: None, Cancellation()
        )
        return found

    def restore(self, snapshot: str, to: str, listen: Listener, cancel: Cancellation) -> Restored:
        order = messages.RestoreRequest(snapshot, to)
        found: Restored = self._work("restore", order, messages.RESTORED, listen, cancel)
        return found

    def preview_role(self, order: RoleOrder) -> RolePreview:
        query = {name: value or None for name, value in asdict(order).items()}
        found: RolePreview = self._ask("GET", "role", messages.ROLE_PREVIEW, **query)
        return found

    def change_role(self, order: RoleOrder, listen: Listener, cancel: Cancellation) -> RoleReport:
        found: RoleReport = self._work("role", order, messages.ROLE_REPORT, listen, cancel)
        return found

    def history(self, limit: int) -> tuple[HistoryEntry, ...]:
        found: tuple[HistoryEntry, ...] = self._ask("GET", "history", messages.HISTORY, limit=limit)
        return found

    def pause(self, job: str) -> None:
        self._ask("POST", "pause", messages.DONE, job=job)

    def resume(self, job: str) -> None:
        self._ask("POST", "resume", messages.DONE, job=job)

    def check(self) -> tuple[Finding, ...]:
        found: tuple[Finding, ...] = self._ask("GET", "check", messages.FINDINGS)
        return found

    def _ask(self, method: str, path: str, adapter: TypeAdapter[Any], **query: str | int | None) -> Any:
        params = {key: value for key, value in query.items() if value is not None}
        with self._told_well(self._timeouts.answer), self._http.stream(method, path, params=params) as response:
            body = _read_all(response)
            _check(response, body)
            return messages.read_json(adapter, body)

    def _work(self, path: str, order: Any, adapter: TypeAdapter[Any], listen: Listener, cancel: Cancellation) -> Any:
        cancel.check()
        timeout = httpx.Timeout(self._timeouts.silence, connect=self._timeouts.connect)
        try:
            with (
                self._told_well(self._timeouts.silence),
                self._http.stream(
                    "POST", path, json=pydantic_core.to_jsonable_python(order), timeout=timeout
                ) as response,
                cancel.unblock(lambda: _cut(response)),
            ):
                if response.status_code != httpx.codes.OK:
                    _check(response, _read_all(response))
                return self._follow(response, adapter, listen)
        except (ConnectionLost, DeadlineExceeded):
            cancel.check()  # it was us who cut it
            raise

    def _follow(self, response: httpx.Response, adapter: TypeAdapter[Any], listen: Listener) -> Any:
        for line in _lines(response):
            event = Event.read(line)
            if event.kind == "result":
                return messages.read(adapter, event.value)
            if event.kind == "error":
                failure: Failure = messages.read(messages.FAILURE, event.value)
                raise failure.rebuild()
            happening = event.happening()
            if happening is not None:
                listen(happening)
        raise ConnectionLost("the daemon ended before the work was done", hint=_LOG_HINT)

    @contextmanager
    def _told_well(self, seconds: float) -> Iterator[None]:
        """Errors of the HTTP library as errors of ours."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _unreachable(self._path, error) from error
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(
                f"the daemon on {self._path} did not answer within {seconds:g} s", hint=_LOG_HINT
            ) from error
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise ConnectionLost(f"the connection to the daemon ended: {error}", hint=_LOG_HINT) from error


def _read_all(response: httpx.Response) -> bytes:
    found = bytearray()
    for part in response.iter_bytes():
        found += part
        _check_size(len(found))
    return bytes(found)


def _lines(response: httpx.Response) -> Iterator[bytes]:
    rest = bytearray()
    for part in response.iter_bytes():
        begin = 0
        while (end := part.find(b"\n", begin)) >= 0:
            rest += part[begin:end]
            yield bytes(rest)
            rest.clear()
            begin = end + 1
        rest += part[begin:]
        _check_size(len(rest))


def _check_size(size: int) -> None:
    if size > MAX_ANSWER:
        raise ProtocolError(f"the daemon's answer is longer than {MAX_ANSWER} bytes", hint="ask for less at once")


def _check(response: httpx.Response, body: bytes) -> None:
    """Raise the error that an answer tells."""
    if response.status_code == httpx.codes.OK:
        return
    try:
        failure: Failure = messages.read_json(messages.FAILURE, body)
    except ProtocolError:
        raise ConnectionLost(
            f"the daemon answered with HTTP status {response.status_code}: {body[:80].decode(errors='replace')}",
            hint=f"try again when fewer ask it; {_LOG_HINT}",
        ) from None
    raise failure.rebuild()


def _cut(response: httpx.Response) -> None:
    """End a stream from another thread: closing a file descriptor would not wake up who reads from it."""
    stream = response.extensions.get("network_stream")
    connection = stream.get_extra_info("socket") if stream is not None else None
    if isinstance(connection, socket.socket):
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended by itself
