"""Streams and requests between two nodes over real connections: what arrives, what is refused, how it ends."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from backends import walking
from replicator import manifest
from replicator.cancellation import Cancellation
from replicator.endpoint import (
    DigestRequest,
    Endpoint,
    ManifestRequest,
    ReceiveRequest,
    Scrub,
    ScrubRequest,
    SendRequest,
    SnapshotRequest,
)
from replicator.errors import (
    Cancelled,
    ChecksumMismatch,
    ConnectionLost,
    DeadlineExceeded,
    NoSpace,
    NotAReplica,
    ProtocolError,
    ReplicatorError,
    VolumeChanged,
)
from replicator.local import LocalEndpoint
from replicator.model import Lineage, Role, StreamKind, Version, VolumeId
from replicator.streams import Chunk, ChunkStream, NativeChunk, Stream
from tests.support.cases import MemoryCase
from tests.support.transport import HOST, LOOPBACK, SHORT, Peers, make_cluster, pool_to, remote_endpoint, serving
from transport import certificates, checksum, messages
from transport.authorization import PeerRights
from transport.connection import Connection
from transport.frames import FrameType, encode_header
from transport.payloads import ClockFilter
from transport.pool import Dialer, Pool
from transport.remote import RemoteEndpoint
from transport.wirestream import StreamBinding, StreamSender

MIB = 1024 * 1024
KEY = "5a" * 32
BOTH = PeerRights(frozenset({"store"}), frozenset({"store"}))
SOURCE, TARGET = VolumeId("store", "vm"), VolumeId("store", "two/vm")
LINEAGE = Lineage("6f0c9a52-1111-4222-8333-444455556666", Role.PRIMARY, 1)
VERSION = Version("v1", "guid1", certificates.utc_now(), 1, size=0)


@dataclass
class Sink:
    """An endpoint that takes native streams and lets a test look and interfere."""

    node: str = "one"
    got: bytearray = field(default_factory=bytearray)
    errors: list[BaseException] = field(default_factory=list)
    began: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    on_chunk: Callable[[int], None] = lambda _: None
    read: bool = True

    def receive(self, request: ReceiveRequest, stream: Stream, _cancel: Cancellation) -> Version:
        try:
            for chunk in stream if self.read else ():
                self.began.set()
                self.got += bytes(chunk.data)
                chunk.release()
                self.on_chunk(len(self.got))
        except BaseException as error:
            self.errors.append(error)
            raise
        finally:
            self.ended.set()
        return request.to

    def close(self) -> None:
        pass


def native(request_kind: StreamKind = StreamKind.NATIVE) -> ReceiveRequest:
    return ReceiveRequest(TARGET, LINEAGE, None, VERSION, KEY, kind=request_kind)


def stream_of(pieces: Iterator[bytes]) -> ChunkStream:
    def chunks() -> Iterator[Chunk]:
        for piece in pieces:
            yield NativeChunk(piece)

    return ChunkStream(StreamKind.NATIVE, chunks())


def once(event: threading.Event, then: Callable[[], object]) -> None:
    """Do something in a thread as soon as an event has come."""

    def run() -> None:
        if event.wait(10):
            then()

    threading.Thread(target=run, daemon=True).start()


@contextmanager
def to_sink(folder: Path, sink: Sink, **options: Any) -> Iterator[RemoteEndpoint]:
    with remote_endpoint(folder, cast(Endpoint, sink), BOTH, **options) as remote:
        yield remote


# -- whole transfers


def test_a_volume_goes_there_and_comes_back_equal(tmp_path: Path) -> None:
    case = MemoryCase()
    data = random.Random(1).randbytes(3 * MIB) + bytes(2 * MIB) + b"end" * 1000
    case.create("vm", data)
    with remote_endpoint(tmp_path, LocalEndpoint("one", {"store": case.backend}), BOTH) as remote:
        lineage = remote.ensure_primary(SOURCE)
        first = remote.snapshot(SnapshotRequest((SOURCE,), "v1"))[0].get()
        case.write("vm", MIB, b"changed")
        second = remote.snapshot(SnapshotRequest((SOURCE,), "v2"))[0].get()
        base = None
        for version in (first, second):
            send = SendRequest(SOURCE, base, version.ref, KEY, lineage=lineage)
            with remote.send(send, Cancellation()) as stream:
                request = ReceiveRequest(TARGET, lineage, base, version, KEY, hold="replicator:j:one:store")
                assert remote.receive(request, stream, Cancellation()).guid == version.guid
                assert stream.wire_bytes > 0
            base = version.ref
        state = remote.state(TARGET)
        assert state is not None
        assert [v.guid for v in state.versions] == [first.guid, second.guid]
        assert case.read_snapshot("two/vm", first) == data
        assert case.read_snapshot("two/vm", second) == case.read("vm")
        digests = [
            b"".join(b.digests for b in remote.digests(DigestRequest(v, second.ref, KEY), Cancellation()))
            for v in (SOURCE, TARGET)
        ]
        assert digests[0] == digests[1] != b""


class Inspected:
    """A node whose storage has a filesystem and a pool."""

    node = "one"
    pool = Scrub("tank", True, 1, 2, datetime(2026, 11, 20, tzinfo=UTC), 2**63, 3, ("tank/vm@a:/x",), 4)

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.scrubs: list[ScrubRequest] = []

    def manifest(self, request: ManifestRequest, cancel: Cancellation) -> Stream:
        fd = os.open(self._folder, os.O_RDONLY)
        walk = walking.walk(fd, bytes.fromhex(request.key), checksum, cancel)
        return ChunkStream(StreamKind.NATIVE, manifest.chunks(walk), estimate=5, on_close=lambda: os.close(fd))

    def scrub(self, request: ScrubRequest) -> Scrub:
        self.scrubs.append(request)
        return self.pool


def test_a_manifest_and_a_scrub_arrive_as_they_were(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(20_000):
        (tree / f"a rather long name of a file, so that it takes several frames {number}").touch()
    node = Inspected(tree)
    request = ManifestRequest(SOURCE, VERSION.ref, KEY)
    with remote_endpoint(tmp_path, cast(Endpoint, node), BOTH) as remote:
        with remote.manifest(request, Cancellation()) as stream, node.manifest(request, Cancellation()) as near:
            assert stream.estimate == 5
            assert list(manifest.records(stream)) == list(manifest.records(near))
        assert remote.scrub(ScrubRequest(SOURCE, start=True)) == node.pool
        assert node.scrubs == [ScrubRequest(SOURCE, start=True)]


@pytest.mark.parametrize("compressible", [True, False])
def test_native_bytes_arrive_as_they_were(tmp_path: Path, compressible: bool) -> None:
    rng = random.Random(2)
    pieces = [b"text " * (MIB // 5) if compressible else rng.randbytes(MIB) for _ in range(8)] + [b"", b"x"]
    sink = Sink()
    with to_sink(tmp_path, sink) as remote:
        remote._rate_limit = lambda: 1000.0  # so slow that compressing gains whenever it can
        stream = stream_of(iter(pieces))
        assert remote.receive(native(), stream, Cancellation()) == VERSION
    assert bytes(sink.got) == b"".join(pieces)
    plain = sum(map(len, pieces))
    assert stream.wire_bytes < plain / 2 if compressible else stream.wire_bytes >= plain


def test_an_empty_stream_is_a_stream(tmp_path: Path) -> None:
    with to_sink(tmp_path, Sink()) as remote:
        assert remote.receive(native(), stream_of(iter(())), Cancellation()) == VERSION


def test_a_version_that_is_there_costs_no_transfer(tmp_path: Path) -> None:
    def never() -> Iterator[bytes]:
        yield pytest.fail("the stream was read")

    with to_sink(tmp_path, Sink(read=False)) as remote:
        stream = stream_of(never())
        assert remote.receive(native(), stream, Cancellation()) == VERSION
        assert stream.wire_bytes == 0


def test_a_refusal_comes_before_the_first_byte(tmp_path: Path) -> None:
    case = MemoryCase()
    case.create("two/vm", b"mine")
    with remote_endpoint(tmp_path, LocalEndpoint("one", {"store": case.backend}), BOTH) as remote:
        stream = stream_of(iter([b"x"]))
        with pytest.raises(NotAReplica) as raised:
            remote.receive(native(StreamKind.BLOCKS), stream, Cancellation())
        assert "resync" in raised.value.hint
        assert stream.wire_bytes == 0


def test_connections_are_used_again_and_not_after_an_error(tmp_path: Path) -> None:
    case = MemoryCase()
    case.create("vm", b"x")
    with remote_endpoint(tmp_path, LocalEndpoint("one", {"store": case.backend}), BOTH) as remote:
        dialled: list[Connection] = []
        dial = remote._pool._dial

        def count() -> Connection:
            dialled.append(dial())
            return dialled[-1]

        remote._pool._dial = count
        for _ in range(5):
            remote.state(SOURCE)
        assert len(dialled) == 1
        with pytest.raises(ReplicatorError):
            remote.estimate(SOURCE, None, VERSION.ref)
        remote.state(SOURCE)
        assert len(dialled) == 2


# -- failures in the middle


def endless() -> Iterator[bytes]:
    while True:
        yield bytes(MIB)


def test_the_targets_error_reaches_the_source(tmp_path: Path) -> None:
    def full(size: int) -> None:
        if size >= 8 * MIB:
            raise NoSpace("storage store is full", hint="make room")

    with to_sink(tmp_path, Sink(on_chunk=full)) as remote, pytest.raises(NoSpace, match="is full") as raised:
        remote.receive(native(), stream_of(endless()), Cancellation())
    assert raised.value.hint == "make room"


def test_the_sources_error_reaches_the_target(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield bytes(MIB)
        raise VolumeChanged("the image was truncated", hint="again")

    sink = Sink()
    with to_sink(tmp_path, sink) as remote:
        with pytest.raises(VolumeChanged):
            remote.receive(native(), stream_of(broken()), Cancellation())
        assert sink.ended.wait(10)
    assert [type(error) for error in sink.errors] == [VolumeChanged]


def test_cancelling_a_push_ends_both_sides_at_once(tmp_path: Path) -> None:
    cancel, sink = Cancellation(), Sink()
    with to_sink(tmp_path, sink) as remote:
        once(sink.began, cancel.cancel)
        with pytest.raises(Cancelled):
            remote.receive(native(), stream_of(endless()), cancel)
        assert sink.ended.wait(10)
    assert all(isinstance(error, ReplicatorError) and error.retryable for error in sink.errors)
    assert sink.errors


def test_cancelling_unblocks_a_source_that_waits_for_a_stuck_target(tmp_path: Path) -> None:
    cancel, stuck = Cancellation(), threading.Event()

    def wait(_size: int) -> None:
        stuck.wait(20)

    sink = Sink(on_chunk=wait)
    with to_sink(tmp_path, sink) as remote:
        threading.Thread(
            target=lambda: (sink.began.wait(10), cancel.cancel(DeadlineExceeded("it stood still")))  # type: ignore[func-returns-value]
        ).start()
        with pytest.raises(DeadlineExceeded, match="stood still"):
            remote.receive(native(), stream_of(endless()), cancel)
        stuck.set()
        assert sink.ended.wait(10)


def test_leaving_a_pull_in_the_middle(tmp_path: Path) -> None:
    case = MemoryCase()
    case.create("vm", random.Random(3).randbytes(8 * MIB))
    with remote_endpoint(tmp_path, LocalEndpoint("one", {"store": case.backend}), BOTH) as remote:
        version = remote.snapshot(SnapshotRequest((SOURCE,), "v1"))[0].get()
        with remote.send(SendRequest(SOURCE, None, version.ref, KEY), Cancellation()) as stream:
            next(iter(stream))
        digests = remote.digests(DigestRequest(SOURCE, version.ref, KEY), Cancellation())
        next(digests)
        digests.close()  # type: ignore[attr-defined]
        assert remote.state(SOURCE) is not None


def test_cancelling_a_pull(tmp_path: Path) -> None:
    case = MemoryCase()
    case.create("vm", random.Random(3).randbytes(8 * MIB))
    with remote_endpoint(tmp_path, LocalEndpoint("one", {"store": case.backend}), BOTH) as remote:
        version = remote.snapshot(SnapshotRequest((SOURCE,), "v1"))[0].get()
        cancel = Cancellation()
        with remote.send(SendRequest(SOURCE, None, version.ref, KEY), cancel) as stream:
            chunks = iter(stream)
            next(chunks)
            cancel.cancel()
            with pytest.raises(Cancelled):
                list(chunks)


def test_a_server_that_closes_ends_transfers_with_a_retryable_error(tmp_path: Path) -> None:
    cluster, sink = make_cluster(tmp_path), Sink()
    peers = Peers(cast(Endpoint, sink), {"two": BOTH})
    with serving(cluster.one, peers) as server:
        remote = RemoteEndpoint("one", pool_to(server, cluster.two, "one"))
        once(sink.began, server.close)
        with pytest.raises(ReplicatorError) as raised:
            remote.receive(native(), stream_of(endless()), Cancellation())
        assert raised.value.retryable
        assert sink.ended.wait(10)


def test_an_idle_connection_that_ended_is_replaced_unnoticed(tmp_path: Path) -> None:
    case = MemoryCase()
    case.create("vm", b"x")
    endpoint = LocalEndpoint("one", {"store": case.backend})
    with remote_endpoint(tmp_path, endpoint, BOTH, deadlines=replace(SHORT, idle=0.1)) as remote:
        remote.state(SOURCE)
        ((_, connection),) = remote._pool._idle
        assert connection._reader is not None
        connection._reader.join(10)
        assert remote.state(SOURCE) is not None


class _Proxy:
    """Passes bytes between a client and a server, and does to them what a bad network does."""

    def __init__(self, port: int, change: Callable[[bytes, int], bytes | None]) -> None:
        self._listener = socket.create_server((str(HOST), 0))
        self.port = int(self._listener.getsockname()[1])
        self._target, self._change = port, change
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection((str(HOST), self._target))
            threading.Thread(target=self._pump, args=(client, server, self._change), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, lambda data, _: data), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, change: Callable[[bytes, int], bytes | None]) -> None:
        passed = 0
        try:
            while data := source.recv(65536):
                changed = change(data, passed)
                passed += len(data)
                if changed is not None:
                    target.sendall(changed)
        except OSError:
            pass
        for sock in (source, target):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


@contextmanager
def through(folder: Path, sink: Sink, change: Callable[[bytes, int], bytes | None]) -> Iterator[RemoteEndpoint]:
    cluster = make_cluster(folder)
    deadlines = replace(SHORT, silence=1.0)
    with serving(cluster.one, Peers(cast(Endpoint, sink), {"two": BOTH}), deadlines=deadlines) as server:
        proxy = _Proxy(server.address[1], change)
        dialer = Dialer(cluster.two, "one", network=LOOPBACK, address=(HOST, proxy.port), deadlines=deadlines)
        remote = RemoteEndpoint("one", Pool(dialer), compress=False)
        try:
            yield remote
        finally:
            remote.close()
            proxy.close()


def test_a_bit_flipped_on_the_wire_is_never_stored(tmp_path: Path) -> None:
    def flip(data: bytes, passed: int) -> bytes:
        if passed <= 3 * MIB < passed + len(data):
            where = 3 * MIB - passed
            return data[:where] + bytes((data[where] ^ 1,)) + data[where + 1 :]
        return data

    sink = Sink()
    with through(tmp_path, sink, flip) as remote:
        with pytest.raises(ReplicatorError) as raised:
            remote.receive(native(), stream_of(bytes([i]) * MIB for i in range(16)), Cancellation())
        assert raised.value.retryable
        assert sink.ended.wait(10)
    assert len(sink.got) <= 3 * MIB
    assert bytes(sink.got) == b"".join(bytes([i]) * MIB for i in range(16))[: len(sink.got)]
    assert sink.errors


def test_a_network_that_falls_silent_is_noticed_by_both(tmp_path: Path) -> None:
    sink = Sink()
    with through(tmp_path, sink, lambda data, passed: data if passed < MIB else None) as remote:
        with pytest.raises(ConnectionLost, match=r"silent|lost|closed"):
            remote.receive(native(), stream_of(iter([bytes(MIB)] * 4)), Cancellation())
        assert sink.ended.wait(10)


# -- frames that TLS would not catch, because the peer itself sends them


@contextmanager
def pushing(folder: Path, sink: Sink) -> Iterator[tuple[Connection, bytes]]:
    """A connection on which a stream to ``sink`` has been opened, and the request's bytes."""
    with to_sink(folder, sink) as remote:
        connection, _ = remote._pool.take()
        raw = messages.encode_request(messages.Receive(native(), None))
        connection.send_message(FrameType.REQUEST, raw, stream=1)
        connection.join_message(connection.receive(10), FrameType.RESPONSE, 1, MIB)
        yield connection, raw
        remote._pool.drop(connection)


def binding(raw: bytes, **changes: Any) -> StreamBinding:
    return replace(StreamBinding(bytes.fromhex(KEY), "push", "native", raw), **changes)


def test_a_wrong_frame_checksum(tmp_path: Path) -> None:
    sink = Sink()
    with pushing(tmp_path, sink) as (connection, _):
        with pytest.raises(ChecksumMismatch):
            connection.send(FrameType.DATA, (b"data",), stream=1, plain=(4, 12345))
            connection.receive(10)
        assert sink.ended.wait(10)
    assert sink.got == b""
    assert [type(e) for e in sink.errors] == [ChecksumMismatch]


@pytest.mark.parametrize(
    "changes", [{"direction": "pull"}, {"kind": "blocks"}, {"key": bytes(32)}, {"request": b"another"}], ids=str
)
def test_a_stream_bound_to_something_else(tmp_path: Path, changes: dict[str, Any]) -> None:
    sink = Sink()
    with pushing(tmp_path, sink) as (connection, raw), pytest.raises(ChecksumMismatch, match="whole stream"):
        StreamSender(connection, 1, binding(raw, **changes), None).send_all(stream_of(iter([b"data"])))
        connection.receive(10)
    assert [type(e) for e in sink.errors] == [ChecksumMismatch]


def test_a_rightly_bound_stream_is_committed(tmp_path: Path) -> None:
    with pushing(tmp_path, Sink()) as (connection, raw):
        StreamSender(connection, 1, binding(raw), None).send_all(stream_of(iter([b"data"])))
        assert connection.receive(10).type is FrameType.COMMITTED


def test_a_dropped_frame(tmp_path: Path) -> None:
    sink = Sink()
    with pushing(tmp_path, sink) as (connection, raw):
        sender = StreamSender(connection, 1, binding(raw), None)
        sender._chain.add(FrameType.DATA, 4, b"lost")
        with pytest.raises(ProtocolError, match="the stream ended after 4 bytes in 1 frames, but 8 in 2"):
            sender.send_all(stream_of(iter([b"data"])))
            connection.receive(10)


def test_a_connection_that_ends_without_end(tmp_path: Path) -> None:
    sink = Sink()
    with pushing(tmp_path, sink) as (connection, _):
        connection.send(FrameType.DATA, (b"data",), stream=1)
        assert sink.began.wait(10)
        connection.close()
        assert sink.ended.wait(10)
    assert [type(e) for e in sink.errors] == [ConnectionLost]


def test_a_skipped_sequence_number(tmp_path: Path) -> None:
    sink = Sink()
    with pushing(tmp_path, sink) as (connection, _):
        connection._sequence += 1
        with pytest.raises(ProtocolError, match="was due"):
            connection.send(FrameType.DATA, (b"data",), stream=1)
            connection.receive(10)
    assert encode_header(FrameType.END, length=0, plain=0, crc=0)


# -- heartbeats


def test_heartbeats_tell_round_trip_and_clock_difference(tmp_path: Path) -> None:
    case = MemoryCase()
    case.create("vm", b"x")
    cluster = make_cluster(tmp_path)
    peers = Peers(LocalEndpoint("one", {"store": case.backend}), {"two": BOTH})
    with serving(cluster.one, peers) as server:
        remote = RemoteEndpoint("one", pool_to(server, cluster.two, "one"))
        assert remote.link() is None
        connection, _ = remote._pool.take()
        connection._wall_clock = lambda: time.time_ns() - 60_000_000_000  # this node's clock is a minute behind
        connection._clock_filter = ClockFilter(longest=10)
        until = time.monotonic() + 10
        while connection.link is None and time.monotonic() < until:
            connection.poll(0.05)
        link = remote.link()
        assert link is not None
        assert 0 <= link.round_trip < 5
        assert link.clock_difference == pytest.approx(60, abs=5)
        remote._pool.give(connection)
        remote.close()


def test_a_heartbeat_never_waits_for_a_peer_that_does_not_read(tmp_path: Path) -> None:
    asked = threading.Semaphore(0)

    def full() -> bool:
        asked.release()
        return False

    with to_sink(tmp_path, Sink()) as remote:
        connection, _ = remote._pool.take()
        connection._channel.writable = full  # type: ignore[method-assign]
        assert asked.acquire(timeout=10)
        sent = connection._channel.sent
        for _ in range(3):
            assert asked.acquire(timeout=10)
        assert connection._channel.sent == sent
        assert connection.usable
        remote._pool.give(connection)


def test_a_busy_storage_is_not_taken_for_a_dead_node(tmp_path: Path) -> None:
    """The target does nothing for longer than the silence that ends a connection, while the wire is full."""

    def busy(size: int) -> None:
        if size == MIB:
            threading.Event().wait(1.5)

    sink = Sink(on_chunk=busy)
    with to_sink(tmp_path, sink, deadlines=replace(SHORT, silence=0.6)) as remote:
        assert remote.receive(native(), stream_of(bytes(MIB) for _ in range(32)), Cancellation()) == VERSION
    assert len(sink.got) == 32 * MIB


def test_a_slow_source_is_not_taken_for_a_dead_node(tmp_path: Path) -> None:
    def slow() -> Iterator[bytes]:
        yield b"a"
        threading.Event().wait(1.5)
        yield b"b"

    sink = Sink()
    with to_sink(tmp_path, sink, deadlines=replace(SHORT, silence=0.6)) as remote:
        assert remote.receive(native(), stream_of(slow()), Cancellation()) == VERSION
    assert sink.got == b"ab"
