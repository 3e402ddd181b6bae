"""Every backend of block streams: a replica that was written to or damaged is made right, and nothing of it is thrown
away; restores."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replicator.endpoint import ReceiveMode, ReceiveRequest
from replicator.errors import (
    ConnectionLost,
    VolumeBusy,
)
from replicator.model import Lineage, Role, StreamKind, Version, VolumeId
from replicator.streams import BLOCK_SIZE
from tests.conformance.replicas import (
    DATA,
    PRIMARY,
    SIZE,
    TAG,
    VM,
    asked,
    first,
    receive,
    state_of,
)
from tests.support.blocks import (
    changed,
    full_chunks,
    make_chunk,
    make_stream,
    make_version,
    untouched_stream,
)
from tests.support.cases import BackendCase

STREAMS = [StreamKind.BLOCKS]


def test_live_data_beside_the_snapshots_is_noticed_and_kept_aside(case: BackendCase) -> None:
    one = first(case)
    case.create(VM.name, b"written by hand")
    assert state_of(case).head_changed
    kept = case.backend.set_aside(VM.name, "diverged-now")
    assert kept is not None
    assert case.read_snapshot(VM.name, kept) == b"written by hand"
    state = state_of(case)
    assert not state.head_changed
    assert [v.name for v in state.versions] == ["one", "diverged-now"]
    assert state.lineage == Lineage(PRIMARY.uuid, Role.REPLICA, 3)
    two = receive(case, asked(make_version("two", SIZE), one), make_stream(make_chunk((0, b"two"))))
    assert case.read_snapshot(VM.name, two) == changed(DATA, [(0, b"two")])


# -- rebuilding


def damaged_replica(case: BackendCase) -> tuple[Version, Version, Version]:
    """Three snapshots; the one in the middle has lost bits, and is held."""
    one = first(case)
    two = receive(case, asked(make_version("two", SIZE), one, hold=TAG), make_stream(make_chunk((0, b"two"))))
    three = receive(case, asked(make_version("three", SIZE), two), make_stream(make_chunk((0, b"three"))))
    case.damage(VM.name, two, 500, b"damage")
    return one, two, three


def test_a_damaged_snapshot_is_rebuilt_in_its_place(case: BackendCase) -> None:
    one, two, three = damaged_replica(case)
    right = changed(DATA, [(0, b"two")])
    stream = make_stream(make_chunk((0, right[:BLOCK_SIZE])))
    request = asked(two, two, mode=ReceiveMode.REBUILD, aside="diverged-now", hold="tag")
    made = receive(case, request, stream)
    case.reopen()
    state = state_of(case)
    assert [v.name for v in state.versions] == ["one", "diverged-now", "two", "three"]
    aside = state.versions[1]
    assert (made.guid, made.name) == (two.guid, "two")
    assert state.versions[2] == made
    assert aside.guid not in {one.guid, two.guid, three.guid}
    assert aside.holds == ()
    assert set(made.holds) == {TAG, "tag"}
    assert case.read_snapshot(VM.name, made) == right
    assert case.read_snapshot(VM.name, aside) == changed(right, [(500, b"damage")])
    assert case.read_snapshot(VM.name, three) == changed(DATA, [(0, b"three")])
    assert (state.resume, state.head_changed) == (None, False)


def test_rebuilding_from_another_snapshot(case: BackendCase) -> None:
    """The newest is made of an older one and the blocks that differ; nothing is replaced."""
    one = first(case)
    to = make_version("nine", SIZE)
    made = receive(case, asked(to, one, mode=ReceiveMode.REBUILD, aside="x"), make_stream(make_chunk((9, b"nine"))))
    assert case.read_snapshot(VM.name, made) == changed(DATA, [(9, b"nine")])
    assert state_of(case).versions == (one, made)


def test_rebuilding_twice(case: BackendCase) -> None:
    """After a lost confirmation it is done again, against what is there now; both old ones are kept."""
    _, two, _ = damaged_replica(case)
    right = changed(DATA, [(0, b"two")])
    for aside in ("diverged-a", "diverged-b"):
        request = asked(two, two, mode=ReceiveMode.REBUILD, aside=aside)
        receive(case, request, make_stream(make_chunk((0, right[:BLOCK_SIZE]))))
    found = [v.name for v in state_of(case).versions]
    assert [found[0], *sorted(found[1:3]), *found[3:]] == ["one", "diverged-a", "diverged-b", "two", "three"]
    assert case.read_snapshot(VM.name, two) == right


def test_an_interrupted_rebuild_changes_nothing_and_offers_nothing(case: BackendCase) -> None:
    """What was rebuilt cannot be continued by an increment: its base is whatever was really there."""
    one, two, three = damaged_replica(case)
    request = asked(two, two, mode=ReceiveMode.REBUILD, aside="diverged-now")
    with pytest.raises(ConnectionLost):
        receive(case, request, make_stream(make_chunk((0, b"half")), then=ConnectionLost("cut")))
    case.reopen()
    state = state_of(case)
    assert [v.guid for v in state.versions] == [one.guid, two.guid, three.guid]
    assert state.resume is None
    assert case.read_snapshot(VM.name, two) == changed(DATA, [(0, b"two"), (500, b"damage")])
    receive(case, request, make_stream(make_chunk((0, changed(DATA, [(0, b"two")])[:BLOCK_SIZE]))))
    assert case.read_snapshot(VM.name, two) == changed(DATA, [(0, b"two")])


def test_rebuilding_a_replica_of_another_size(case: BackendCase) -> None:
    one = first(case)
    to = make_version("two", SIZE + 100)
    chunk = make_chunk((0, b"head"), (SIZE, b"tail"))
    made = receive(case, asked(to, one, mode=ReceiveMode.REBUILD), make_stream(chunk))
    assert case.read_snapshot(VM.name, made) == changed(DATA.ljust(SIZE + 100, b"\0"), [(0, b"head"), (SIZE, b"tail")])


# -- restoring


def restored(to: Version) -> ReceiveRequest:
    return replace(asked(to, mode=ReceiveMode.RESTORE), volume=VolumeId("store", "back/vm"), lineage=None)


def test_restoring_makes_a_volume_of_its_own(case: BackendCase) -> None:
    receive(case, restored(make_version("one", SIZE)), make_stream(*full_chunks(DATA)))
    case.reopen()
    assert case.read("back/vm") == DATA
    state = case.backend.state("back/vm")
    assert state is not None
    assert (state.versions, state.lineage, state.resume, state.size) == ((), None, None, SIZE)
    case.write("back/vm", 0, b"writable")


def test_restoring_never_overwrites(case: BackendCase) -> None:
    case.create("back/vm", b"mine")
    with pytest.raises(VolumeBusy):
        receive(case, restored(make_version("one", SIZE)), untouched_stream())
    assert case.read("back/vm") == b"mine"


def test_restoring_a_replica_is_refused_where_it_is(case: BackendCase) -> None:
    one = first(case)
    with pytest.raises(VolumeBusy):
        receive(case, replace(restored(make_version("two", SIZE)), volume=VM), untouched_stream())
    assert state_of(case).versions == (one,)


def test_an_interrupted_restore_makes_no_volume(case: BackendCase) -> None:
    request = restored(make_version("one", SIZE))
    with pytest.raises(ConnectionLost):
        receive(case, request, make_stream(*full_chunks(DATA)[:2], then=ConnectionLost("cut")))
    case.reopen()
    state = case.backend.state("back/vm")
    assert state is None or (state.versions, state.lineage, state.size) == ((), None, None)
    case.backend.abort_receive("back/vm")
    assert case.backend.volumes() == ()
    receive(case, request, make_stream(*full_chunks(DATA)))
    assert case.read("back/vm") == DATA
