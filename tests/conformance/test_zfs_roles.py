"""Roles of filesystems and zvols on real OpenZFS: what is mounted, open or half done; and a cut after every command."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from backends.zfs.commands import Finished, Process, SystemRunner
from replicator.errors import StorageUnavailable, VolumeBusy, VolumeChanged
from replicator.model import Role, StreamKind, Version, VersionRef, VolumeId
from tests.conformance.replicas import DATA, PRIMARY, VM, asked, first, sent, state_of
from tests.support.blocks import changed
from tests.support.zfs_case import ZfsCase, device, zfs

STREAMS = [StreamKind.NATIVE]
PROMOTED = replace(PRIMARY, epoch=1_000_004)
REPLICA = replace(PROMOTED, role=Role.REPLICA)
FS = VolumeId("store", "prox1/fs")
MARK = b"!" * 4096


def shown(case: ZfsCase, volume: str, *wanted: str) -> list[str]:
    return zfs("get", "-Hp", "-o", "value", ",".join(wanted), case.dataset(volume)).split()


def filesystem(case: ZfsCase) -> tuple[Path, Version]:
    """A mounted primary with one file, and its snapshot."""
    place = case.create_filesystem("fs", file=b"one")
    case.backend.set_lineage("fs", PRIMARY)
    (one,) = case.backend.snapshot(("fs",), "one")
    return place, one


# -- filesystems


def test_a_promoted_filesystem_can_be_mounted_and_written_to(case: ZfsCase) -> None:
    _, one = filesystem(case)
    got = sent(case, VolumeId("store", "fs"), asked(one, volume=FS))
    case.backend.promote(FS.name, PROMOTED, got.ref)
    assert shown(case, FS.name, "readonly", "canmount", "mounted") == ["off", "noauto", "no"]
    place = Path("/mnt", case.dataset(FS.name))
    zfs("set", f"mountpoint={place}", case.dataset(FS.name))
    zfs("mount", case.dataset(FS.name))
    assert (place / "file").read_bytes() == b"one"
    (place / "file").write_bytes(b"two")
    case.backend.promote(FS.name, PROMOTED, got.ref)  # it is in use by now
    assert (place / "file").read_bytes() == b"two"


def test_a_demoted_filesystem_is_unmounted(case: ZfsCase) -> None:
    place, one = filesystem(case)
    case.backend.demote("fs", replace(PRIMARY, role=Role.REPLICA), one.ref)
    assert shown(case, "fs", "readonly", "mounted", "mountpoint") == ["on", "no", str(place)]
    zfs("mount", case.dataset("fs"))
    with pytest.raises(OSError) as caught:
        (place / "file").write_bytes(b"two")
    assert caught.value.errno == errno.EROFS


def test_a_filesystem_in_use_stays_mounted_and_writable(case: ZfsCase) -> None:
    place, one = filesystem(case)
    user = subprocess.Popen(["sleep", "600"], cwd=place)
    try:
        with pytest.raises(VolumeBusy, match=rf"in use by sleep \({user.pid}\)"):
            case.backend.demote("fs", replace(PRIMARY, role=Role.REPLICA), one.ref)
        (place / "file").write_bytes(b"two")
    finally:
        user.kill()
        user.wait()
    with pytest.raises(VolumeChanged):
        case.backend.demote("fs", replace(PRIMARY, role=Role.REPLICA), one.ref)
    assert shown(case, "fs", "readonly", "mounted") == ["off", "yes"]
    (place / "file").write_bytes(b"three")


def test_a_filesystem_that_is_mounted_where_nobody_sees_it_is_in_use(case: ZfsCase) -> None:
    place, one = filesystem(case)
    elsewhere = subprocess.Popen(["unshare", "--mount", "sleep", "600"], cwd="/")
    try:
        while Path(f"/proc/{elsewhere.pid}/comm").read_text() != "sleep\n":
            assert elsewhere.poll() is None
        with pytest.raises(VolumeBusy, match="in use by"):
            case.backend.demote("fs", replace(PRIMARY, role=Role.REPLICA), one.ref)
        assert shown(case, "fs", "readonly", "mounted") == ["off", "yes"]
        (place / "new").write_bytes(b"x")
    finally:
        elsewhere.kill()
        elsewhere.wait()


def test_what_is_mounted_below_is_not_unmounted_with_it(case: ZfsCase) -> None:
    _, one = filesystem(case)
    zfs("create", case.dataset("fs/below"))
    with pytest.raises(VolumeBusy, match="fs/below is mounted in a folder of it"):
        case.backend.demote("fs", replace(PRIMARY, role=Role.REPLICA), one.ref)
    assert shown(case, "fs", "readonly", "mounted") == ["off", "yes"]


def test_a_superseded_filesystem_is_read_only_under_its_writer(case: ZfsCase) -> None:
    place, _ = filesystem(case)
    with (place / "open").open("wb", buffering=0) as file:
        file.write(b"before")
        case.backend.demote("fs", replace(PRIMARY, role=Role.REPLICA), None)
        with pytest.raises(OSError) as caught:
            file.write(b"after")
        assert caught.value.errno == errno.EROFS
    state = case.backend.state("fs")
    assert state is not None
    assert state.lineage == replace(PRIMARY, role=Role.REPLICA)


# -- zvols


def opened_for_writing(case: ZfsCase, volume: str) -> bool:
    """Whether it can be, at once."""
    try:
        os.close(os.open(device(case.dataset(volume)), os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        assert error.errno == errno.EROFS
        return False
    return True


def test_the_device_follows_before_the_call_returns(case: ZfsCase) -> None:
    one = first(case)
    for epoch in range(1, 4):
        lineage = replace(PROMOTED, epoch=PROMOTED.epoch + epoch)
        case.backend.promote(VM.name, lineage, one.ref)
        assert opened_for_writing(case, VM.name)
        case.backend.demote(VM.name, replace(lineage, role=Role.REPLICA), one.ref)
        assert not opened_for_writing(case, VM.name)


@contextlib.contextmanager
def mounted(path: Path, folder: Path) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", path, folder], check=True, timeout=60)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True, timeout=60)


def test_a_zvol_with_a_mounted_filesystem_is_in_use(case: ZfsCase, tmp_path: Path) -> None:
    case.create("vm", bytes(8 << 20))
    case.backend.set_lineage("vm", PRIMARY)
    path = device(case.dataset("vm"))
    subprocess.run(["mkfs.ext4", "-q", path], check=True, timeout=60)
    (one,) = case.backend.snapshot(("vm",), "one")
    with mounted(path, tmp_path / "mnt"):
        with pytest.raises(VolumeBusy, match="in use by a mount at"):
            case.backend.demote("vm", replace(PRIMARY, role=Role.REPLICA), one.ref)
        (tmp_path / "mnt" / "file").write_bytes(b"x")
    assert shown(case, "vm", "readonly") == ["off"]


def test_a_zvol_without_a_device_changes_its_role(case: ZfsCase) -> None:
    one = first(case)
    zfs("set", "volmode=none", case.dataset(VM.name))
    case.backend.promote(VM.name, PROMOTED, one.ref)
    assert shown(case, VM.name, "readonly") == ["off"]
    case.backend.demote(VM.name, REPLICA, one.ref)
    assert shown(case, VM.name, "readonly") == ["on"]


# -- what somebody wrote to a replica, and cuts


def written_to(case: ZfsCase) -> tuple[Version, VersionRef]:
    """A replica that was written to, and what was kept of it."""
    one = first(case)
    case.write(VM.name, 0, MARK)
    kept = case.backend.set_aside(VM.name, "diverged-1")
    assert kept is not None
    return one, kept


def test_what_was_written_to_a_replica_is_not_in_the_primary(case: ZfsCase) -> None:
    one, kept = written_to(case)
    case.backend.hold(VM.name, one.ref, "replicator:rejoin:prox1")
    case.backend.promote(VM.name, PROMOTED, one.ref)
    assert case.read(VM.name) == DATA
    assert opened_for_writing(case, VM.name)
    state = state_of(case)
    assert (state.lineage, [v.name for v in state.versions]) == (PROMOTED, ["one"])
    assert state.versions[0].holds == ("replicator:rejoin:prox1",)
    assert case.read_snapshot(f"{VM.name}-diverged-1", kept) == changed(DATA, [(0, MARK)])


def test_what_was_written_to_a_replica_and_is_not_kept_is_not_lost(case: ZfsCase) -> None:
    one = first(case)
    case.write(VM.name, 0, MARK)
    with pytest.raises(VolumeChanged):
        case.backend.promote(VM.name, PROMOTED, one.ref)
    assert case.read(VM.name) == changed(DATA, [(0, MARK)])


class Cut:
    """Runs commands until one that changes something has one too many before it; that one, and all after it, fail."""

    def __init__(self, left: int) -> None:
        self._system = SystemRunner()
        self._left = left

    def run(self, argv: Sequence[str], deadline: float) -> Finished:
        if argv[1] not in ("list", "get", "holds", "version"):
            self._left -= 1
        if self._left < 0:
            raise StorageUnavailable("cut", hint="")
        return self._system.run(argv, deadline)

    def read_from(self, argv: Sequence[str]) -> Process:
        return self._system.read_from(argv)

    def write_to(self, argv: Sequence[str]) -> Process:
        if self._left <= 0:
            raise StorageUnavailable("cut", hint="")
        return self._system.write_to(argv)


def cut_everywhere(case: ZfsCase, change: Callable[[], None]) -> int:
    """Make a change that is cut after no command, after one, and so on, until it is not cut any more; how often."""
    for commands in range(20):
        case.reopen(Cut(commands))
        with contextlib.suppress(StorageUnavailable):
            change()
            case.reopen()
            return commands
        case.reopen()
        found = case.backend.state(VM.name)
        assert found is not None
        assert found.lineage is not None
        writable = shown(case, VM.name, "readonly") == ["off"]
        assert not (writable and found.lineage.role is Role.REPLICA)
    raise AssertionError("never done")


def test_a_promotion_that_is_cut_is_finished_by_another_one(case: ZfsCase) -> None:
    one, kept = written_to(case)
    assert cut_everywhere(case, lambda: case.backend.promote(VM.name, PROMOTED, one.ref)) > 0
    assert state_of(case).lineage == PROMOTED
    assert case.read(VM.name) == DATA
    assert case.read_snapshot(f"{VM.name}-diverged-1", kept) == changed(DATA, [(0, MARK)])
    assert opened_for_writing(case, VM.name)


def test_a_demotion_that_is_cut_is_finished_by_another_one(case: ZfsCase) -> None:
    one = first(case)
    case.backend.promote(VM.name, PROMOTED, one.ref)
    assert cut_everywhere(case, lambda: case.backend.demote(VM.name, REPLICA, one.ref)) > 0
    state = state_of(case)
    assert (state.lineage, state.head_changed) == (REPLICA, False)
    assert not opened_for_writing(case, VM.name)


def test_a_primary_that_a_cut_left_read_only_is_put_in_order(case: ZfsCase) -> None:
    one = first(case)
    case.backend.promote(VM.name, PROMOTED, one.ref)
    zfs("set", "readonly=on", case.dataset(VM.name))
    case.backend.promote(VM.name, PROMOTED, one.ref)
    assert opened_for_writing(case, VM.name)
