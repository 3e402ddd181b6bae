"""Every endpoint, near or far, over a storage of native streams: what is sent out of it, and received into it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from replicator.cancellation import Cancellation
from replicator.endpoint import (
    ManifestRequest,
    ReceiveMode,
    ReceiveRequest,
    ScrubRequest,
    SendRequest,
    SnapshotRequest,
)
from replicator.errors import (
    Cancelled,
    ConnectionLost,
    NoSuchSnapshot,
    NoSuchVolume,
    NotAReplica,
    ReplicatorError,
    SnapshotExists,
    StaleEpoch,
    StaleResume,
    VolumeBusy,
)
from replicator.model import Lineage, ResumeState, Role, StreamKind, Version, VersionRef, VolumeId, VolumeState
from replicator.streams import Chunk, ChunkStream, NativeChunk, Stream
from tests.support.blocks import KEY, changed
from tests.support.endpoint_cases import REPLICA, SOURCE, EndpointCase
from tests.support.zfs_case import ZfsCase

STREAMS = [StreamKind.NATIVE]
SIZE = 6 << 20
DATA = os.urandom(SIZE)
PRIMARY = Lineage("6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.PRIMARY, 3)
OTHER = Lineage("00000000-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.PRIMARY, 3)
TAG = "replicator:vms:one:store"
GONE = VersionRef("gone", "12345")


@pytest.fixture
def case(near_or_far: EndpointCase) -> EndpointCase:
    """The endpoint, with a source that is at epoch 3."""
    near_or_far.storage.create(SOURCE.name, DATA)
    near_or_far.storage.backend.set_lineage(SOURCE.name, PRIMARY)
    return near_or_far


def take(case: EndpointCase, *names: str) -> list[Version]:
    """Snapshots of the source, each a little different."""
    made = []
    for number, name in enumerate(names):
        case.storage.write(SOURCE.name, number * 5000, name.encode())
        made.append(case.endpoint.snapshot(SnapshotRequest((SOURCE,), name))[0].get())
    return made


def opened(case: EndpointCase, base: Version | None, to: Version, **more: object) -> Stream:
    request = SendRequest(SOURCE, base.ref if base else None, to.ref, KEY, lineage=PRIMARY)
    return case.endpoint.send(replace(request, **more), Cancellation())  # type: ignore[arg-type]


def asked(base: Version | None, to: Version, **more: object) -> ReceiveRequest:
    request = ReceiveRequest(REPLICA, PRIMARY, base.ref if base else None, to, KEY, kind=StreamKind.NATIVE)
    return replace(request, **more)  # type: ignore[arg-type]


def receive(case: EndpointCase, request: ReceiveRequest, stream: Stream, cancel: Cancellation | None = None) -> Version:
    with stream:
        return case.endpoint.receive(request, stream, cancel or Cancellation())


def replicate(case: EndpointCase, base: Version | None, to: Version, **more: object) -> Version:
    return receive(case, asked(base, to, **more), opened(case, base, to))


def state_of(case: EndpointCase) -> VolumeState:
    state = case.endpoint.state(REPLICA)
    assert state is not None
    assert state == case.local.state(REPLICA)
    return state


def cut(stream: Stream, size: int, error: Exception) -> ChunkStream:
    """The first ``size`` bytes of a stream, and then a failure."""

    def chunks() -> Iterator[Chunk]:
        left = size
        for chunk in stream:
            if left <= 0:
                break
            data = bytes(chunk.data[:left])
            chunk.release()
            left -= len(data)
            yield NativeChunk(data)
        raise error

    return ChunkStream(StreamKind.NATIVE, chunks(), on_close=stream.close)


def settle(case: EndpointCase) -> None:
    """Wait until the node has noticed that a receive was left in the middle; until then the volume is busy."""
    until = time.monotonic() + 120
    while True:
        try:
            case.local.adopt(REPLICA, PRIMARY)
        except NoSuchVolume:  # nothing of it was kept
            return
        except VolumeBusy:
            assert time.monotonic() < until, "the volume is busy for ever"
            time.sleep(0.05)
        else:
            return


def interrupted(case: EndpointCase, base: Version | None, to: Version) -> ResumeState:
    error = ConnectionLost("cut", hint="h")
    with pytest.raises(ConnectionLost, match="cut"):
        receive(case, asked(base, to), cut(opened(case, base, to), 3 << 20, error))
    settle(case)
    resume = state_of(case).resume
    assert resume is not None
    return resume


def equal(case: EndpointCase, *versions: Version) -> None:
    """The replica has these versions of the source, whole."""
    assert [v.guid for v in state_of(case).versions] == [v.guid for v in versions]
    for version in versions:
        assert case.storage.read_snapshot(REPLICA.name, version) == case.storage.read_snapshot(SOURCE.name, version)


# -- what arrives


def test_a_first_copy_increments_and_a_batch(case: EndpointCase) -> None:
    one, two, three, four = take(case, "one", "two", "three", "four")
    made = replicate(case, None, one, hold=TAG)
    assert (made.name, made.guid, made.created, made.size, made.holds) == ("one", one.guid, one.created, SIZE, (TAG,))
    replicate(case, one, two)
    stream = opened(case, two, four, intermediates=True)
    assert receive(case, asked(two, four, intermediates=True, hold=TAG), stream).guid == four.guid
    assert (stream.wire_bytes > 0) == case.remote
    assert state_of(case).lineage == Lineage(PRIMARY.uuid, Role.REPLICA, 3)
    equal(case, one, two, three, four)


def test_a_lost_confirmation(case: EndpointCase) -> None:
    (one,) = take(case, "one")
    replicate(case, None, one)
    assert replicate(case, None, one, hold=TAG).holds == (TAG,)
    equal(case, one)


@pytest.mark.parametrize("full", [True, False])
def test_an_interrupted_receive_is_continued(case: EndpointCase, full: bool) -> None:
    one, two = take(case, "one", "two")
    if not full:
        replicate(case, None, one)
        case.storage.write(SOURCE.name, 0, os.urandom(SIZE))
        (two,) = take(case, "later")
    base, to = (None, one) if full else (one, two)
    resume = interrupted(case, base, to)
    assert (resume.to_guid, resume.base_guid) == (to.guid, base.guid if base else None)
    assert resume.offset > 1 << 20
    with opened(case, base, to, resume=resume) as rest:
        left = sum(len(chunk.data) for chunk in rest)
    with opened(case, base, to) as whole:
        assert left < sum(len(chunk.data) for chunk in whole) - (1 << 19)
    receive(case, asked(base, to, resume=resume), opened(case, base, to, resume=resume))
    assert state_of(case).resume is None
    equal(case, *([one] if full else [one, two]))


def test_partial_state_is_discarded(case: EndpointCase) -> None:
    one, two = take(case, "one", "two")
    replicate(case, None, one)
    case.storage.write(SOURCE.name, 0, os.urandom(SIZE))
    (two,) = take(case, "later")
    interrupted(case, one, two)
    for _ in range(2):
        case.endpoint.abort_receive(REPLICA)
        assert state_of(case).resume is None
    equal(case, one)


def test_a_resume_that_fits_nothing(case: EndpointCase) -> None:
    one, two = take(case, "one", "two")
    resume = interrupted(case, None, one)
    with pytest.raises(StaleResume):
        list(opened(case, None, two, resume=resume))
    with pytest.raises(StaleResume):
        list(opened(case, None, one, resume=replace(resume, token="1-abc-8-00")))  # noqa: S106
    receive(case, asked(None, one, resume=resume), opened(case, None, one, resume=resume))
    equal(case, one)


# -- what does not


@pytest.mark.parametrize("error", [NoSuchSnapshot("gone", hint="h"), RuntimeError("bug")])
def test_a_source_that_fails_in_the_middle(case: EndpointCase, error: Exception) -> None:
    """Its own error is what comes out; the endpoint works on."""
    (one,) = take(case, "one")
    with pytest.raises(type(error), match=str(error)):
        receive(case, asked(None, one), cut(opened(case, None, one), 3 << 20, error))
    settle(case)
    replicate(case, None, one)
    equal(case, one)


def test_cancelling(case: EndpointCase) -> None:
    (one,) = take(case, "one")
    cancel = Cancellation()

    def chunks(stream: Stream) -> Iterator[Chunk]:
        for number, chunk in enumerate(stream):
            if number == 2:
                cancel.cancel()
            yield chunk

    stream = opened(case, None, one)
    with pytest.raises(Cancelled):
        receive(case, asked(None, one), ChunkStream(StreamKind.NATIVE, chunks(stream), on_close=stream.close), cancel)
    settle(case)
    state = case.endpoint.state(REPLICA)
    assert state is None or state.versions == ()
    replicate(case, None, one)
    equal(case, one)


def test_what_is_gone_cannot_be_sent(case: EndpointCase) -> None:
    (one,) = take(case, "one")
    for base, to in ((None, GONE), (GONE, one.ref)):
        with pytest.raises(NoSuchSnapshot):
            list(case.endpoint.send(SendRequest(SOURCE, base, to, KEY), Cancellation()))


def test_targets_that_take_nothing(case: EndpointCase) -> None:
    one, two = take(case, "one", "two")
    replicate(case, None, one)
    for lineage, wanted in ((replace(PRIMARY, epoch=2), StaleEpoch), (OTHER, NotAReplica)):
        with pytest.raises(wanted) as caught:
            receive(case, asked(one, two, lineage=lineage), opened(case, one, two))
        assert caught.value.hint
    with pytest.raises(NoSuchSnapshot):
        receive(case, asked(two, two), opened(case, one, two))
    with pytest.raises(SnapshotExists):
        receive(case, asked(one, replace(two, name="one")), opened(case, one, two))
    equal(case, one)


def test_a_rebuild_keeps_what_the_replica_had(case: EndpointCase) -> None:
    one, two = take(case, "one", "two")
    replicate(case, None, one)
    case.storage.write(REPLICA.name, 0, b"only here")
    request = asked(one, two, mode=ReceiveMode.REBUILD, aside="diverged-now")
    receive(case, request, opened(case, one, two))
    equal(case, one, two)
    kept = VolumeId(REPLICA.storage, f"{REPLICA.name}-diverged-now")
    assert case.endpoint.state(kept) is not None
    assert case.storage.read(kept.name) == changed(case.storage.read_snapshot(SOURCE.name, one), [(0, b"only here")])


def test_renaming_a_replica(case: EndpointCase) -> None:
    (one,) = take(case, "one")
    replicate(case, None, one)
    moved = VolumeId(REPLICA.storage, f"{REPLICA.name}-2")
    for _ in range(2):
        case.endpoint.rename(REPLICA, moved)
        assert case.endpoint.state(REPLICA) is None
    state = case.endpoint.state(moved)
    assert state is not None
    assert [v.guid for v in state.versions] == [one.guid]


# -- looking into it


def test_a_manifest_of_a_filesystem(case: EndpointCase) -> None:
    assert isinstance(case.storage, ZfsCase)
    case.storage.create_filesystem("two/files", file=b"content")
    volume = VolumeId("store", "two/files")
    one = case.endpoint.snapshot(SnapshotRequest((volume,), "one"))[0].get()

    def manifest(endpoint: object) -> bytes:
        with endpoint.manifest(ManifestRequest(volume, one.ref, KEY), Cancellation()) as stream:  # type: ignore[attr-defined]
            return b"".join(bytes(chunk.data) for chunk in stream)

    there = manifest(case.endpoint)
    assert there
    assert there == manifest(case.local)


def test_the_scrub_of_a_pool(case: EndpointCase) -> None:
    found = case.endpoint.scrub(ScrubRequest(SOURCE))
    assert found.pool == case.local.scrub(ScrubRequest(SOURCE)).pool == "tank"
    assert found.errors == 0
    with pytest.raises(ReplicatorError):
        case.endpoint.scrub(ScrubRequest(VolumeId("store", "two/missing")))
