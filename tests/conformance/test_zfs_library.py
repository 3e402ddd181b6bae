"""What changes snapshots, holds and bookmarks of ZFS: libzfs_core and the zfs command, held to one contract."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from backends.zfs.binding import LibraryChoice, installed
from backends.zfs.commands import SystemRunner
from backends.zfs.library import CommandLibrary, Library
from backends.zfs.listing import Listing
from backends.zfs.naming import DatasetNames
from backends.zfs.pool_state import PoolState
from backends.zfs.workers import Workers
from replicator.errors import (
    NoSuchSnapshot,
    NoSuchVolume,
    SnapshotExists,
    SnapshotHeld,
    StorageError,
    VolumeBusy,
)
from tests.support.zfs_case import POOL, ZfsCase, zfs

pytestmark = pytest.mark.tier("zfs")


@pytest.fixture
def store() -> Iterator[ZfsCase]:
    made = ZfsCase()
    made.create("a", b"1" * 65536)
    made.create("b", b"2" * 65536)
    yield made
    made.close()


@pytest.fixture(params=["libzfs_core", "command"])
def library(request: pytest.FixtureRequest, store: ZfsCase) -> Iterator[Library]:
    if request.param == "command":
        yield CommandLibrary("store", SystemRunner())
        return
    choice = LibraryChoice("store", store.root, SystemRunner(), Workers(PoolState(POOL)), installed)
    found = choice.library()
    assert found.describe() == f"libzfs_core {installed()}"
    assert choice.probe() == found.warning() == ""
    yield found
    choice.close()


def listed(store: ZfsCase, kind: str = "snapshot") -> list[str]:
    return zfs("list", "-H", "-o", "name", "-t", kind, "-s", "name", "-r", store.root).split()


def holds(name: str) -> list[str]:
    return [line.split("\t")[1] for line in zfs("holds", "-H", name).splitlines()]


def test_snapshots_are_taken_together_or_not_at_all(store: ZfsCase, library: Library) -> None:
    a, b = store.dataset("a"), store.dataset("b")
    library.snapshot([f"{a}@one", f"{b}@one"])
    assert listed(store) == [f"{a}@one", f"{b}@one"]
    groups = zfs("list", "-H", "-o", "createtxg", "-t", "snapshot", "-r", store.root).split()
    assert len(set(groups)) == 1
    with pytest.raises(SnapshotExists, match=rf"storage store: taking the snapshot .*{b}"):
        library.snapshot([f"{a}@two", f"{b}@one"])
    with pytest.raises((NoSuchSnapshot, NoSuchVolume), match="nowhere"):
        library.snapshot([f"{a}@two", f"{store.root}/nowhere@two"])
    library.snapshot([])
    assert listed(store) == [f"{a}@one", f"{b}@one"]


def test_what_keeps_snapshots_from_being_taken_is_named(store: ZfsCase, library: Library) -> None:
    a, b = store.dataset("a"), store.dataset("b")
    library.snapshot([f"{b}@one"])
    told = library.try_snapshot([f"{a}@one", f"{b}@one"])
    assert list(told) == [f"{b}@one"]
    assert isinstance(told[f"{b}@one"], SnapshotExists)
    gone = f"{store.root}/nowhere"
    told = library.try_snapshot([f"{a}@one", f"{gone}@one"])
    assert told
    assert told.keys() <= {gone, f"{gone}@one", ""}
    assert library.try_snapshot([f"{a}@one"]) == library.try_snapshot([]) == {}
    assert listed(store) == [f"{a}@one", f"{b}@one"]


def test_a_dataset_that_went_keeps_nobody_from_a_snapshot(store: ZfsCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes between the listing and the snapshot: the listing that is used was made before."""
    zfs("create", "-o", "canmount=off", store.dataset("gone"))
    before = Listing(DatasetNames("store", store.root), SystemRunner()).all()
    monkeypatch.setattr(Listing, "all", lambda _: before)
    zfs("destroy", store.dataset("gone"))
    a, gone, b = store.backend.snapshot_each([(store.backend, ("a", "gone", "b"))], "one")
    assert [a.get().name, b.get().name] == ["one", "one"]
    assert isinstance(gone.error, NoSuchVolume)
    groups = zfs("list", "-H", "-o", "createtxg", "-t", "snapshot", "-r", store.root).split()
    assert len(groups) == 2
    assert len(set(groups)) == 1


def test_storages_of_one_pool_share_a_transaction(store: ZfsCase) -> None:
    other = ZfsCase("other")
    try:
        other.create("a", b"1" * 65536)
        assert other.backend.pool == store.backend.pool == f"zfs {POOL}"
        parts = [(store.backend, ("a", "b")), (other.backend, ("a", "nowhere"))]
        taken = store.backend.snapshot_each(parts, "one")
        assert [each.version is not None for each in taken] == [True, True, True, False]
        groups = [zfs("list", "-H", "-o", "createtxg", "-t", "snapshot", "-r", case.root) for case in (store, other)]
        assert len(set("".join(groups).split())) == 1
    finally:
        other.close()


def test_what_cannot_go_keeps_nothing_else(store: ZfsCase, library: Library) -> None:
    a, b = store.dataset("a"), store.dataset("b")
    for name in ("one", "two", "three", "four"):
        library.snapshot([f"{a}@{name}", f"{b}@{name}"])
    library.bookmark(f"{a}@one", f"{a}#mark")
    library.hold(f"{a}@two", "tag")
    zfs("clone", f"{a}@three", f"{store.root}/clone")
    asked = [f"{d}@{n}" for d in (a, b) for n in ("one", "two", "three", "four", "gone")]
    failed = library.destroy([*asked, f"{a}#mark", f"{a}#gone"])
    assert sorted(failed) == [f"{a}@three", f"{a}@two"]
    assert isinstance(failed[f"{a}@two"], (VolumeBusy, SnapshotHeld))  # libzfs_core cannot tell the two
    assert isinstance(failed[f"{a}@three"], SnapshotHeld)
    assert "clone" in str(failed[f"{a}@three"])
    for name, error in failed.items():
        assert str(error).startswith(f"storage store: destroying {name} failed: ")
        assert error.hint
    assert listed(store) == [f"{a}@three", f"{a}@two"]
    assert listed(store, "bookmark") == []
    assert library.destroy([]) == {}


def test_holds(store: ZfsCase, library: Library) -> None:
    name = f"{store.dataset('a')}@one"
    library.snapshot([name])
    for _ in range(2):
        library.hold(name, "replicator:vms:n:s")
    library.hold(name, "other")
    assert sorted(holds(name)) == ["other", "replicator:vms:n:s"]
    for _ in range(2):
        library.release(name, "other")
    assert holds(name) == ["replicator:vms:n:s"]
    library.release(name, "replicator:vms:n:s")
    library.release(f"{name}-gone", "other")
    with pytest.raises(NoSuchSnapshot, match=rf"holding {name}-gone failed"):
        library.hold(f"{name}-gone", "tag")


def test_bookmarks(store: ZfsCase, library: Library) -> None:
    a = store.dataset("a")
    library.snapshot([f"{a}@one"])
    for _ in range(2):
        library.bookmark(f"{a}@one", f"{a}#replicator:vms:n:s:1")
    assert listed(store, "bookmark") == [f"{a}#replicator:vms:n:s:1"]
    with pytest.raises(NoSuchSnapshot, match="gone"):
        library.bookmark(f"{a}@gone", f"{a}#gone")


def test_what_a_send_would_write(store: ZfsCase, library: Library) -> None:
    a = store.dataset("a")
    library.snapshot([f"{a}@one"])
    store.write("a", 0, b"3" * 32768)
    library.snapshot([f"{a}@two"])
    for flags in (("-L", "-e", "-c"), ("-L", "-e", "-w")):
        for base in (None, f"{a}@one"):
            command = CommandLibrary("store", SystemRunner()).send_space(f"{a}@two", base, flags)
            assert library.send_space(f"{a}@two", base, flags) == command
            assert command is not None
    assert library.send_space(f"{a}@gone", None, ("-L",)) is None


def test_what_is_wrong_is_told_alike(store: ZfsCase, library: Library) -> None:
    a = store.dataset("a")
    library.snapshot([f"{a}@one"])
    with pytest.raises(StorageError, match=r"too long|File name"):
        library.snapshot([f"{a}@{'x' * 250}"])
    with pytest.raises(StorageError, match=r"too long|File name"):
        library.hold(f"{a}@one", "t" * 300)
    with pytest.raises(NoSuchVolume):
        store.backend.snapshot(("nowhere",), "one")


def test_a_worker_that_is_lost_makes_way_for_the_command(store: ZfsCase) -> None:
    workers = Workers(PoolState(POOL))
    choice = LibraryChoice("store", store.root, SystemRunner(), workers, installed)
    library = choice.library()
    a = store.dataset("a")
    library.snapshot([f"{a}@one"])
    ((_, idle),) = workers._idle
    idle._process.kill()
    idle._process.wait(30)
    library.snapshot([f"{a}@two"])  # a new one is asked
    assert library.warning() == ""
    assert library.describe().startswith("libzfs_core")
    choice.close()
    assert not workers._idle
