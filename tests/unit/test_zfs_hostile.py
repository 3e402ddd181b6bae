"""What a hostile peer may try: resume tokens of its own making, and streams that were not asked for."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.zfs import batches, replica
from backends.zfs.batches import Batch
from backends.zfs.commands import Finished, Process, SystemRunner
from backends.zfs.context import Context
from backends.zfs.library import CommandLibrary
from backends.zfs.listing import Listing
from backends.zfs.naming import DatasetNames
from backends.zfs.properties import StreamForm
from backends.zfs.sending import open_stream
from backends.zfs.stream_head import read_head
from backends.zfs.taking_over import Terms
from replicator.cancellation import Cancellation
from replicator.endpoint import ReceiveMode, ReceiveRequest, SendRequest
from replicator.errors import (
    ConnectionLost,
    InvalidName,
    NoSuchVolume,
    NotAReplica,
    ProtocolError,
    ReplicatorError,
    SnapshotExists,
    StaleResume,
    Unsupported,
)
from replicator.model import Lineage, ResumeState, Role, StreamKind, Version, VersionRef, VolumeId
from replicator.streams import CHUNK_SIZE, Chunk, ChunkStream, NativeChunk
from tests.support.blocks import make_version, pattern
from tests.support.zfs_records import RecordedRunner, Values, listing, make_head, make_token, row, shown

NAMES = DatasetNames("store", "tank/vm")
UUID = "6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00"


# -- resume tokens: zfs send -t takes all that it does from one


def continue_with(token: str, *, encryption: str, form: str, base: int | None) -> list[tuple[str, ...]]:
    """What zfs send is asked when a peer asks for tank/vm/a@two to be continued so."""
    pinned: dict[str, Any] = {
        "replicator__lineage": UUID, "replicator__role": "primary", "replicator__epoch": 1, "replicator__of": 1,
        "replicator__stream": form,
    }  # fmt: skip
    listed = (
        row("tank/vm/a", guid=1, encryption=encryption, **(pinned if form else {})),
        row("tank/vm/a@one", "snapshot", guid=2, createtxg=10, creation=1),
        row("tank/vm/a@two", "snapshot", guid=3, createtxg=20, creation=1),
    )
    runner = RecordedRunner({("zfs", "list"): listing(*listed), ("zfs", "send", "-n"): "size\t10\n"})
    context = Context(NAMES, runner, Listing(NAMES, runner), lambda: CommandLibrary("store", runner))
    resume = ResumeState(StreamKind.NATIVE, "3", "two", str(base) if base else None, 0, token)
    request = SendRequest(
        VolumeId("store", "a"), VersionRef("one", str(base)) if base else None, VersionRef("two", "3"), "00" * 32,
        resume=resume,
    )  # fmt: skip
    open_stream(context, request, Cancellation()).close()
    return [argv for argv in runner.asked if argv[1] == "send"]


def token(*more: Values, **values: int | str | bool | None) -> str:
    """A token for tank/vm/a@two."""
    given = {"object": 1, "offset": 0, "bytes": 0, "toguid": 3, "toname": "tank/vm/a@two", **values}
    return make_token(*more, **given)


RAW, PLAIN = {"compressok": True, "rawok": True}, {"compressok": True}
ENCRYPTED, NOT = "aes-256-gcm", "off"


@pytest.mark.parametrize(
    ("encryption", "form", "flags"),
    [
        (ENCRYPTED, "", RAW),
        (ENCRYPTED, "raw", RAW),
        (ENCRYPTED, "raw", RAW | {"largeblockok": True}),
        (ENCRYPTED, "plain", PLAIN),
        (NOT, "", PLAIN | {"embedok": True, "largeblockok": True}),
        (NOT, "raw", PLAIN),  # zfs send -w of what is not encrypted is no raw stream
    ],
)
@pytest.mark.parametrize("base", [None, 2])
def test_a_token_of_the_form_that_is_sent_is_continued(
    encryption: str, form: str, flags: dict[str, bool], base: int | None
) -> None:
    honest = token(**flags, **({"fromguid": base} if base else {}))
    asked = continue_with(honest, encryption=encryption, form=form, base=base)
    assert asked == [("zfs", "send", "-n", "-v", "-P", "-t", honest)]


@pytest.mark.parametrize(
    ("encryption", "form", "forged"),
    [
        (ENCRYPTED, "", token(**PLAIN)),  # the whole dataset, decrypted
        (ENCRYPTED, "raw", token(**PLAIN, embedok=True, largeblockok=True)),
        (ENCRYPTED, "plain", token(**RAW)),
        (NOT, "", token(**RAW)),
        (NOT, "", token()),
        (ENCRYPTED, "", token(**RAW, savedok=True)),  # what a receive has left of another one
        (ENCRYPTED, "", token(**RAW, savedok=None)),  # of whatever type: its presence counts
        (ENCRYPTED, "", token(**RAW, redact_snaps=1)),
        (ENCRYPTED, "", token(**RAW, book_redact_snaps=None)),
        (ENCRYPTED, "", token({"toguid": 4}, **RAW)),
        (ENCRYPTED, "", token(**RAW, toguid=4)),
        (ENCRYPTED, "", token(**RAW, fromguid=2)),
        (ENCRYPTED, "", token(**RAW, toname="tank/plain/copy@two")),  # the same snapshot, kept in another form
    ],
)
def test_a_token_of_another_form_or_source_is_not_continued(encryption: str, form: str, forged: str) -> None:
    with pytest.raises(StaleResume):
        continue_with(forged, encryption=encryption, form=form, base=None)


# -- batches: each stream of one has a zfs receive of its own, or none

REPLICA = "tank/vm/prox1/a"
RAW_FEATURE = 1 << 24


class Target(RecordedRunner):
    """A storage with a replica that has the snapshot one (guid 1). zfs receive takes what comes."""

    def __init__(self, folder: Path) -> None:
        super().__init__({("zfs", "set"): ""})
        self._folder = folder
        self.received: list[tuple[str, ...]] = []
        self.rows: list[Any] = []

    def arrived(self, number: int) -> bytes:
        return (self._folder / str(number)).read_bytes()

    def run(self, argv: Sequence[str], deadline: float) -> Finished:
        if argv[1] != "list":
            return super().run(argv, deadline)
        rows = [
            row("tank/vm", "filesystem", guid=99),
            row(
                REPLICA, guid=100, replicator__lineage=UUID, replicator__role="replica", replicator__epoch=3,
                replicator__of=100, replicator__stream="plain",
            ),
            row(f"{REPLICA}@one", "snapshot", guid=1, createtxg=1, creation=1),
            *self.rows,
        ]  # fmt: skip
        for number, received in enumerate(self.received):
            guid = read_head(self.arrived(number)).to_guid
            rows.append(row(received[-1], "snapshot", guid=guid, createtxg=number + 2, creation=1))
        return Finished(tuple(argv), 0, shown(rows, argv), "")

    def write_to(self, argv: Sequence[str]) -> Process:
        self.received.append(tuple(argv))
        script = f"cat > {self._folder}/{len(self.received) - 1}"
        return SystemRunner().write_to(("/bin/sh", "-c", script))


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target(tmp_path)


def head(guid: int, base: int, name: str = "", **features: Any) -> bytes:
    return make_head(guid, base, name=f"tank/source/of another name@{name or guid}", **features)


def framed(*streams: bytes) -> bytes:
    """A batch."""
    return b"".join(struct.pack("<I", len(data)) + data + bytes(4) for data in streams)


def portions(data: bytes, size: int = CHUNK_SIZE) -> Iterator[Chunk]:
    for start in range(0, len(data), size):
        yield NativeChunk(data[start : start + size])


def take(
    target: Target,
    data: bytes | Iterator[Chunk],
    *,
    to: int,
    portion: int = CHUNK_SIZE,
    accept: StreamForm | None = None,
    **more: Any,
) -> Version:
    """Receive a batch onto snapshot one."""
    context = Context(NAMES, target, Listing(NAMES, target), lambda: CommandLibrary("store", target))
    request = ReceiveRequest(
        VolumeId("store", "prox1/a"), Lineage(UUID, Role.PRIMARY, 3), VersionRef("one", "1"),
        replace(make_version("last", 1 << 20), guid=str(to)), "00" * 32, kind=StreamKind.NATIVE, intermediates=True,
    )  # fmt: skip
    stream = ChunkStream(StreamKind.NATIVE, portions(data, portion) if isinstance(data, bytes) else data)
    return replica.receive(context, replace(request, **more), stream, Cancellation(), Terms(accept))[0]


@pytest.mark.parametrize("portion", [CHUNK_SIZE, 100_000, 317, 5])
def test_each_snapshot_of_a_batch_is_received_by_itself(target: Target, portion: int) -> None:
    size = 3000 if portion < 1000 else 700_000
    sent = [head(2, 1, "two") + pattern(size), head(3, 2, "three 3"), head(4, 3, "four") + pattern(size)]
    assert take(target, framed(*sent), to=4, portion=portion).guid == "4"
    assert [argv[-1] for argv in target.received] == [f"{REPLICA}@two", f"{REPLICA}@three 3", f"{REPLICA}@last"]
    assert [target.arrived(number) for number in range(3)] == sent
    assert {argv[:-1] for argv in target.received} == {("zfs", "receive", "-s", "-u", "-o", "readonly=on")}


@pytest.mark.parametrize(
    ("second", "error"),
    [
        (head(3, 1), ProtocolError),  # not on what came before it
        (head(3, 0), ProtocolError),  # full: it would be another dataset
        (head(3, 7), ProtocolError),  # libzfs would look for snapshot 7 in the whole pool
        (head(3, 2, features=RAW_FEATURE), Unsupported),
        (head(3, 2, features=1 << 20), ProtocolError),
        (head(3, 2, features=1 << 21), ProtocolError),
        (head(3, 2, features=1 << 26), ProtocolError),
        (head(3, 2, form=2) + head(3, 2), ProtocolError),  # a package within
        (head(3, 2, form=0) + head(3, 2), ProtocolError),
        (head(3, 2, form=3) + head(3, 2), ProtocolError),
        (head(3, 2, "one"), SnapshotExists),
        (head(3, 2, "../../other/b"), InvalidName),
        (head(3, 2, "a/b@c"), InvalidName),
        (head(3, 2, "x" * 240), InvalidName),
        (make_head(3, 2, name="tank/source"), InvalidName),
        (b"", ProtocolError),
        (bytes(312), ProtocolError),
        (head(3, 2)[:311], ProtocolError),
    ],
)
def test_a_stream_that_does_not_belong_never_reaches_zfs_receive(
    target: Target, second: bytes, error: type[ReplicatorError]
) -> None:
    with pytest.raises(error):
        take(target, framed(head(2, 1), second, head(4, 3)), to=4)
    assert [argv[-1] for argv in target.received] == [f"{REPLICA}@2"]
    assert target.arrived(0) == head(2, 1)


@pytest.mark.parametrize("accept", StreamForm)
def test_what_is_accepted_holds_for_each_stream(target: Target, accept: StreamForm) -> None:
    features = (RAW_FEATURE, 0) if accept is StreamForm.RAW else (0, RAW_FEATURE)
    first, second = (head(n + 2, n + 1, features=feature) for n, feature in enumerate(features))
    with pytest.raises(Unsupported):
        take(target, framed(first, second), to=3, accept=accept)
    assert len(target.received) == (0 if accept is StreamForm.RAW else 1)  # the replica is pinned to plain ones


@pytest.mark.parametrize(
    ("data", "accept", "error"),
    [
        (head(2, 0), StreamForm.RAW, Unsupported),
        (head(3, 0), None, ProtocolError),
        (head(2, 1), None, ProtocolError),
        (b"", None, ProtocolError),  # zfs send failed
        (head(2, 0, features=1 << 20), None, ProtocolError),  # it continues something
    ],
)
def test_a_replica_is_not_kept_aside_for_a_stream_that_is_refused(
    target: Target, data: bytes, accept: StreamForm | None, error: type[ReplicatorError]
) -> None:
    """Nothing but listings is in the record."""
    how: dict[str, Any] = {"mode": ReceiveMode.REBUILD, "base": None, "aside": "diverged-now", "intermediates": False}
    with pytest.raises(error):
        take(target, data, to=2, accept=accept, **how)
    assert {argv[1] for argv in target.asked} == set()
    assert target.received == []


def test_a_replica_is_not_put_back_for_a_stream_of_another_form(target: Target) -> None:
    target.rows.append(row(f"{REPLICA}@own", "snapshot", guid=9, createtxg=9, creation=1))
    how: dict[str, Any] = {"mode": ReceiveMode.REBUILD, "aside": "diverged-now", "intermediates": False}
    with pytest.raises(Unsupported, match="cannot mix"):
        take(target, head(2, 1, features=RAW_FEATURE), to=2, **how)
    assert {argv[1] for argv in target.asked} == set()


def test_a_replica_with_volumes_below_is_not_kept_aside_for_a_zvol(target: Target) -> None:
    target.rows.append(row(f"{REPLICA}/below", guid=8))
    how: dict[str, Any] = {"mode": ReceiveMode.REBUILD, "base": None, "aside": "diverged-now", "intermediates": False}
    with pytest.raises(NotAReplica, match="arrives as a zvol"):
        take(target, head(2, 0), to=2, **how)
    assert {argv[1] for argv in target.asked} == set()


def test_packages_are_no_batches(target: Target) -> None:
    end = struct.pack("<II", 5, 0).ljust(312, b"\0")
    package = head(9, 0, form=2) + end + head(2, 1) + end + head(3, 0) + end + end
    for data, batch in ((package, False), (package, True), (framed(package), True), (framed(head(2, 1)), False)):
        with pytest.raises(ProtocolError):
            take(target, data, to=2, intermediates=batch)
    assert target.received == []


@pytest.mark.parametrize("more", [{"base": None}, {"resume": ResumeState(StreamKind.NATIVE, "4", "last", "1", 0, "")}])
def test_a_batch_only_continues(target: Target, more: dict[str, Any]) -> None:
    with pytest.raises(ReplicatorError):
        take(target, framed(head(2, 1), head(4, 2)), to=4, **more)
    with pytest.raises(NoSuchVolume):
        take(target, framed(head(2, 1), head(4, 2)), to=4, origin=VolumeId("store", "a/b"), **more)
    assert target.received == []


LAST = head(2, 1) + pattern(2000)


@pytest.mark.parametrize(
    "data",
    [
        framed(LAST)[:-4],
        framed(LAST)[:-1],
        framed(LAST)[:-500],
        framed(LAST, head(3, 2)),
        framed(LAST) + b"x",
        struct.pack("<I", 1000) + LAST[:1000] + struct.pack("<I", CHUNK_SIZE) + LAST[1000:],
        struct.pack("<I", 1000) + LAST[:1000] + b"\xff\xff\xff\xff" + LAST[1000:],
    ],
)
def test_the_last_stream_of_a_batch_is_complete_only_with_the_batch(target: Target, data: bytes) -> None:
    with pytest.raises(ProtocolError):
        take(target, data, to=2, portion=400)
    assert len(target.arrived(0)) < len(LAST), "what zfs receive has all of, it commits"


def test_a_stream_that_goes_on_after_its_end_ends_the_batch(tmp_path: Path) -> None:
    class Ending(Target):
        def write_to(self, argv: Sequence[str]) -> Process:
            self.received.append(tuple(argv))
            script = f"head -c 312 > {tmp_path}/{len(self.received) - 1}"
            return SystemRunner().write_to(("/bin/sh", "-c", script))

    target = Ending(tmp_path)
    within = head(2, 1) + head(3, 2) + pattern(3 * CHUNK_SIZE // 2)
    data = b"".join(struct.pack("<I", len(p.data)) + bytes(p.data) for p in portions(within, 1 << 18)) + bytes(4)
    with pytest.raises(ProtocolError, match="goes on"):
        take(target, data + framed(head(4, 2)), to=4)
    assert [argv[-1] for argv in target.received] == [f"{REPLICA}@2"]


@given(st.binary(max_size=60), st.integers(1, 20))
def test_no_bytes_break_the_reader_of_batches(data: bytes, portion: int) -> None:
    batch = Batch(chunk for chunk in portions(data, portion) if isinstance(chunk, NativeChunk))
    read = 0
    with pytest.raises(ProtocolError):
        while True:
            read += sum(len(chunk.data) for chunk in batch.stream())
    assert read <= len(data)


@given(st.lists(st.lists(st.integers(1, 300), max_size=4), max_size=4), st.integers(1, 400))
def test_a_batch_is_read_as_it_was_made(sizes: list[list[int]], portion: int) -> None:
    sent = [[pattern(size + i) for i, size in enumerate(stream)] for stream in sizes]
    made = b"".join(
        bytes(piece.data)
        for stream in sent
        for piece in batches.pieces(NativeChunk(bytearray(batches.ROOM) + data) for data in stream)
    )
    batch = Batch(chunk for chunk in portions(made, portion) if isinstance(chunk, NativeChunk))
    assert [b"".join(bytes(c.data) for c in batch.stream()) for _ in sent] == [b"".join(stream) for stream in sent]


def test_buffers_of_a_batch_are_released_once_they_are_used() -> None:
    released: list[int] = []
    data = framed(b"a" * 10, b"b" * 10)
    chunks = (
        NativeChunk(data[start : start + 9], lambda start=start: released.append(start))  # type: ignore[misc]
        for start in range(0, len(data), 9)
    )
    batch = Batch(chunks)
    for expected in (b"a" * 10, b"b" * 10):
        got = b""
        for chunk in batch.stream():
            got += bytes(chunk.data)
            chunk.release()
        assert got == expected
    assert sorted(set(released)) == list(range(0, len(data), 9))


def test_a_batch_that_is_lost_on_its_way(target: Target) -> None:
    def lost() -> Iterator[Chunk]:
        yield from portions(framed(head(2, 1)) + framed(head(3, 2) + pattern(2000))[:900], 300)
        raise ConnectionLost("cut")

    with pytest.raises(ConnectionLost):
        take(target, lost(), to=3)
    assert [argv[-1] for argv in target.received] == [f"{REPLICA}@2", f"{REPLICA}@last"]
    assert (target.arrived(0), len(target.arrived(1))) == (head(2, 1), 876), "the last portion is held back"


# -- batches, where they are made


class Source(RecordedRunner):
    """zfs send of it says what it was asked."""

    def read_from(self, argv: Sequence[str]) -> Process:
        self.asked.append(tuple(argv))
        return SystemRunner().read_from(("/bin/sh", "-c", f"printf %s '{argv[-1]}'; head -c 1500000 /dev/zero"))


@pytest.mark.parametrize("base", [("one", "1"), None])
def test_a_batch_has_one_stream_for_each_snapshot(base: tuple[str, str] | None) -> None:
    listed = [row("tank/vm/a", guid=100)]
    for number, name in enumerate(("one", "two", "three", "four"), 1):
        listed.append(row(f"tank/vm/a@{name}", "snapshot", guid=number, createtxg=number * 10, creation=1))
        listed.append(row(f"tank/vm/a#mark {name}", "bookmark", guid=number, createtxg=number * 10, creation=1))
    source = Source({("zfs", "list"): listing(*listed), ("zfs", "send", "-n"): "size\t10\n"})
    context = Context(NAMES, source, Listing(NAMES, source), lambda: CommandLibrary("store", source))
    request = SendRequest(
        VolumeId("store", "a"), VersionRef(*base) if base else None, VersionRef("three", "3"), "00" * 32,
        intermediates=True,
    )  # fmt: skip
    with open_stream(context, request, Cancellation()) as stream:
        chunks = [chunk for chunk in stream if isinstance(chunk, NativeChunk)]
    assert max(len(chunk.data) for chunk in chunks) == CHUNK_SIZE
    batch = Batch(iter(chunks))
    names = ["two", "three"] if base else ["one", "two", "three"]
    for name in names:
        data = b"".join(bytes(chunk.data) for chunk in batch.stream())
        assert data == f"tank/vm/a@{name}".encode() + bytes(1_500_000)
    assert list(batch.ending(())) == []
    steps = [argv for argv in source.asked if argv[1] == "send" and "-n" not in argv]
    flags = ("zfs", "send", "-L", "-e", "-c")
    made = [(*flags, "-i", f"tank/vm/a@{a}", f"tank/vm/a@{b}") for a, b in zip(("one", *names), names, strict=False)]
    assert steps == (made if base else [(*flags, "tank/vm/a@one"), *made[1:]])
