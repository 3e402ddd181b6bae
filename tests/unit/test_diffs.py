"""Export and import between storages in memory: what is refused, what is left, and what a job goes on from."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from backends.memory import MemoryBackend
from replicator.cancellation import Cancellation
from replicator.diff_identity import DiffIdentity
from replicator.endpoint import SnapshotRequest
from replicator.errors import (
    BadDiff,
    Cancelled,
    ConflictError,
    NoSuchSnapshot,
    NoSuchVolume,
    NotAReplica,
    ReplicatorError,
    SnapshotExists,
    StaleEpoch,
    StorageUnavailable,
    UsageError,
)
from replicator.export_holds import ExportHolds
from replicator.exporting import Export, Seed
from replicator.importing import Import, Imported, is_imported
from replicator.local import LocalEndpoint
from replicator.model import Lineage, Role, Version, VolumeId
from replicator.planning import SendPolicy
from replicator.replication import Options, Pair, Replication
from tests.support.blocks import changed, pattern
from transport import checksum

NOW = datetime(2026, 11, 20, 8, 0, tzinfo=UTC)
SIZE = 3 << 20
ONE = changed(pattern(SIZE), [(1 << 20, 1 << 20)])
VM, COPY = VolumeId("store", "vm"), VolumeId("backup", "prox1/vm")
TAG = "replicator:vms:prox1:backup"


class Site:
    """A node with a source and a place for copies."""

    def __init__(self, folder: Path) -> None:
        self.store = MemoryBackend("store", checksums=checksum)
        self.backup = MemoryBackend("backup", checksums=checksum)
        self.node = LocalEndpoint("prox1", {"store": self.store, "backup": self.backup})
        self.holds = ExportHolds(self.node, folder / "exports")
        self.store.create("vm", ONE)

    def take(self, name: str, *changes: tuple[int, bytes | int]) -> Version:
        for offset, what in changes:
            self.store.write("vm", offset, bytes(what) if isinstance(what, int) else what)
        (taken,) = self.node.snapshot(SnapshotRequest((VM,), name))
        return taken.get()

    def export(self, to: str, base: str | None = None, volume: VolumeId = VM) -> tuple[bytes, DiffIdentity]:
        out = bytearray()
        found = Export(self.node, volume, base, to)
        digester = found.run(out.extend, lambda: None, self.holds, observer=lambda _: None, cancel=Cancellation())
        assert found.result(digester).length == len(out)
        return bytes(out), found.identity(digester)

    def take_in(self, diff: bytes, identity: DiffIdentity | None = None, volume: VolumeId = COPY) -> Imported:
        work = Import(self.node, volume, io.BytesIO(diff).read, identity, clock=lambda: NOW)
        return work.run(checksum, observer=lambda _: None, cancel=Cancellation())

    def snapshots(self, volume: VolumeId = COPY) -> dict[str, bytes]:
        state = self.node.state(volume)
        backend = self.backup if volume.storage == "backup" else self.store
        found = state.snapshots if state is not None else ()
        return {version.name: backend.read(volume.name, version.ref) for version in found}

    def held(self) -> list[str]:
        state = self.node.state(VM)
        assert state is not None
        return [tag for version in state.versions for tag in version.holds]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.node.close()


def two_of(site: Site) -> tuple[bytes, bytes]:
    """Diffs of two snapshots, one after the other; the volume shrinks in between."""
    site.take("one")
    site.store.resize("vm", SIZE - 5000)
    site.take("two", (9, b"nine"), (70_000, 4096))
    return site.export("one")[0], site.export("two", "one")[0]


@pytest.mark.parametrize("known", [True, False], ids=["identity", "alone"])
def test_a_chain_arrives(site: Site, known: bool) -> None:
    site.take("one")
    site.take("two", (9, b"nine"), (70_000, 4096))
    site.store.resize("vm", SIZE - 5000)
    site.take("three")
    before: str | None = None
    for name in ("one", "two", "three"):
        diff, identity = site.export(name, before)
        done = site.take_in(diff, identity if known else None)
        assert (done.base, done.snapshot, done.continues) == (before, name, known)
        before = name
    assert site.snapshots() == site.snapshots(VM)
    source, copy = site.node.state(VM), site.node.state(COPY)
    assert source is not None and copy is not None and source.lineage is not None and copy.lineage is not None
    assert ([v.guid for v in source.versions] == [v.guid for v in copy.versions]) == known
    assert copy.lineage.role is Role.REPLICA
    assert (copy.lineage.uuid == source.lineage.uuid) == known
    assert is_imported(copy.lineage) != known
    if known:
        assert [v.created for v in source.versions] == [v.created for v in copy.versions]
    assert site.held() == []


def test_a_job_goes_on_from_what_was_imported(site: Site) -> None:
    site.take("one")
    diff, identity = site.export("one")
    site.take_in(diff, identity)
    site.take("replicator_vms_20261120T081710.123Z", (5, b"new"))
    pair = Pair(site.node, VM, site.node, COPY, TAG)
    run = Replication(pair, Options(SendPolicy(job="vms")), observer=lambda _: None, cancel=Cancellation())
    outcome = run.run()
    assert outcome.steps == 1
    assert outcome.done <= 64 << 10, "only what changed"
    assert site.snapshots() == site.snapshots(VM)


def test_a_copy_can_be_exported_as_its_source_can(site: Site) -> None:
    site.take("one")
    diff, identity = site.export("one")
    site.take_in(diff, identity)
    again, same = site.export("one", volume=COPY)
    assert again == diff
    assert replace(same, lineage=identity.lineage) == identity
    assert (same.lineage.uuid, same.lineage.role) == (identity.lineage.uuid, Role.REPLICA)


def test_importing_it_once_more_does_nothing_where_it_is_known(site: Site) -> None:
    site.take("one")
    diff, identity = site.export("one")
    site.take_in(diff, identity)
    done = site.take_in(diff, identity)
    assert (done.there_already, done.changed) == (True, 0)


def test_what_does_not_apply_is_refused(site: Site) -> None:
    one, two = two_of(site)
    with pytest.raises(NoSuchSnapshot, match="no volume backup:prox1/vm"):
        site.take_in(two)
    site.take_in(one)
    with pytest.raises(ConflictError, match="has snapshots already"):
        site.take_in(one)
    site.take_in(two)
    with pytest.raises(ConflictError, match="newer snapshot two") as refused:
        site.take_in(two)
    assert "--from two" in refused.value.hint
    site.take("three", (7, b"7"))
    with pytest.raises(NoSuchSnapshot, match="from snapshot three"):
        site.take("four")
        site.take_in(site.export("four", "three")[0])
    assert list(site.snapshots()) == ["one", "two"]


def test_a_snapshot_of_that_name_is_not_replaced(site: Site) -> None:
    one, _ = two_of(site)
    site.take_in(one)
    renamed = site.export("two", "one")[0].replace(b"t\x03\x00\x00\x00two", b"t\x03\x00\x00\x00one")
    with pytest.raises(SnapshotExists, match="one already"):
        site.take_in(renamed)


def test_what_was_written_to_the_copy_is_not_lost(site: Site) -> None:
    one, two = two_of(site)
    site.take_in(one)
    site.backup.write("prox1/vm", 100, b"mine")
    with pytest.raises(ConflictError, match="was written to since one"):
        site.take_in(two)
    assert site.backup.read("prox1/vm")[100:104] == b"mine"


def test_only_its_own_snapshot_is_a_base_where_it_is_known(site: Site) -> None:
    site.take("one")
    diff, identity = site.export("one")
    site.take_in(diff, identity)
    site.take("two", (9, b"nine"))
    diff, identity = site.export("two", "one")
    with pytest.raises(NoSuchSnapshot, match="guid another"):
        site.take_in(diff, replace(identity, base_guid="another"))
    site.take_in(diff, identity)


@pytest.mark.parametrize("known", [True, False], ids=["identity", "alone"])
def test_volumes_that_are_no_such_copies_are_left_alone(site: Site, known: bool) -> None:
    site.take("one")
    diff, identity = site.export("one")
    given = identity if known else None
    site.backup.create("prox1/vm", b"somebody's")
    with pytest.raises(NotAReplica):
        site.take_in(diff, given)
    for lineage in (
        Lineage(identity.lineage.uuid, Role.PRIMARY, 9),
        Lineage("2b1f2a0e-8f0b-4f0e-9c3c-6f9a1d2c7b41", Role.REPLICA, 1),
        Lineage(identity.lineage.uuid, Role.PRIMARY, 1),
    ):
        site.backup.set_lineage("prox1/vm", lineage)
        with pytest.raises((NotAReplica, StaleEpoch)):
            site.take_in(diff, given)
    assert site.backup.read("prox1/vm") == b"somebody's"


def test_a_copy_of_a_job_takes_only_what_says_that_it_is_of_it(site: Site) -> None:
    site.take("one")
    diff, identity = site.export("one")
    site.take_in(diff, identity)
    site.take("two", (9, b"nine"))
    with pytest.raises(NotAReplica, match="does not say what it is of") as refused:
        site.take_in(site.export("two", "one")[0])
    assert "--identity" in refused.value.hint


def test_the_identity_of_another_diff_is_refused(site: Site) -> None:
    site.take("one")
    site.take("two", (9, b"nine"))
    diff, _ = site.export("two", "one")
    with pytest.raises(BadDiff, match=r"the identity is of one .* and the diff is two since one"):
        site.take_in(
            diff, replace(site.export("one")[1], digests=site.export("two", "one")[1].digests, length=len(diff))
        )
    assert site.node.state(COPY) is None


@pytest.mark.parametrize("known", [True, False], ids=["identity", "alone"])
@pytest.mark.parametrize("damage", ["cut", "end missing", "garbled", "more behind"])
def test_nothing_of_a_damaged_diff_is_kept(site: Site, known: bool, damage: str) -> None:
    site.take("one")
    first, identity = site.export("one")
    site.take_in(first, identity if known else None)
    site.take("two", (9, b"nine"), (2 << 20, pattern(1 << 20, 7)))
    diff, identity = site.export("two", "one")
    wrong = {"cut": diff[:90_000], "end missing": diff[:-1], "garbled": diff[:-1] + b"?", "more behind": diff + b"x"}
    with pytest.raises(BadDiff):
        site.take_in(wrong[damage], identity if known else None)
    state = site.node.state(COPY)
    assert state is not None and state.resume is None and not state.head_changed
    assert list(site.snapshots()) == ["one"]
    site.take_in(diff, identity if known else None)
    assert site.snapshots() == site.snapshots(VM)


def test_a_damaged_first_diff_leaves_a_volume_without_snapshots(site: Site) -> None:
    site.take("one")
    diff, _ = site.export("one")
    with pytest.raises(BadDiff):
        site.take_in(diff[:-1])
    assert site.snapshots() == {}
    site.take_in(diff)
    assert site.snapshots() == site.snapshots(VM)


def test_one_that_is_cut_off_is_begun_anew(site: Site) -> None:
    one, two = two_of(site)
    site.take_in(one)
    cancel = Cancellation()
    inner = io.BytesIO(two)

    def cut(size: int) -> bytes:
        if size >= 4096:  # the bytes of a record
            cancel.cancel()
        return inner.read(size)

    with pytest.raises(Cancelled):
        Import(site.node, COPY, cut).run(checksum, observer=lambda _: None, cancel=cancel)
    assert list(site.snapshots()) == ["one"]
    site.take_in(two)
    assert site.snapshots() == site.snapshots(VM)


# -- exporting


def test_what_cannot_be_exported_is_said(site: Site) -> None:
    site.take("one")
    site.take("two")
    for volume, base, to, error in (
        (VolumeId("store", "none"), None, "one", NoSuchVolume),
        (VM, None, "three", NoSuchSnapshot),
        (VM, "three", "two", NoSuchSnapshot),
        (VM, "two", "one", UsageError),
        (VM, "two", "two", UsageError),
        (VolumeId("other", "vm"), None, "one", StorageUnavailable),
    ):
        with pytest.raises(error):
            Export(site.node, volume, base, to)


def test_both_snapshots_are_held_while_they_are_read_and_no_longer(site: Site) -> None:
    site.take("one")
    site.take("two", (0, b"x"))
    seen: list[list[str]] = []
    found = Export(site.node, VM, "one", "two")
    found.run(
        lambda _: seen.append(site.held()), lambda: None, site.holds, observer=lambda _: None, cancel=Cancellation()
    )
    assert all(len(held) == 2 and held[0].startswith("replicator:export:prox1.") for held in seen)
    assert site.held() == []

    cancel = Cancellation()

    def break_off(_: object) -> None:
        raise BrokenPipeError

    def stop(_: object) -> None:
        cancel.cancel()

    for write, error in ((break_off, BrokenPipeError), (stop, Cancelled)):
        with pytest.raises(error):
            found.run(write, lambda: None, site.holds, observer=lambda _: None, cancel=cancel)
        assert site.held() == []


def test_holds_of_an_export_that_was_killed_are_released_and_no_others(site: Site, tmp_path: Path) -> None:
    one = site.take("one")
    folder = tmp_path / "exports"
    with ExitStack() as stack:
        stack.enter_context(site.holds.held(VM, [one.ref]))
        (note,) = folder.glob("*.json")
        text = note.read_text()
        site.holds.release_abandoned()
        assert site.held() == [json.loads(text)["tag"]], "it is under way"
    assert (site.held(), list(folder.iterdir())) == ([], [])
    killed = json.loads(text)
    site.node.hold(VM, one.ref, killed["tag"])
    site.node.hold(VM, one.ref, TAG)
    note.write_text(text)
    (folder / "damaged.json").write_text("{}")
    site.holds.release_abandoned()
    assert site.held() == [TAG]
    assert [path.name for path in folder.iterdir()] == ["damaged.json"]


def test_a_seed_is_held_for_its_job_unless_the_export_failed(site: Site) -> None:
    site.take("one")
    seed = Seed("prox2", COPY, TAG)
    found = Export(site.node, VM, None, "one")
    with pytest.raises(ReplicatorError), found.kept_for(seed):
        assert site.held() == [TAG]
        raise ReplicatorError("no room", hint="")
    assert site.held() == []
    with found.kept_for(seed):
        pass
    assert site.held() == [TAG]
    again = Export(site.node, VM, None, "one")
    with pytest.raises(ReplicatorError), again.kept_for(seed):
        raise ReplicatorError("no room", hint="")
    assert site.held() == [TAG], "it was there before"
