"""Every storage changes a copy's role in the same way: a promoted replica can be written to and begins with its newest
snapshot, a demoted primary has lost nothing, and whatever is cut off is finished by doing it again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replicator.errors import NoSuchSnapshot, NotAReplica, StaleEpoch, VolumeBusy, VolumeChanged
from replicator.model import Lineage, Role, StreamKind, Version, VersionRef, VolumeId
from tests.conformance.replicas import DATA, OTHER, PRIMARY, SIZE, SOURCE, VM, asked, first, receive, sent, state_of
from tests.support.blocks import changed, full_chunks, make_chunk, make_stream, make_version, pattern
from tests.support.cases import BackendCase

PROMOTED = replace(PRIMARY, epoch=1_000_004)
REPLICA = replace(PROMOTED, role=Role.REPLICA)
NEXT = replace(PROMOTED, epoch=2_000_005)


def following(case: BackendCase, base: Version, content: bytes) -> tuple[Version, bytes]:
    """What the next primary sends, whose second half is new; and its content."""
    half = pattern(SIZE // 2, 9)
    after = content[: SIZE // 2] + half
    if case.backend.stream is not StreamKind.NATIVE:
        request = asked(make_version("three", SIZE), base, lineage=NEXT)
        return receive(case, request, make_stream(make_chunk((SIZE // 2, half)))), after
    other = VolumeId("store", "prox2/vm")
    sent(case, VM, asked(base, volume=other, lineage=replace(REPLICA, role=Role.PRIMARY)))
    case.backend.promote(other.name, NEXT, base.ref)
    case.write(other.name, SIZE // 2, half)
    (three,) = case.backend.snapshot((other.name,), "three")
    return sent(case, other, asked(three, base, lineage=NEXT)), after


def offer(case: BackendCase, base: Version, lineage: Lineage) -> Version:
    """Have it take another version."""
    if case.backend.stream is not StreamKind.NATIVE:
        return receive(case, asked(make_version("two", SIZE), base, lineage=lineage), make_stream(*full_chunks(DATA)))
    (two,) = case.backend.snapshot((SOURCE.name,), "two")
    return sent(case, SOURCE, asked(two, base, lineage=lineage))


def test_a_promoted_replica_is_its_newest_snapshot_and_can_be_written_to(case: BackendCase) -> None:
    one = first(case)
    case.backend.promote(VM.name, PROMOTED, one.ref)
    state = state_of(case)
    assert state.lineage == PROMOTED
    assert [v.guid for v in state.versions] == [one.guid]
    assert case.read(VM.name) == DATA
    case.write(VM.name, case.unit, b"!" * case.unit)
    (two,) = case.backend.snapshot((VM.name,), "two")
    assert case.read_snapshot(VM.name, two) == changed(DATA, [(case.unit, b"!" * case.unit)])
    assert case.read_snapshot(VM.name, one) == DATA


def test_promoting_again_changes_nothing(case: BackendCase) -> None:
    one = first(case)
    case.backend.promote(VM.name, PROMOTED, one.ref)
    case.write(VM.name, 0, b"!" * case.unit)
    written = case.read(VM.name)
    case.reopen()
    with case.in_use(VM.name):  # its guest has been started
        case.backend.promote(VM.name, PROMOTED, one.ref)
    assert case.read(VM.name) == written
    assert state_of(case).lineage == PROMOTED


def test_a_promotion_needs_its_snapshot(case: BackendCase) -> None:
    first(case)
    with pytest.raises(NoSuchSnapshot):
        case.backend.promote(VM.name, PROMOTED, VersionRef("gone", "0" * 32))
    assert state_of(case).lineage == replace(PRIMARY, role=Role.REPLICA)


def test_a_demoted_primary_has_its_snapshots_and_takes_the_next_one(case: BackendCase) -> None:
    one = first(case)
    case.backend.promote(VM.name, PROMOTED, one.ref)
    case.write(VM.name, 0, b"!" * case.unit)
    (two,) = case.backend.snapshot((VM.name,), "two")
    content = case.read(VM.name)
    case.backend.demote(VM.name, REPLICA, two.ref)
    case.reopen()
    state = state_of(case)
    assert state.lineage == REPLICA
    assert not state.head_changed
    assert [v.name for v in state.versions] == ["one", "two"]
    assert case.read_snapshot(VM.name, two) == content
    three, after = following(case, two, content)
    assert case.read_snapshot(VM.name, three) == after


def test_demoting_again_changes_nothing(case: BackendCase) -> None:
    one = first(case)
    case.backend.promote(VM.name, PROMOTED, one.ref)
    for _ in range(2):
        case.backend.demote(VM.name, REPLICA, one.ref)
        assert state_of(case).lineage == REPLICA
    case.backend.promote(VM.name, replace(PROMOTED, epoch=PROMOTED.epoch + 1), one.ref)
    assert case.read(VM.name) == DATA


def test_a_primary_that_was_written_to_is_not_demoted(case: BackendCase) -> None:
    one = first(case)
    case.backend.promote(VM.name, PROMOTED, one.ref)
    case.write(VM.name, SIZE - case.unit, b"!" * case.unit)
    written = case.read(VM.name)
    with pytest.raises(VolumeChanged):
        case.backend.demote(VM.name, REPLICA, one.ref)
    assert state_of(case).lineage == PROMOTED
    assert case.read(VM.name) == written
    case.resize(VM.name, SIZE - case.unit)
    with pytest.raises(VolumeChanged):
        case.backend.demote(VM.name, REPLICA, one.ref)


def test_a_primary_in_use_is_not_demoted(case: BackendCase) -> None:
    one = first(case)
    case.backend.promote(VM.name, PROMOTED, one.ref)
    with case.in_use(VM.name), pytest.raises(VolumeBusy) as caught:
        case.backend.demote(VM.name, REPLICA, one.ref)
    assert "in use" in str(caught.value)
    assert state_of(case).lineage == PROMOTED
    assert case.read(VM.name) == DATA
    case.backend.demote(VM.name, REPLICA, one.ref)


def test_a_superseded_primary_keeps_its_live_data(case: BackendCase) -> None:
    case.create("vm", DATA)
    case.backend.set_lineage("vm", PRIMARY)
    (one,) = case.backend.snapshot(("vm",), "one")
    case.write("vm", 0, b"!" * case.unit)
    written = case.read("vm")
    with case.in_use("vm"):
        case.backend.demote("vm", replace(PRIMARY, role=Role.REPLICA), None)
    case.reopen()
    assert case.read("vm") == written
    state = case.backend.state("vm")
    assert state is not None
    assert state.lineage == replace(PRIMARY, role=Role.REPLICA)
    assert state.head_changed
    kept = case.backend.set_aside("vm", "diverged-1")
    assert kept is not None
    assert case.read_snapshot("vm", kept) == written
    assert case.read_snapshot("vm", one) == DATA


def test_a_promoted_copy_takes_nothing(case: BackendCase) -> None:
    one = first(case)
    case.backend.promote(VM.name, PROMOTED, one.ref)
    later = replace(PRIMARY, epoch=PROMOTED.epoch + 7)
    for lineage in (PRIMARY, later, OTHER):
        with pytest.raises((NotAReplica, StaleEpoch)):
            offer(case, one, lineage)
    assert case.read(VM.name) == DATA
