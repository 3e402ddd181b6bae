"""Every backend of block streams: what it does not take, and that nothing is lost by refusing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replicator.endpoint import ReceiveMode
from replicator.errors import (
    ChecksumMismatch,
    InvalidName,
    NoSuchSnapshot,
    NotAReplica,
    ProtocolError,
    SnapshotExists,
    StaleEpoch,
)
from replicator.model import Lineage, Role, StreamKind, VersionRef, VolumeId
from replicator.streams import BLOCK_SIZE, CHUNK_SIZE, MAX_EXTENTS, BlockChunk, Extent, NativeChunk
from tests.conformance.replicas import (
    DATA,
    OTHER,
    PRIMARY,
    SIZE,
    VM,
    asked,
    first,
    receive,
    rest_of,
    state_of,
)
from tests.conformance.test_backend import BAD_SNAPSHOTS, BAD_VOLUMES
from tests.support.blocks import (
    OTHER_KEY,
    changed,
    digests_of,
    full_chunks,
    make_chunk,
    make_stream,
    make_version,
    pattern,
    untouched_stream,
)
from tests.support.cases import BackendCase

STREAMS = [StreamKind.BLOCKS]
RIGHT = make_chunk((BLOCK_SIZE, b"a" * 100), (2 * BLOCK_SIZE, 50))
WRONG: dict[str, BlockChunk | NativeChunk] = {
    "native": NativeChunk(b"opaque"),
    "no extents": BlockChunk((), b"", b""),
    "too many extents": make_chunk(*[(n * 2, b"x") for n in range(MAX_EXTENTS + 1)]),
    "too much data": make_chunk((0, bytes(b"x" * (CHUNK_SIZE + 1)))),
    "empty extent": replace(RIGHT, extents=(*RIGHT.extents, Extent(3 * BLOCK_SIZE, 0))),
    "empty hole": replace(RIGHT, extents=(*RIGHT.extents, Extent(3 * BLOCK_SIZE, 0, zero=True))),
    "negative length": replace(RIGHT, extents=(RIGHT.extents[0], Extent(2 * BLOCK_SIZE, -5, zero=True))),
    "negative offset": make_chunk((-5, b"12345678")),
    "over the end": make_chunk((2 * SIZE - 1, b"12")),
    "hole over the end": make_chunk((2 * SIZE - 1, 2)),
    "beyond the end": make_chunk((2 * SIZE, b"1")),
    "far beyond": make_chunk((1 << 62, b"1")),
    "overlapping": make_chunk((0, b"12345678"), (7, b"1")),
    "overlapping hole": make_chunk((0, b"12345678"), (7, 5)),
    "descending": make_chunk((BLOCK_SIZE, b"1"), (0, b"1")),
    "the same again": make_chunk((0, b"1"), (0, b"1")),
    "missing data": replace(RIGHT, data=b"a" * 99),
    "more data": replace(RIGHT, data=b"a" * 101),
    "missing digests": replace(RIGHT, digests=b""),
    "short digests": replace(RIGHT, digests=RIGHT.digests[:-1]),
    "more digests": replace(RIGHT, digests=RIGHT.digests * 2),
    "digests of a hole": replace(make_chunk((0, 100)), digests=digests_of(bytes(100))),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_chunks_that_are_refused(case: BackendCase, wrong: str) -> None:
    one = first(case)
    with pytest.raises(ProtocolError):
        receive(case, asked(make_version("two", 2 * SIZE), one), make_stream(WRONG[wrong]))
    assert state_of(case).versions == (one,)
    assert case.read_snapshot(VM.name, one) == DATA
    receive(case, asked(make_version("two", 2 * SIZE), one), make_stream(RIGHT))


def test_chunks_that_run_backwards(case: BackendCase) -> None:
    with pytest.raises(ProtocolError):
        receive(case, asked(make_version("one", SIZE)), make_stream(RIGHT, make_chunk((0, b"1"))))


@pytest.mark.parametrize(
    "damaged",
    [
        replace(RIGHT, data=b"a" * 99 + b"b"),
        replace(RIGHT, digests=bytes(16)),
        make_chunk((BLOCK_SIZE, b"a" * 100), key=OTHER_KEY),
    ],
)
def test_damage_on_the_way(case: BackendCase, damaged: BlockChunk) -> None:
    one = first(case)
    to = make_version("two", SIZE)
    with pytest.raises(ChecksumMismatch) as caught:
        receive(case, asked(to, one), make_stream(make_chunk((0, b"right")), damaged, make_chunk((SIZE - 1, b"!"))))
    assert caught.value.retryable
    state = state_of(case)
    assert state.versions == (one,)
    if state.resume is not None:
        assert state.resume.offset <= BLOCK_SIZE
    source = changed(DATA, [(0, b"right"), (BLOCK_SIZE, b"a" * 100), (SIZE - 1, b"!")])
    rest = rest_of(source, state.resume) if state.resume else make_stream(*full_chunks(source))
    made = receive(case, asked(to, one, resume=state.resume), rest)
    assert case.read_snapshot(VM.name, made) == source


def test_an_extent_of_several_digests(case: BackendCase) -> None:
    data = pattern(2 * BLOCK_SIZE + 1)
    chunk = make_chunk((100, data))
    assert len(chunk.digests) == 48
    made = receive(case, asked(make_version("one", SIZE)), make_stream(chunk))
    assert case.read_snapshot(VM.name, made) == changed(bytes(SIZE), [(100, data)])


def test_a_base_that_is_not_there(case: BackendCase) -> None:
    one = first(case)
    gone = make_version("gone", SIZE)
    with pytest.raises(NoSuchSnapshot):
        receive(case, asked(make_version("two", SIZE), gone), untouched_stream())
    with pytest.raises(NoSuchSnapshot):
        receive(case, replace(asked(make_version("two", SIZE), gone), volume=VolumeId("store", "new")), make_stream())
    renamed = VersionRef("other-name", one.guid)
    receive(case, replace(asked(make_version("two", SIZE)), base=renamed), make_stream())


def test_a_name_that_another_version_has(case: BackendCase) -> None:
    one = first(case)
    with pytest.raises(SnapshotExists):
        receive(case, asked(make_version("one", SIZE), one), make_stream())
    assert state_of(case).versions == (one,)


def test_another_lineage(case: BackendCase) -> None:
    one = first(case)
    with pytest.raises(NotAReplica):
        receive(case, asked(make_version("two", SIZE), one, lineage=OTHER), untouched_stream())
    assert state_of(case).lineage == Lineage(PRIMARY.uuid, Role.REPLICA, 3)


def test_a_primary_takes_nothing(case: BackendCase) -> None:
    one = first(case)
    case.backend.set_lineage(VM.name, PRIMARY)
    with pytest.raises(NotAReplica):
        receive(case, asked(make_version("two", SIZE), one), untouched_stream())


def test_a_volume_of_its_own_takes_nothing(case: BackendCase) -> None:
    case.create(VM.name, DATA)
    with pytest.raises(NotAReplica):
        receive(case, asked(make_version("one", SIZE)), untouched_stream())
    assert case.read(VM.name) == DATA
    with pytest.raises(NotAReplica):
        receive(case, asked(make_version("one", SIZE), mode=ReceiveMode.REBUILD), untouched_stream())


def test_epochs(case: BackendCase) -> None:
    one = first(case)
    older = replace(PRIMARY, epoch=2)
    with pytest.raises(StaleEpoch):
        receive(case, asked(make_version("two", SIZE), one, lineage=older), untouched_stream())
    newer = replace(PRIMARY, epoch=4)
    receive(case, asked(make_version("two", SIZE), one, lineage=newer), make_stream())
    assert state_of(case).lineage == Lineage(PRIMARY.uuid, Role.REPLICA, 4)
    with pytest.raises(StaleEpoch):
        receive(case, asked(make_version("three", SIZE), one), untouched_stream())


@pytest.mark.parametrize("name", BAD_VOLUMES)
def test_volume_names_that_are_refused(case: BackendCase, name: str) -> None:
    request = replace(asked(make_version("one", SIZE)), volume=VolumeId("store", name))
    with pytest.raises(InvalidName):
        receive(case, request, untouched_stream())
    assert case.backend.volumes() == ()


@pytest.mark.parametrize("name", BAD_SNAPSHOTS)
def test_snapshot_names_that_are_refused(case: BackendCase, name: str) -> None:
    with pytest.raises(InvalidName):
        receive(case, asked(make_version(name, SIZE)), untouched_stream())
    assert case.backend.volumes() == ()
