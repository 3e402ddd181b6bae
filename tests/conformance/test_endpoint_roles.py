"""Every endpoint, near or far, changes roles by compare-and-set: what comes twice or late changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replicator.endpoint import RoleChange, SnapshotRequest
from replicator.errors import ConflictError, InvalidName, NoSuchVolume, VolumeChanged
from replicator.model import Lineage, Role, StreamKind, Version, VersionRef, VolumeId
from replicator.streams import BLOCK_SIZE
from tests.support.blocks import pattern
from tests.support.endpoint_cases import NODE, REPLICA, SOURCE, EndpointCase

STREAMS = [StreamKind.BLOCKS]
DATA = pattern(2 * BLOCK_SIZE)
FAMILY = "6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00"
PRIMARY = Lineage(FAMILY, Role.PRIMARY, 1)
FOLLOWER = replace(PRIMARY, role=Role.REPLICA)
PROMOTED = Lineage(FAMILY, Role.PRIMARY, 1_000_003)


@pytest.fixture
def case(near_or_far: EndpointCase) -> EndpointCase:
    """The endpoint, with a primary of which there is a snapshot."""
    near_or_far.storage.create(REPLICA.name, DATA)
    near_or_far.storage.backend.set_lineage(REPLICA.name, PRIMARY)
    near_or_far.local.snapshot(SnapshotRequest((REPLICA,), "one"))
    return near_or_far


def newest(case: EndpointCase) -> Version:
    state = case.local.state(REPLICA)
    assert state is not None
    return state.snapshots[-1]


def lineage(case: EndpointCase) -> Lineage | None:
    state = case.local.state(REPLICA)
    return state.lineage if state is not None else None


def test_down_and_up_again(case: EndpointCase) -> None:
    at = newest(case).ref
    down = RoleChange(REPLICA, PRIMARY, FOLLOWER, at)
    up = RoleChange(REPLICA, FOLLOWER, PROMOTED, at)
    for change in (down, up):
        for _ in range(2):
            assert case.endpoint.change_role(change) == change.lineage
        case.storage.reopen()
        assert lineage(case) == change.lineage
    assert case.storage.read(REPLICA.name) == DATA


def test_what_comes_late_changes_nothing(case: EndpointCase) -> None:
    at = newest(case).ref
    case.endpoint.change_role(RoleChange(REPLICA, PRIMARY, FOLLOWER, at))
    barred = replace(FOLLOWER, epoch=2_000_001)
    assert case.endpoint.change_role(RoleChange(REPLICA, FOLLOWER, barred)) == barred
    with pytest.raises(ConflictError) as caught:
        case.endpoint.change_role(RoleChange(REPLICA, FOLLOWER, PROMOTED, at))
    assert caught.value.hint
    assert lineage(case) == barred


def test_nothing_but_these_changes(case: EndpointCase) -> None:
    at = newest(case).ref
    for expected, new in (
        (PRIMARY, replace(FOLLOWER, epoch=2)),
        (PRIMARY, Lineage("00000000-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.REPLICA, 1)),
        (FOLLOWER, PRIMARY),
        (replace(FOLLOWER, epoch=5), replace(FOLLOWER, epoch=4)),
        (replace(PRIMARY, epoch=5), replace(PRIMARY, epoch=4)),
    ):
        with pytest.raises(ConflictError):
            case.endpoint.change_role(RoleChange(REPLICA, expected, new, at))
    assert lineage(case) == PRIMARY


def test_a_change_that_changes_nothing_asks_for_leave(case: EndpointCase) -> None:
    assert case.endpoint.change_role(RoleChange(REPLICA, PRIMARY, PRIMARY)) == PRIMARY
    with pytest.raises(NoSuchVolume):
        case.endpoint.change_role(RoleChange(VolumeId("store", "two/missing"), PRIMARY, PRIMARY))


def test_only_the_newest_snapshot_is_promoted(case: EndpointCase) -> None:
    old = newest(case).ref
    case.storage.write(REPLICA.name, 0, b"!" * case.storage.unit)
    case.local.snapshot(SnapshotRequest((REPLICA,), "two"))
    with pytest.raises(VolumeChanged):
        case.endpoint.change_role(RoleChange(REPLICA, PRIMARY, FOLLOWER, old))
    case.endpoint.change_role(RoleChange(REPLICA, PRIMARY, FOLLOWER, newest(case).ref))
    with pytest.raises(VolumeChanged):
        case.endpoint.change_role(RoleChange(REPLICA, FOLLOWER, PROMOTED, old))
    assert lineage(case) == FOLLOWER


def test_copies_are_found_by_their_family(case: EndpointCase) -> None:
    case.storage.create(SOURCE.name, DATA)
    found = case.endpoint.copies(FAMILY).found
    assert [(copy.volume, copy.lineage, copy.newest) for copy in found] == [(REPLICA, PRIMARY, newest(case))]
    assert case.endpoint.copies("00000000-7f3a-4b0e-9a43-3f1f5f5a1d00").found == ()
    assert case.endpoint.sight(NODE, FAMILY).copies == case.endpoint.copies(FAMILY)


@pytest.mark.parametrize("family", ["", "x", FAMILY + "0", "../" + FAMILY])
def test_families_that_are_refused(case: EndpointCase, family: str) -> None:
    if case.remote:
        for ask in (lambda: case.endpoint.copies(family), lambda: case.endpoint.sight(NODE, family)):
            with pytest.raises(InvalidName):
                ask()
    with pytest.raises(InvalidName):
        case.endpoint.sight("../one", FAMILY)


def test_a_promotion_needs_a_snapshot_that_is_there(case: EndpointCase) -> None:
    case.endpoint.change_role(RoleChange(REPLICA, PRIMARY, FOLLOWER, newest(case).ref))
    gone = VersionRef("gone", "0" * 32)
    for at in (gone, None):
        with pytest.raises((VolumeChanged, ConflictError)):
            case.endpoint.change_role(RoleChange(REPLICA, FOLLOWER, PROMOTED, at))
    assert lineage(case) == FOLLOWER
