"""Roles on ZFS: what is asked of it, in which order. Whether OpenZFS does it is for the suites on real pools."""

from __future__ import annotations

from typing import cast

import pytest

from backends.zfs import ZfsBackend, usage
from backends.zfs.binding import LibraryChoice
from replicator.endpoint import RoleChange
from replicator.errors import Unsupported, VolumeBusy, VolumeChanged
from replicator.local import LocalEndpoint
from replicator.model import Lineage, Role, Version, VolumeId
from tests.support.zfs_fake import ByCommand, FakeZfs
from transport import checksum

PRIMARY = Lineage("6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.PRIMARY, 1_000_003)
REPLICA = Lineage(PRIMARY.uuid, Role.REPLICA, PRIMARY.epoch)


@pytest.fixture
def zfs() -> FakeZfs:
    made = FakeZfs()
    made.make("tank/vm/disk")
    return made


def prepared(zfs: FakeZfs, lineage: Lineage) -> tuple[ZfsBackend, Version]:
    choice = cast(LibraryChoice, ByCommand(zfs))
    backend = ZfsBackend("store", zfs.root, checksums=checksum, runner=zfs, choice=choice)
    backend.set_lineage("disk", lineage)
    (version,) = backend.snapshot(("disk",), "one")
    zfs.asked.clear()
    return backend, version


def sets(zfs: FakeZfs) -> list[tuple[str, ...]]:
    return [args[2:-1] for args in zfs.asked if args[:2] == ("zfs", "set")]


def test_a_promotion_is_one_command(zfs: FakeZfs) -> None:
    backend, version = prepared(zfs, REPLICA)
    backend.promote("disk", PRIMARY, version.ref)
    (settings,) = sets(zfs)
    assert "readonly=off" in settings
    assert "replicator:role=primary" in settings
    assert f"replicator:epoch={PRIMARY.epoch}" in settings
    state = backend.state("disk")
    assert state is not None
    assert state.lineage == PRIMARY


def test_a_demotion_looks_only_once_nobody_can_write_any_more(zfs: FakeZfs) -> None:
    backend, version = prepared(zfs, PRIMARY)
    backend.demote("disk", REPLICA, version.ref)
    first, second = sets(zfs)
    assert first == ("readonly=on",)
    assert "readonly=on" in second
    assert "replicator:role=replica" in second
    state = backend.state("disk")
    assert state is not None
    assert state.lineage == REPLICA


def test_what_was_written_to_stays_a_primary_that_can_be_written_to(zfs: FakeZfs) -> None:
    backend, version = prepared(zfs, PRIMARY)
    zfs.write("tank/vm/disk")
    with pytest.raises(VolumeChanged):
        backend.demote("disk", REPLICA, version.ref)
    assert sets(zfs) == [("readonly=on",), ("readonly=off",)]
    state = backend.state("disk")
    assert state is not None
    assert state.lineage == PRIMARY


def test_nobody_is_promoted_or_demoted_before_that_is_proven_on_real_pools(zfs: FakeZfs) -> None:
    backend, version = prepared(zfs, REPLICA)
    node = LocalEndpoint("one", {"store": backend})
    change = RoleChange(VolumeId("store", "disk"), REPLICA, PRIMARY, version.ref)
    with pytest.raises(Unsupported, match="does not change roles yet") as caught:
        node.change_role(change)
    assert "restore" in caught.value.hint
    assert sets(zfs) == []


def test_who_uses_it_is_not_disturbed(zfs: FakeZfs, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, version = prepared(zfs, PRIMARY)
    monkeypatch.setattr(usage, "LET_GO_SECONDS", 0.0)
    zfs.busy.add("tank/vm/disk")
    with pytest.raises(VolumeBusy, match="in use by"):
        backend.demote("disk", REPLICA, version.ref)
    assert sets(zfs) == []


def test_without_the_right_to_ask_what_is_seen_has_to_do(zfs: FakeZfs) -> None:
    backend, version = prepared(zfs, PRIMARY)
    zfs.refused = "cannot execute channel program: permission denied"
    backend.demote("disk", REPLICA, version.ref)
    assert "replicator:role=replica" in sets(zfs)[-1]


def test_a_demoted_one_is_left_alone(zfs: FakeZfs) -> None:
    backend, version = prepared(zfs, REPLICA)
    zfs.busy.add("tank/vm/disk")
    backend.demote("disk", REPLICA, version.ref)
    state = backend.state("disk")
    assert state is not None
    assert state.lineage == REPLICA


def test_a_superseded_primary_becomes_read_only_as_it_is(zfs: FakeZfs) -> None:
    backend, _ = prepared(zfs, PRIMARY)
    zfs.write("tank/vm/disk")
    backend.demote("disk", REPLICA, None)
    (settings,) = sets(zfs)
    assert "readonly=on" in settings
    state = backend.state("disk")
    assert state is not None
    assert state.head_changed
