"""The HTTP API and its client over a real Unix socket: the client must be the same as the Control behind it."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator import errors
from replicator.cancellation import Cancellation
from replicator.client import SOCKET_NAME, DaemonClient, Timeouts, daemon_answers
from replicator.control import (
    Finding,
    Happening,
    HistoryEntry,
    Note,
    Orphan,
    OrphanReport,
    PlannedReplica,
    PruneReport,
    Restored,
    ResyncPreview,
    RunReport,
    SideSnapshots,
    Status,
)
from replicator.errors import Problem
from replicator.model import Lineage, Progress, Role, Version
from replicator.verification import Resync, Verification
from replicator.web.api import make_api
from replicator.web.messages import NDJSON, Failure
from replicator.web.server import HttpServer
from replicator.web.streaming import MAX_WAITING, Works
from tests.support import values
from tests.support.control import FakeControl

NOW = datetime(2026, 11, 20, 8, 0, 0, 123456, UTC)
STATUS = Status("prox1", "0.1.0", True, NOW, ())
METRICS = b"# HELP replicator_build_info Version.\nreplicator_build_info 1\n"
PATIENCE = 20.0
ORPHAN = OrphanReport(
    Orphan("vms", "images:old", "prox2:backup", "backup:prox1/old"),
    Lineage("6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.REPLICA, 1),
    5,
    (Version("snap", "guid", NOW, 1),),
)

ANSWERS: dict[str, Any] = {
    "status": Status,
    "plan": tuple[PlannedReplica, ...],
    "sync": tuple[RunReport, ...],
    "preview_resync": tuple[ResyncPreview, ...],
    "resync": tuple[Resync, ...],
    "verify": tuple[Verification, ...],
    "snapshots": tuple[SideSnapshots, ...],
    "prune": tuple[PruneReport, ...],
    "orphans": tuple[OrphanReport, ...],
    "remove_orphans": tuple[OrphanReport, ...],
    "restore": Restored,
    "history": tuple[HistoryEntry, ...],
    "check": tuple[Finding, ...],
    "pause": type(None),
    "resume": type(None),
}
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "status": (),
    "plan": ("vms",),
    "sync": ("vms", "images:vm-100", "prox2:backup"),
    "preview_resync": ("images:ü/disk 1&x=%2F", None, True),
    "resync": ("images:vm-100", "prox2:backup", True),
    "verify": ("images:vm-100", None, "snap", True, True),
    "snapshots": ("images:vm-100",),
    "prune": ("vms", True),
    "orphans": ("vms",),
    "remove_orphans": ("vms", (ORPHAN,)),
    "restore": ("images:vm-100@snap", "images:new"),
    "history": (17,),
    "check": (),
    "pause": ("vms",),
    "resume": ("vms",),
}
LONG = ("sync", "resync", "verify", "restore")


class Stage:
    """A server over a fake Control that a test can change, and a client."""

    def __init__(self, folder: Path) -> None:
        self.control = FakeControl()
        self.path = folder / SOCKET_NAME
        self.app = make_api(self.control, metrics=lambda: METRICS)
        self.server = HttpServer(self.app, unix=self.path)
        self.server.start()
        self.client = DaemonClient(self.path)

    def set(self, **changes: Any) -> None:
        fresh = FakeControl(**changes)
        vars(self.control).update(vars(fresh))

    def call(self, name: str, listen: Any = None, cancel: Cancellation | None = None) -> Any:
        args = ARGUMENTS[name]
        if name in LONG:
            args = (*args, listen or (lambda _: None), cancel or Cancellation())
        return getattr(self.client, name)(*args)

    def close(self) -> None:
        self.client.close()
        self.server.stop(PATIENCE)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("api"))
    yield stage
    stage.close()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.close()


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_every_answer_is_the_same_through_the_socket(shared: Stage, name: str) -> None:
    @given(values.of(ANSWERS[name]))
    def same(answer: Any) -> None:
        shared.set(answers={name: answer})
        assert shared.call(name) == answer
        assert shared.control.calls == [(name, *ARGUMENTS[name])]

    same()


def test_nothing_of_the_interface_is_missing() -> None:
    from replicator.control import Control

    methods = {name for name in vars(Control) if not name.startswith("_")}
    assert methods == set(ANSWERS) == set(ARGUMENTS)


@given(data=st.data())
def test_happenings_arrive_as_they_were_told(shared: Stage, data: st.DataObject) -> None:
    told = data.draw(st.lists(values.of(Happening), max_size=6))
    shared.set(happenings=tuple(told), answers={"sync": ()})
    heard: list[Happening] = []
    shared.call("sync", heard.append)
    # Of each transfer's progress only the newest must arrive; all else comes in order.
    assert [h for h in heard if not isinstance(h, Progress)] == [h for h in told if not isinstance(h, Progress)]
    newest = {(h.volume, h.target, h.step): h for h in told if isinstance(h, Progress)}
    assert {(h.volume, h.target, h.step): h for h in heard if isinstance(h, Progress)} == newest


def _every_error() -> list[errors.ReplicatorError]:
    made = []
    for cls in errors.error_classes().values():
        if cls in (errors.ReplicatorError,):
            continue
        made.append(cls("the thing, the cause", hint="the remedy"))
    return made


@pytest.mark.parametrize("error", _every_error(), ids=lambda error: error.code)
@pytest.mark.parametrize("name", ["status", "pause", "sync"])
def test_errors_keep_their_type_hint_and_exit_code(shared: Stage, name: str, error: errors.ReplicatorError) -> None:
    shared.set(answers={name: error})
    with pytest.raises(type(error)) as raised:
        shared.call(name)
    assert type(raised.value) is type(error)
    assert (str(raised.value), raised.value.hint) == ("the thing, the cause", "the remedy")
    assert raised.value.exit_code == error.exit_code


@pytest.mark.parametrize("name", ["status", "resync"])
def test_problems_and_conflict_kinds_come_along(shared: Stage, name: str) -> None:
    problems = (Problem("replicator.toml", "job.a.keep", "is wrong", "write last=3"), Problem("f", "", "m", ""))
    shared.set(answers={name: errors.ConfigError("two problems", hint="h", problems=problems)})
    with pytest.raises(errors.ConfigError) as config:
        shared.call(name)
    assert config.value.problems == problems
    shared.set(answers={name: errors.ConflictError("diverged", hint="h", kind="diverged")})
    with pytest.raises(errors.ConflictError) as conflict:
        shared.call(name)
    assert conflict.value.kind == "diverged"


@pytest.mark.parametrize("name", ["status", "verify"])
def test_a_mistake_in_the_program_is_told_without_a_traceback(shared: Stage, name: str) -> None:
    shared.set(answers={name: KeyError("oops")})
    with pytest.raises(errors.ReplicatorError, match=r"internal error: KeyError: 'oops'") as raised:
        shared.call(name)
    assert "log" in raised.value.hint
    assert raised.value.exit_code == 1


@pytest.mark.parametrize("name", LONG)
def test_cancelling_closes_the_connection_and_stops_the_work(shared: Stage, name: str) -> None:
    shared.set(endless=True)
    cancel = Cancellation()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(shared.call, name, None, cancel)
        assert shared.control.started.wait(PATIENCE)
        cancel.cancel()
        with pytest.raises(errors.Cancelled):
            future.result(PATIENCE)
    assert shared.control.cancelled.wait(PATIENCE)


def test_a_client_that_goes_away_stops_the_work(shared: Stage) -> None:
    shared.set(endless=True, happenings=(Note("begun"),))
    body = json.dumps({"job": "vms"}).encode()
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(shared.path))
        raw.sendall(
            b"POST /api/v1/sync HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert shared.control.started.wait(PATIENCE)
        assert not shared.control.cancelled.is_set()
    assert shared.control.cancelled.wait(PATIENCE)


def test_work_that_was_cancelled_before_never_begins(shared: Stage) -> None:
    shared.set()
    cancel = Cancellation()
    cancel.cancel()
    with pytest.raises(errors.Cancelled):
        shared.call("sync", None, cancel)
    assert shared.control.calls == []


def test_stopping_the_server_ends_work_at_a_resumable_point_and_says_so(stage: Stage) -> None:
    stage.set(endless=True)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(stage.call, "sync")
        assert stage.control.started.wait(PATIENCE)
        stage.server.stop(PATIENCE)
        with pytest.raises(errors.Cancelled, match="stopping") as raised:
            future.result(PATIENCE)
    assert "continues" in raised.value.hint
    assert stage.control.cancelled.is_set()
    assert not stage.path.exists()
    with pytest.raises(errors.DaemonUnreachable):
        stage.client.status()


def test_silence_is_filled_with_heartbeats_and_ends_with_the_result(shared: Stage) -> None:
    shared.set(endless=True)
    with (
        httpx.Client(transport=httpx.HTTPTransport(uds=str(shared.path)), timeout=PATIENCE) as http,
        http.stream("POST", "http://x/api/v1/sync", json={"job": "vms"}) as response,
    ):
        assert response.headers["content-type"] == NDJSON
        first = next(response.iter_lines())
    assert json.loads(first) == {"kind": "heartbeat"}


def test_a_peer_that_never_answers_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "mute.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        client = DaemonClient(path, timeouts=Timeouts(1.0, 0.2, 0.2))
        with pytest.raises(errors.DeadlineExceeded):
            client.status()
        with pytest.raises(errors.DeadlineExceeded):
            client.sync("vms", None, None, lambda _: None, Cancellation())


@pytest.mark.parametrize(
    "answer",
    [b"{}", b"not json", b'{"kind":7}\n', b'{"kind":"result","value":{"a":1}}\n', b'{"kind":"progress","value":1}\n'],
)
def test_an_answer_that_cannot_be_read_is_a_protocol_error(tmp_path: Path, answer: bytes) -> None:
    path = tmp_path / "odd.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                body = answer + b"\n"
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(errors.ProtocolError):
            DaemonClient(path).sync("vms", None, None, lambda _: None, Cancellation())
        thread.join(PATIENCE)


def test_an_end_in_the_middle_is_a_lost_connection(tmp_path: Path) -> None:
    path = tmp_path / "short.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            for answer in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        client = DaemonClient(path)
        for _ in range(2):
            with pytest.raises(errors.ConnectionLost):
                client.sync("vms", None, None, lambda _: None, Cancellation())
        thread.join(PATIENCE)


def test_nobody_there(tmp_path: Path) -> None:
    path = tmp_path / SOCKET_NAME
    assert not daemon_answers(path)
    with pytest.raises(errors.DaemonUnreachable) as raised:
        DaemonClient(path).status()
    assert "serve" in raised.value.hint
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert not daemon_answers(path)
    assert not daemon_answers(tmp_path / ("x" * 120))


def test_the_socket_is_for_its_owner_only_and_goes_away(tmp_path: Path) -> None:
    path = tmp_path / SOCKET_NAME
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    before = os.umask(0)
    try:
        server = HttpServer(make_api(FakeControl(), metrics=lambda: METRICS), unix=path)
        server.start()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert daemon_answers(path)
    other = HttpServer(make_api(FakeControl(), metrics=lambda: METRICS), unix=path)
    with pytest.raises(errors.TransportError, match="another daemon") as raised:
        other.start()
    assert "state_dir" in raised.value.hint
    assert daemon_answers(path)
    server.stop(PATIENCE)
    assert not path.exists()
    server.stop(PATIENCE)


def test_what_cannot_be_listened_on_is_told_with_its_remedy(tmp_path: Path) -> None:
    app = make_api(FakeControl(), metrics=lambda: METRICS)
    (tmp_path / "file").write_text("data")
    for path, part in (
        (tmp_path / "file", "no socket"),
        (tmp_path / ("x" * 120), "longer than"),
        (tmp_path / "missing" / "s", "cannot make"),
    ):
        with pytest.raises(errors.TransportError, match=part) as raised:
            HttpServer(app, unix=path).start()
        assert raised.value.hint
    assert (tmp_path / "file").read_text() == "data"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(errors.TransportError, match="in use") as raised:
            HttpServer(app, tcp=taken.getsockname()).start()
        assert "http" in raised.value.hint


def test_the_tcp_listener_only_reads() -> None:
    control = FakeControl(answers={"status": STATUS})
    server = HttpServer(make_api(control, metrics=lambda: METRICS, read_only=True), tcp=("127.0.0.1", 0))
    server.start()
    try:
        with httpx.Client(base_url=f"http://{server.address}", timeout=PATIENCE) as http:
            assert http.get("/api/v1/health").json()["status"] == "ok"
            assert http.get("/api/v1/status").json()["node"] == "prox1"
            metrics = http.get("/metrics")
            assert metrics.content == METRICS
            assert metrics.headers["content-type"].startswith("text/plain; version=")
            paths = http.get("/api/v1/openapi.json").json()["paths"]
            assert set(paths) == {"/metrics", "/api/v1/health", "/api/v1/status"}
            assert all(set(methods) == {"get"} for methods in paths.values())
            for path in ("sync", "resync", "verify", "prune", "restore", "pause", "resume"):
                assert http.post(f"/api/v1/{path}?job=vms", json={"job": "vms"}).status_code == 404
            assert http.get("/docs").status_code == 404
    finally:
        server.stop(PATIENCE)
    assert [call[0] for call in control.calls] == ["status"]


def test_who_connects_and_asks_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicator.web.server.REQUEST_SECONDS", 0.2)
    server = HttpServer(make_api(FakeControl(), metrics=lambda: METRICS, read_only=True), tcp=("127.0.0.1", 0))
    server.start()
    try:
        host, _, port = server.address.rpartition(":")
        for begin in (b"", b"GET /metrics HT", b"GET /metrics HTTP/1.1\r\nHost: x\r\n"):
            with socket.create_connection((host, int(port)), timeout=PATIENCE) as silent:
                silent.sendall(begin)
                assert silent.recv(1) == b""
    finally:
        server.stop(PATIENCE)


@pytest.mark.parametrize("status", [b"503 Service Unavailable", b"500 x"])
def test_a_refusal_without_an_error_of_ours_is_told(tmp_path: Path, status: bytes) -> None:
    path = tmp_path / "busy.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 %s\r\nContent-Length: 8\r\n\r\ntoo busy" % status)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(errors.ConnectionLost, match="too busy"):
            DaemonClient(path).status()
        thread.join(PATIENCE)


def test_requests_that_are_wrong_are_told_so(shared: Stage) -> None:
    shared.set(answers={"sync": ()})
    with httpx.Client(
        transport=httpx.HTTPTransport(uds=str(shared.path)), base_url="http://x/api/v1", timeout=PATIENCE
    ) as http:
        for response, status in (
            (http.post("/sync", json={}), 422),
            (http.post("/sync", content=b"{"), 422),
            (http.get("/snapshots"), 422),
            (http.get("/history?limit=0"), 422),
            (http.get("/snapshots", params={"volume": "x" * 5000}), 422),
            (http.get("/nothing"), 404),
            (http.get("/sync"), 405),
        ):
            assert response.status_code == status
            failure = Failure(**response.json())
            assert failure.code == "usage"
            assert failure.message
            assert failure.hint
    assert shared.control.calls == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.NoSuchVolume("x"), 404),
        (errors.ConflictError("x"), 409),
        (errors.UsageError("x"), 400),
        (errors.PeerUnreachable("x"), 502),
        (errors.StorageUnavailable("x"), 503),
        (errors.DeadlineExceeded("x"), 504),
        (errors.NoSpace("x"), 507),
        (errors.IdentityError("x"), 500),
    ],
)
def test_errors_have_a_fitting_status(shared: Stage, error: errors.ReplicatorError, status: int) -> None:
    shared.set(answers={"snapshots": error})
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(shared.path)), timeout=PATIENCE) as http:
        assert http.get("http://x/api/v1/snapshots?volume=a:b").status_code == status


def test_the_document_describes_every_path(shared: Stage) -> None:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(shared.path)), timeout=PATIENCE) as http:
        document = http.get("http://x/api/v1/openapi.json").json()
    names = {path.removeprefix("/api/v1/") for path in document["paths"]}
    assert names == {
        "/metrics", "health", "status", "plan", "resync", "snapshots", "history", "check", "pause", "resume",
        "sync", "verify", "prune", "orphans", "remove-orphans", "restore",
    }  # fmt: skip
    assert {"Status", "ReplicaStatus", "Failure", "PlannedReplica"} <= set(document["components"]["schemas"])
    stream = document["paths"]["/api/v1/sync"]["post"]["responses"]["200"]["content"]
    assert list(stream) == [NDJSON]


def test_a_slow_reader_costs_bounded_memory() -> None:
    import asyncio

    from replicator.web.streaming import Mailbox

    async def fill() -> bytes:
        mailbox = Mailbox(asyncio.get_running_loop())
        for number in range(MAX_WAITING + 500):
            mailbox.put(Note("x"))
            mailbox.put(Progress("a:b", "c:d", "step", number, None, 0, 0.0, NOW))
        return mailbox.take()[0]

    lines = asyncio.run(fill()).splitlines()
    assert len(lines) == MAX_WAITING
    progress = [line for line in map(json.loads, lines) if line["kind"] == "progress"]
    assert [line["value"]["done"] for line in progress] == [MAX_WAITING + 499]


def test_too_much_work_at_once_is_refused() -> None:
    works = Works()
    begun = [works.begin() for _ in range(32)]
    with pytest.raises(errors.VolumeBusy):
        works.begin()
    works.end(begun[0])
    works.begin()
    works.stop()
    assert all(cancel.cancelled for cancel in begun[1:])
    with pytest.raises(errors.Cancelled):
        works.begin()
