"""Every endpoint, near or far: streams out of it and into it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from replicator.cancellation import Cancellation
from replicator.endpoint import Range, ReceiveMode, ReceiveRequest, RemoveRequest, SendRequest, SnapshotRequest
from replicator.errors import (
    Cancelled,
    ChecksumMismatch,
    ConnectionLost,
    NoSuchSnapshot,
    NotAReplica,
    ProtocolError,
    ReplicatorError,
    SnapshotExists,
    SnapshotHeld,
    StaleEpoch,
    StaleResume,
    VolumeBusy,
    VolumeChanged,
)
from replicator.local import LocalEndpoint
from replicator.model import Lineage, ResumeState, Role, StreamKind, Version, VersionRef, VolumeId, VolumeState
from replicator.planning import SendPolicy
from replicator.replication import Options, Pair, Replication
from replicator.streams import BLOCK_SIZE, CHUNK_SIZE, Chunk, ChunkStream, Extent, Stream
from replicator.verification import resync, verify
from tests.support.blocks import (
    KEY,
    apply,
    changed,
    full_chunks,
    make_chunk,
    make_stream,
    make_version,
    pattern,
    untouched_stream,
)
from tests.support.cases import MemoryCase
from tests.support.endpoint_cases import REPLICA, SOURCE, EndpointCase

STREAMS = [StreamKind.BLOCKS]
SIZE = 3 * CHUNK_SIZE + 5 * BLOCK_SIZE
DATA = changed(pattern(SIZE), [(CHUNK_SIZE, CHUNK_SIZE)])
PRIMARY = Lineage("6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.PRIMARY, 3)
TAG = "replicator:vms:one:store"


@pytest.fixture
def case(near_or_far: EndpointCase) -> EndpointCase:
    """The endpoint, with nothing in its storage."""
    return near_or_far


# -- out of it


@pytest.fixture
def sent(case: EndpointCase) -> tuple[Version, Version]:
    """Two snapshots of a volume."""
    case.storage.create(SOURCE.name, DATA)
    (one,) = case.endpoint.snapshot(SnapshotRequest((SOURCE,), "one"))
    case.storage.write(SOURCE.name, 5, b"x" * 9000)
    case.storage.write(SOURCE.name, SIZE - 3, b"end")
    (two,) = case.endpoint.snapshot(SnapshotRequest((SOURCE,), "two"))
    return one.get(), two.get()


NOW = changed(DATA, [(5, b"x" * 9000), (SIZE - 3, b"end")])


def opened(
    case: EndpointCase, base: Version | None, to: Version, cancel: Cancellation | None = None, **more: object
) -> Stream:
    request = SendRequest(SOURCE, base.ref if base else None, to.ref, KEY, lineage=PRIMARY)
    return case.endpoint.send(replace(request, **more), cancel or Cancellation())  # type: ignore[arg-type]


def test_a_full_stream(case: EndpointCase, sent: tuple[Version, Version]) -> None:
    stream = opened(case, None, sent[1])
    done = apply(stream, b"", SIZE)
    assert bytes(done.data) == NOW
    assert done.written <= SIZE - CHUNK_SIZE
    assert (stream.wire_bytes > 0) == case.remote


def test_an_increment(case: EndpointCase, sent: tuple[Version, Version]) -> None:
    done = apply(opened(case, sent[0], sent[1]), DATA, SIZE)
    assert bytes(done.data) == NOW
    assert done.written <= 4 * BLOCK_SIZE


def test_nothing_changed(case: EndpointCase, sent: tuple[Version, Version]) -> None:
    assert apply(opened(case, sent[1], sent[1]), NOW, SIZE).written == 0


def test_a_resumed_stream(case: EndpointCase, sent: tuple[Version, Version]) -> None:
    one, two = sent
    resume = ResumeState(StreamKind.BLOCKS, two.guid, two.name, one.guid, CHUNK_SIZE + 7)
    done = apply(opened(case, one, two, resume=resume), NOW[: CHUNK_SIZE + 7] + DATA[CHUNK_SIZE + 7 :], SIZE)
    assert bytes(done.data) == NOW
    assert done.first >= CHUNK_SIZE + 7
    with pytest.raises(StaleResume):
        list(opened(case, one, two, resume=replace(resume, to_guid="f" * 32)))


def test_ranges(case: EndpointCase, sent: tuple[Version, Version]) -> None:
    ranges = tuple(Range(n * BLOCK_SIZE, BLOCK_SIZE) for n in range(0, SIZE // BLOCK_SIZE, 2))
    done = apply(opened(case, None, sent[1], ranges=ranges), b"\xee" * SIZE, SIZE)
    for number in range(SIZE // BLOCK_SIZE):
        place = slice(number * BLOCK_SIZE, (number + 1) * BLOCK_SIZE)
        assert bytes(done.data[place]) == (NOW[place] if number % 2 == 0 else b"\xee" * BLOCK_SIZE)


def test_what_is_gone_cannot_be_sent(case: EndpointCase, sent: tuple[Version, Version]) -> None:
    gone = make_version("gone", SIZE)
    for base, to in ((None, gone), (gone, sent[1])):
        with pytest.raises(NoSuchSnapshot):
            list(opened(case, base, to))
    assert bytes(apply(opened(case, None, sent[1]), b"", SIZE).data) == NOW


def test_streams_left_in_the_middle(case: EndpointCase, sent: tuple[Version, Version]) -> None:
    for _ in range(5):
        with opened(case, None, sent[1]) as stream:
            next(iter(stream))
        opened(case, None, sent[1]).close()
    assert bytes(apply(opened(case, None, sent[1]), b"", SIZE).data) == NOW


def test_cancelling_a_stream(case: EndpointCase, sent: tuple[Version, Version]) -> None:
    cancel = Cancellation()
    with opened(case, None, sent[1], cancel) as stream:
        chunks = iter(stream)
        next(chunks).release()
        cancel.cancel()
        with pytest.raises(Cancelled):
            for chunk in chunks:
                chunk.release()
    assert bytes(apply(opened(case, None, sent[1]), b"", SIZE).data) == NOW


# -- into it


def asked(to: Version, base: Version | None = None, **more: object) -> ReceiveRequest:
    request = ReceiveRequest(REPLICA, PRIMARY, base.ref if base else None, to, KEY)
    return replace(request, **more)  # type: ignore[arg-type]


def receive(case: EndpointCase, request: ReceiveRequest, stream: Stream, cancel: Cancellation | None = None) -> Version:
    with stream:
        return case.endpoint.receive(request, stream, cancel or Cancellation())


def state_of(case: EndpointCase) -> VolumeState:
    state = case.endpoint.state(REPLICA)
    assert state is not None
    assert state == case.local.state(REPLICA)
    return state


def settle(case: EndpointCase) -> None:
    """Wait until the node has noticed that a receive was left in the middle; until then the volume is busy.

    Adopting the lineage that it has already changes nothing, and needs the volume for itself.
    """
    for _ in range(1000):
        try:
            case.local.adopt(REPLICA, PRIMARY)
        except VolumeBusy:
            time.sleep(0.01)
        else:
            return
    raise AssertionError("the volume is busy for ever")


def first(case: EndpointCase) -> Version:
    return receive(case, asked(make_version("one", SIZE)), make_stream(*full_chunks(DATA, CHUNK_SIZE)))


def test_a_first_copy_and_an_increment(case: EndpointCase) -> None:
    to = make_version("one", SIZE)
    stream = make_stream(*full_chunks(DATA, CHUNK_SIZE))
    one = receive(case, asked(to, hold=TAG), stream)
    assert (one.name, one.guid, one.created, one.size, one.holds) == (to.name, to.guid, to.created, SIZE, (TAG,))
    assert (stream.wire_bytes > 0) == case.remote
    two = receive(case, asked(make_version("two", SIZE), one), make_stream(make_chunk((5, b"two"), (BLOCK_SIZE, 99))))
    assert case.storage.read_snapshot(REPLICA.name, two) == changed(DATA, [(5, b"two"), (BLOCK_SIZE, 99)])
    assert state_of(case).versions == (one, two)
    assert state_of(case).lineage == replace(PRIMARY, role=Role.REPLICA)


def test_an_empty_stream(case: EndpointCase) -> None:
    made = receive(case, asked(make_version("one", SIZE)), make_stream())
    assert case.storage.read_snapshot(REPLICA.name, made) == bytes(SIZE)


def test_a_lost_confirmation(case: EndpointCase) -> None:
    one = first(case)
    again = receive(case, asked(replace(one, holds=()), hold=TAG), untouched_stream())
    assert again.guid == one.guid
    assert state_of(case).versions == (replace(one, holds=(TAG,)),)


@pytest.mark.parametrize(
    "error", [ConnectionLost("cut", hint="h"), NoSuchSnapshot("gone", hint="h"), RuntimeError("bug")]
)
def test_a_source_that_fails_in_the_middle(case: EndpointCase, error: Exception) -> None:
    """Its own error is what comes out; what arrived is kept; the endpoint works on."""
    one = first(case)
    to, target = make_version("two", SIZE), pattern(SIZE, seed=7)
    with pytest.raises(type(error), match=str(error)):
        receive(case, asked(to, one), make_stream(*full_chunks(target)[:20], then=error))
    settle(case)
    state = state_of(case)
    assert state.versions == (one,)
    resume = state.resume
    assert resume is not None
    assert (resume.to_guid, resume.base_guid, resume.to_name) == (to.guid, one.guid, "two")
    assert 0 <= resume.offset <= 20 * 128 * 1024
    rest = target[resume.offset :]
    chunks = [
        make_chunk((resume.offset + n, rest[n : n + BLOCK_SIZE * 4])) for n in range(0, len(rest), BLOCK_SIZE * 4)
    ]
    made = receive(case, asked(to, one, resume=resume, hold=TAG), make_stream(*chunks))
    assert case.storage.read_snapshot(REPLICA.name, made) == target
    assert state_of(case).versions == (one, made)


def test_discarding_partial_state(case: EndpointCase) -> None:
    one = first(case)
    with pytest.raises(ConnectionLost):
        receive(
            case, asked(make_version("two", SIZE), one), make_stream(make_chunk((0, b"x")), then=ConnectionLost(""))
        )
    settle(case)
    for _ in range(2):
        case.endpoint.abort_receive(REPLICA)
        assert state_of(case).resume is None
    case.endpoint.abort_receive(VolumeId("store", "two/missing"))


def test_cancelling_a_receive(case: EndpointCase) -> None:
    one = first(case)
    cancel = Cancellation()
    moments = iter(range(100))

    def cancel_later() -> None:
        if next(moments) == 2:
            cancel.cancel()

    stream = make_stream(*full_chunks(DATA), meanwhile=cancel_later)
    with pytest.raises(Cancelled):
        receive(case, asked(make_version("two", SIZE), one), stream, cancel)
    settle(case)
    assert [v.guid for v in state_of(case).versions] == [one.guid]


def test_damage_on_the_way(case: EndpointCase) -> None:
    one = first(case)
    right = make_chunk((BLOCK_SIZE, b"a" * 100))
    damaged = replace(right, data=b"a" * 99 + b"b")
    with pytest.raises(ChecksumMismatch) as caught:
        receive(case, asked(make_version("two", SIZE), one), make_stream(damaged, *full_chunks(DATA)[1:]))
    settle(case)
    assert caught.value.retryable
    assert state_of(case).versions == (one,)
    receive(case, asked(make_version("two", SIZE), one), make_stream(right))


def test_chunks_that_are_refused(case: EndpointCase) -> None:
    one = first(case)
    right = make_chunk((BLOCK_SIZE, b"a" * 100))
    for wrong in (
        replace(right, extents=(Extent(BLOCK_SIZE, 0),)),
        replace(right, extents=(Extent(SIZE, 100),)),
        replace(right, digests=b""),
        make_chunk((BLOCK_SIZE, b"1"), (0, b"1")),
    ):
        with pytest.raises(ReplicatorError) as caught:
            receive(case, asked(make_version("two", SIZE), one), make_stream(wrong))
        settle(case)
        assert isinstance(caught.value, ProtocolError | ChecksumMismatch)
        assert state_of(case).versions == (one,)


def test_targets_that_take_nothing(case: EndpointCase) -> None:
    one = first(case)
    two = make_version("two", SIZE)
    other = Lineage("00000000-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.PRIMARY, 3)
    with pytest.raises(NotAReplica):
        receive(case, asked(two, one, lineage=other), untouched_stream())
    with pytest.raises(StaleEpoch):
        receive(case, asked(two, one, lineage=replace(PRIMARY, epoch=2)), untouched_stream())
    with pytest.raises(NoSuchSnapshot):
        receive(case, replace(asked(two), base=VersionRef("gone", "f" * 32)), untouched_stream())
    with pytest.raises(SnapshotExists):
        receive(case, asked(make_version("one", SIZE), one), untouched_stream())
    with pytest.raises(StaleResume):
        resume = ResumeState(StreamKind.BLOCKS, two.guid, "two", one.guid, BLOCK_SIZE)
        receive(case, asked(two, one, resume=resume), untouched_stream())
    case.storage.backend.set_lineage(REPLICA.name, PRIMARY)
    with pytest.raises(NotAReplica) as caught:
        receive(case, asked(two, one), untouched_stream())
    assert "resync" in caught.value.hint


def test_one_receive_of_a_volume_at_a_time(case: EndpointCase) -> None:
    one = first(case)
    begun, go_on = threading.Event(), threading.Event()
    results: list[object] = []

    def chunks() -> Iterator[Chunk]:
        yield make_chunk((0, b"slow"))
        begun.set()
        assert go_on.wait(60)

    def slow() -> None:
        try:
            results.append(
                receive(case, asked(make_version("two", SIZE), one), ChunkStream(StreamKind.BLOCKS, chunks()))
            )
        except ReplicatorError as error:
            results.append(error)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        assert begun.wait(60)
        with pytest.raises(VolumeBusy) as caught:
            receive(case, asked(make_version("three", SIZE), one), untouched_stream())
        assert caught.value.retryable
        with pytest.raises(VolumeBusy):
            case.endpoint.abort_receive(REPLICA)
        assert state_of(case).versions == (one,)
    finally:
        go_on.set()
        thread.join(60)
    assert [v.name for v in state_of(case).versions] == ["one", "two"]
    assert isinstance(results[0], Version)


def test_rebuilding(case: EndpointCase) -> None:
    one = first(case)
    case.storage.damage(REPLICA.name, one, 500, b"damage")
    request = asked(replace(one, holds=()), one, mode=ReceiveMode.REBUILD, aside="diverged-now")
    made = receive(case, request, make_stream(make_chunk((0, DATA[:BLOCK_SIZE]))))
    assert case.storage.read_snapshot(REPLICA.name, made) == DATA
    assert [v.name for v in state_of(case).versions] == ["diverged-now", "one"]


@pytest.mark.parametrize("sent", [0, 1])
def test_a_rebuild_whose_stream_fails_keeps_what_there_is_where_it_is(case: EndpointCase, sent: int) -> None:
    one = first(case)
    before = state_of(case)

    def chunks() -> Iterator[Chunk]:
        yield from [make_chunk((0, DATA[:BLOCK_SIZE]))][:sent]
        raise ConnectionLost("the source cannot send")

    request = asked(replace(one, holds=()), one, mode=ReceiveMode.REBUILD, aside="diverged-now")
    with pytest.raises(ReplicatorError):
        receive(case, request, ChunkStream(StreamKind.BLOCKS, chunks()))
    assert state_of(case).versions == before.versions
    assert [volume.id for volume in case.endpoint.volumes("store")] == [REPLICA]
    assert case.storage.read_snapshot(REPLICA.name, one) == DATA


def test_restoring(case: EndpointCase) -> None:
    back = VolumeId("store", "two/back")
    request = replace(asked(make_version("one", SIZE), mode=ReceiveMode.RESTORE), volume=back, lineage=None)
    receive(case, request, make_stream(*full_chunks(DATA, CHUNK_SIZE)))
    assert case.storage.read(back.name) == DATA
    with pytest.raises(VolumeBusy):
        receive(case, request, untouched_stream())


# -- the whole of it


def replicate(pair: Pair) -> int:
    outcome = Replication(pair, Options(SendPolicy()), observer=lambda _: None, cancel=Cancellation()).run()
    return outcome.steps


def check_equal(pair: Pair) -> None:
    assert verify(pair, Options(SendPolicy()), observer=lambda _: None, cancel=Cancellation()).equal


def test_replicating_into_it(case: EndpointCase) -> None:
    """Push; then damage and divergence at the target, which a resync makes right."""
    other = MemoryCase("tank")
    source = LocalEndpoint("two", {"tank": other.backend})
    volume = VolumeId("tank", "vm")
    pair = Pair(source, volume, case.endpoint, REPLICA, TAG)
    other.create("vm", DATA)
    source.snapshot(SnapshotRequest((volume,), "one"))
    other.write("vm", 5, b"changed")
    other.resize("vm", SIZE + 100)
    source.snapshot(SnapshotRequest((volume,), "two"))
    assert replicate(pair) == 2
    assert replicate(pair) == 0
    check_equal(pair)
    newest = state_of(case).versions[-1]
    case.storage.damage(REPLICA.name, newest, 2 * CHUNK_SIZE, b"bits")
    case.storage.create(REPLICA.name, b"written to")
    to = source.snapshot(SnapshotRequest((volume,), "three"))[0].get()
    done = resync(pair, to, Options(SendPolicy()), observer=lambda _: None, cancel=Cancellation())
    assert done.changed <= SIZE + 100
    check_equal(pair)
    assert replicate(pair) == 0
    assert case.storage.read_snapshot(REPLICA.name, to) == other.read("vm")


def test_replicating_out_of_it(case: EndpointCase) -> None:
    """Pull."""
    other = MemoryCase("backup")
    target = LocalEndpoint("two", {"backup": other.backend})
    case.storage.create(SOURCE.name, DATA)
    volume = VolumeId("backup", "one/vm")
    pair = Pair(case.endpoint, SOURCE, target, volume, "replicator:vms:two:backup")
    for name in ("one", "two"):
        case.endpoint.snapshot(SnapshotRequest((SOURCE,), name))
        case.storage.write(SOURCE.name, 5, name.encode())
    assert replicate(pair) == 2
    check_equal(pair)
    state = target.state(volume)
    assert state is not None
    assert [v.name for v in state.versions] == ["one", "two"]
    assert other.read_snapshot(volume.name, state.versions[1]) == changed(DATA, [(5, b"one")])


def test_a_replica_is_removed_with_all_that_it_has(case: EndpointCase) -> None:
    base: VersionRef | None = None
    for name in ("one", "two"):
        to = make_version(name, SIZE)
        request = ReceiveRequest(REPLICA, PRIMARY, base, to, KEY, hold=TAG)
        base = to.ref
        with make_stream(*full_chunks(DATA)) as stream:
            case.endpoint.receive(request, stream, Cancellation())
    state = case.endpoint.state(REPLICA)
    assert state is not None
    assert state.lineage is not None
    remove = RemoveRequest(REPLICA, "vms", state.lineage, tuple(version.guid for version in state.versions))
    with pytest.raises(VolumeChanged):
        case.endpoint.remove(replace(remove, versions=remove.versions[:1]))
    with pytest.raises(SnapshotHeld):
        case.endpoint.remove(replace(remove, job="other"))
    assert case.endpoint.state(REPLICA) == state
    for _ in range(2):
        case.endpoint.remove(remove)
        assert case.endpoint.state(REPLICA) is None
    assert case.local.volumes("store") == ()
