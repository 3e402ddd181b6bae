"""Verification and repair of ZFS replicas on real ZFS: what is equal, what is damaged, what cannot be read.

The source is in the pool ``tank``, the replica in a pool on a file, whose bytes a test can reach.
"""

from __future__ import annotations

import os
import re
import socket
import stat
import struct
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backends.zfs import ZfsBackend
from backends.zfs.clones import MARK
from replicator import native_verification
from replicator.cancellation import Cancellation
from replicator.cli.replicate import resync
from replicator.endpoint import Range, SnapshotRequest
from replicator.errors import NoSuchSnapshot, NotReadable, Unsupported
from replicator.local import LocalEndpoint
from replicator.model import VerifyBy, Version, VolumeId
from replicator.planning import Intermediates, SendPolicy
from replicator.rejoining import rejoin
from replicator.replication import Options, Pair, Replication
from replicator.streams import BLOCK_SIZE
from replicator.verification import Method, Verification
from tests.support.zfs_case import ZfsCase, device, zfs
from transport import checksum

POOL_SIZE = 192 << 20
LABELS = 4 << 20
"""Bytes before the first block of a device, in which its labels are."""
BLOCK = 128 << 10
KEY = "12345678"
DATA = os.urandom(3 << 20)

pytestmark = pytest.mark.tier("zfs")


def run(*argv: str, stdin: str = "") -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (argv, done.stderr)
    return done.stdout


class Site:
    """A source and a replica."""

    def __init__(self, folder: Path) -> None:
        self.case = ZfsCase("store")
        self.pool = f"replica-{uuid.uuid4().hex[:8]}"
        self.file = folder / "pool"
        with self.file.open("wb") as file:
            file.truncate(POOL_SIZE)
        # Nothing of a replica's properties is as at the source: what is stored is compared, not how it is shown.
        options = ("acltype=off", "xattr=off", "compression=zle", "mountpoint=none", "atime=off")
        run("zpool", "create", *(w for o in options for w in ("-O", o)), self.pool, str(self.file))
        run("zfs", "create", f"{self.pool}/in")
        self.target = ZfsBackend("backup", f"{self.pool}/in", checksums=checksum, info_age=0.0)
        self.pair = Pair(
            LocalEndpoint("one", {"store": self.case.backend}),
            VolumeId("store", "vm"),
            LocalEndpoint("two", {"backup": self.target}),
            VolumeId("backup", "one/vm"),
            "replicator:vms:two:backup",
        )
        self.options = Options(SendPolicy(Intermediates.NEWEST, "vms"))

    @property
    def source_dataset(self) -> str:
        return self.case.dataset("vm")

    @property
    def replica_dataset(self) -> str:
        return f"{self.pool}/in/one/vm"

    def close(self) -> None:
        self.target.close()
        subprocess.run(["zpool", "destroy", "-f", self.pool], capture_output=True, timeout=300, check=False)
        self.case.close()

    def snapshot(self, name: str) -> Version:
        self.pair.source.ensure_primary(self.pair.source_volume)
        (made,) = self.pair.source.snapshot(SnapshotRequest((self.pair.source_volume,), name))
        return made.get()

    def replicate(self, number: int = 1) -> Version:
        """Take a snapshot and bring it over."""
        made = self.snapshot(f"replicator_vms_20260101T00000{number}.000Z")
        Replication(self.pair, self.options, observer=print, cancel=Cancellation()).run()
        return made

    def verify(self, **how: object) -> Verification:
        return native_verification.verify(
            self.pair, self.options, observer=lambda _: None, cancel=Cancellation(), **how  # type: ignore[arg-type]
        )  # fmt: skip

    def repair(self, found: Verification) -> Verification:
        return native_verification.repair(
            self.pair,
            found,
            self.options,
            observer=lambda _: None,
            cancel=Cancellation(),
            renew=lambda: self.replicate(9),
        )

    def snapshots(self) -> tuple[Version, ...]:
        """Of the replica."""
        found = self.target.state("one/vm")
        assert found is not None
        return found.snapshots

    def damage(self, snapshot: Version, number: int, index: int) -> None:
        """Write garbage over a block of the replica; ``number`` of the object, ``index`` of the block in it."""
        run("zpool", "sync", self.pool)
        said = run("zdb", "-ddddd", f"{self.replica_dataset}@{snapshot.name}", str(number))
        places = re.findall(r" L0 (?:DVA\[0\]=<)?0:([0-9a-f]+):[0-9a-f]+>? ", said)
        assert len(places) > index, said
        run("zpool", "export", self.pool)
        with self.file.open("r+b") as file:
            file.seek(int(places[index], 16) + LABELS)
            file.write(os.urandom(4096))
            os.fsync(file.fileno())
        run("zpool", "import", "-d", str(self.file.parent), self.pool)

    def heals(self) -> bool:
        """Whether this OpenZFS can heal (from 2.2 on)."""
        version = re.search(r"zfs-(\d+)\.(\d+)", run("zfs", "version"))
        assert version is not None
        return (int(version[1]), int(version[2])) >= (2, 2)

    def nothing_is_left(self) -> None:
        """No clone, no hold, no mount of a verification."""
        for root in (self.case.root, self.pool):
            listed = zfs("list", "-H", "-r", "-t", "all", "-o", "name", root)
            assert MARK not in listed
            for name in listed.split("\n"):
                if "@" in name:
                    assert "verify" not in zfs("holds", "-H", name)
        assert "@" not in Path("/proc/self/mountinfo").read_text()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


@pytest.fixture
def zvol(site: Site) -> Site:
    zfs("create", "-s", "-b", "16k", "-o", "compression=off", "-V", "8M", site.source_dataset)
    site.case.write("vm", 1 << 20, DATA)
    return site


@pytest.fixture
def filesystem(site: Site) -> Site:
    mount = site.case.create_filesystem("vm", big=DATA)
    zfs("set", "compression=off", "acltype=posix", "xattr=sa", site.source_dataset)
    fill(mount)
    return site


def mount_of(site: Site) -> Path:
    return Path("/mnt", site.source_dataset)


def fill(folder: Path) -> None:
    """Everything that a filesystem can have."""
    (folder / "big").write_bytes(DATA)
    for name in (b"a b", b"..dots..", b"line\nend", b"\xff\xfe no text", "Ünï".encode(), b"-rf", b"\\", b"\t"):
        (folder / os.fsdecode(name)).write_bytes(name)
    (folder / "deep" / "er").mkdir(parents=True, mode=0o750)
    os.link(folder / "big", folder / "deep" / "same")
    (folder / "deep" / "out").symlink_to("/etc/passwd")
    (folder / "deep" / "nowhere").symlink_to(b"\xff\xfe".decode("utf-8", "surrogateescape"))
    os.mkfifo(folder / "deep" / "pipe")
    os.mknod(folder / "deep" / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(folder / "deep" / "disk", 0o660 | stat.S_IFBLK, os.makedev(8, 17))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "deep" / "sock"))
    with (folder / "sparse").open("wb") as file:
        file.truncate(1 << 34)
        file.seek(1 << 33)
        file.write(b"in the middle")
    (folder / "zeros").write_bytes(bytes(1 << 20))
    os.setxattr(folder / "big", "user.large", os.urandom(40_000))
    os.setxattr(folder / "deep", "user.small", b"\0\xff")
    os.setxattr(folder / "deep" / "out", "trusted.link", b"1", follow_symlinks=False)
    # version 2; user::rw-, user 1000:r--, group::r--, mask::r--, other::---
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, rights, who)
        for tag, rights, who in (
            (1, 6, 2**32 - 1),
            (2, 4, 1000),
            (4, 4, 2**32 - 1),
            (16, 4, 2**32 - 1),
            (32, 0, 2**32 - 1),
        )
    )
    os.setxattr(folder / "a b", "system.posix_acl_access", acl)
    os.setxattr(folder / "deep", "system.posix_acl_default", acl)
    os.chown(folder / "-rf", 12345, 54321)
    os.utime(folder / "-rf", ns=(1, -(10**18) + 7))
    for number in range(300):
        (folder / "deep" / "er" / f"{number}").write_bytes(b"%d" % number)


# -- zvols


def test_a_zvol_is_read_and_equal(zvol: Site) -> None:
    made = zvol.replicate()
    zvol.case.write("vm", 0, b"after the snapshot")
    found = zvol.verify()
    assert found.equal, (found.files, found.problems, found.ranges)
    assert (found.method, found.snapshot, found.checked) == (Method.BLOCKS, made.name, 8 << 20)
    zvol.nothing_is_left()


def test_a_clone_that_was_left_behind_is_no_volume_and_goes(zvol: Site) -> None:
    made = zvol.replicate()
    left = f"{zvol.source_dataset}{MARK}1234"
    zfs("clone", f"{zvol.source_dataset}@{made.name}", left)
    assert [v.id.name for v in zvol.case.backend.volumes()] == ["vm"]
    device(left)
    assert zvol.verify().equal
    zvol.nothing_is_left()


def test_a_damaged_zvol_is_found_and_healed(zvol: Site) -> None:
    made = zvol.replicate()
    zvol.damage(made, 1, 3)
    found = zvol.verify()
    place = (1 << 20) + 3 * (16 << 10)
    assert found.ranges == (Range(place // BLOCK_SIZE * BLOCK_SIZE, BLOCK_SIZE),), found
    assert found.differing == BLOCK_SIZE
    assert "65536 bytes of backup:one/vm on two cannot be read" in found.problems[0]
    check_repair(zvol, found)


def check_repair(site: Site, found: Verification) -> None:
    """Heals it, or, where OpenZFS cannot, says what works instead; and that does."""
    if site.heals():
        mended = site.repair(found)
        assert mended.repaired
        assert "which was taken afterwards, was verified in the same way" in mended.notes[-2]
        healed = next(v for v in site.snapshots() if v.name == found.snapshot)
        with pytest.raises(NotReadable, match="was healed"):
            site.verify(by=VerifyBy.READING, snapshot=healed.name)
        with pytest.raises(Unsupported, match="was healed"):
            site.target.clone("one/vm", healed.ref, "one/other")
    else:
        with pytest.raises(Unsupported, match=r"older than 2\.2") as raised:
            site.repair(found)
        follow(site, raised.value.hint)
    again = site.verify()
    assert again.equal, (again.files, again.problems, again.ranges)
    site.nothing_is_left()


def follow(site: Site, hint: str) -> None:
    """Do what a hint names, as the command line would."""
    command = re.search(r"`replicator resync ([^`]*)`", hint)
    assert command is not None, hint
    given = resync.make_context("resync", command[1].split()).params
    assert (given["volume"], given["target"]) == (str(site.pair.source_volume), site.pair.target_text)
    damaged = [version.guid for version in site.snapshots()]
    to = site.snapshot("replicator_vms_20260101T000009.000Z")
    done = rejoin(site.pair, to, site.options, observer=print, cancel=Cancellation(), anew=given["full"])
    assert done.made_equal
    kept = done.aside[0].partition(":")[2]
    listed = zfs("list", "-H", "-p", "-d1", "-t", "snapshot", "-o", "guid", f"{site.pool}/in/{kept}").split()
    assert set(damaged) <= set(listed), "nothing is lost"
    assert not {version.guid for version in site.snapshots()} & set(damaged)


# -- filesystems


def test_a_filesystem_is_read_and_equal_whatever_is_in_it(filesystem: Site) -> None:
    made = filesystem.replicate()
    (mount_of(filesystem) / "later").touch()
    found = filesystem.verify()
    assert found.equal, (found.files, found.problems, found.ranges)
    assert (found.method, found.snapshot) == (Method.FILES, made.name)
    assert found.entries == 1 + 1 + 8 + 2 + 7 + 2 + 300
    assert len(DATA) < found.checked < len(DATA) + (1 << 20)
    filesystem.nothing_is_left()


def test_increments_are_verified_too(filesystem: Site) -> None:
    filesystem.replicate(1)
    folder = mount_of(filesystem)
    (folder / "deep" / "er" / "7").unlink()
    (folder / "big").write_bytes(DATA[: 1 << 20])
    (folder / "deep" / "er").rename(folder / "moved")
    filesystem.replicate(2)
    found = filesystem.verify()
    assert found.equal, (found.files, found.problems, found.ranges)


def test_a_damaged_file_is_named_and_healed(filesystem: Site) -> None:
    made = filesystem.replicate()
    number = (mount_of(filesystem) / "big").stat().st_ino
    filesystem.damage(made, number, 2)
    found = filesystem.verify()
    assert [file.path for file in found.files] == ["big"], found
    assert "cannot be read in full on the target" in found.files[0].what
    assert found.files[0].ranges == (Range(2 * BLOCK, BLOCK),)
    check_repair(filesystem, found)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"?")


CHANGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "content": (lambda m: overwrite(m / "big"), "big", "content differs"),
    "acl": (lambda m: os.removexattr(m / "a b", "system.posix_acl_access"), "a b", "access control list differs"),
    "xattr": (lambda m: os.setxattr(m / "big", "user.large", b"!"), "big", "extended attributes differ"),
    "xattr of a link": (
        lambda m: os.removexattr(m / "deep/out", "trusted.link", follow_symlinks=False),
        "deep/out",
        "extended attributes differ",
    ),
    "mode": (lambda m: (m / "deep/pipe").chmod(0o777), "deep/pipe", "mode is 0777, not 0644"),
    "owner": (lambda m: os.chown(m / "zeros", 1, 2), "zeros", "owner is 1:2, not 0:0"),
    "name": (lambda m: (m / "\udcff\udcfe no text").rename(m / "x"), "\\xff\\xfe no text", "is missing"),
    "hole": (lambda m: os.truncate(m / "sparse", 1 << 33), "sparse", "size is"),
    "a line": (lambda m: (m / "line\nend").unlink(), "line\\nend", "is missing"),
}


def test_content_that_is_readable_and_different_is_named(filesystem: Site) -> None:
    """No damage makes such a replica, only an error of ZFS or a hand in it; so another snapshot stands for it here."""
    site = filesystem
    made = site.replicate(1)
    for change, _, _ in CHANGES.values():
        change(mount_of(site))
    site.replicate(2)
    found = native_verification._compare_files(
        site.pair, made, site.snapshots()[-1], site.options, observer=lambda _: None, cancel=Cancellation()
    )
    said = {file.path: "; ".join(file.what) for file in found.files}
    for name, (_, path, words) in CHANGES.items():
        assert words in said.get(path, ""), (name, said)


def test_a_snapshot_that_was_made_anew_under_its_name_is_named(filesystem: Site) -> None:
    site = filesystem
    site.replicate(1)
    second = site.replicate(2)
    name = f"{site.replica_dataset}@{second.name}"
    zfs("release", site.pair.tag, name)
    zfs("destroy", name)
    zfs("snapshot", name)
    found = site.verify()
    assert not found.equal
    assert found.snapshot != second.name
    assert f"snapshot {second.name} of backup:one/vm on two is not the source's" in found.problems[0]
    with pytest.raises(NoSuchSnapshot, match=r"not the same on both sides \(guid"):
        site.verify(snapshot=second.name)


def test_a_snapshot_that_is_mounted_where_it_hides_lists_is_not_taken_for_different(filesystem: Site) -> None:
    made = filesystem.replicate()
    zfs("set", "acltype=off", filesystem.source_dataset)
    folder = mount_of(filesystem) / ".zfs" / "snapshot" / made.name
    assert sorted(path.name for path in folder.iterdir())
    zfs("set", "acltype=posix", filesystem.source_dataset)
    assert filesystem.verify().equal


# -- what cannot be read


@pytest.fixture(params=["filesystem", "zvol"])
def encrypted(site: Site, request: pytest.FixtureRequest) -> Site:
    """A raw replica of an encrypted volume; the target has no key."""
    key = ("-o", "encryption=on", "-o", "keyformat=passphrase", "-o", "compression=off")
    if request.param == "zvol":
        run("zfs", "create", *key, "-s", "-b", "16k", "-V", "8M", site.source_dataset, stdin=KEY)
        site.case.write("vm", 1 << 20, DATA)
    else:
        mount = mount_of(site)
        run("zfs", "create", *key, "-o", f"mountpoint={mount}", site.source_dataset, stdin=KEY)
        (mount / "big").write_bytes(DATA)
    return site


def object_of_data(site: Site) -> int:
    mount = mount_of(site)
    return (mount / "big").stat().st_ino if mount.exists() else 1


def test_without_its_key_a_replica_is_verified_by_scrub_and_that_is_said(encrypted: Site) -> None:
    site = encrypted
    site.replicate()
    with pytest.raises(NotReadable, match=r"key is not loaded.*no complete scrub"):
        site.verify()
    found = site.verify(by=VerifyBy.SCRUB, scrub_now=True)
    assert found.equal, (found.files, found.problems, found.ranges)
    assert (found.method, found.checked) == (Method.SCRUB, 0)
    found = site.verify()
    assert found.equal
    assert found.method is Method.SCRUB
    assert "its key is not loaded" in found.notes[0]
    with pytest.raises(NotReadable, match="key is not loaded"):
        site.verify(by=VerifyBy.READING)
    site.nothing_is_left()


def test_with_its_key_it_is_read(encrypted: Site) -> None:
    site = encrypted
    site.replicate()
    run("zfs", "load-key", site.replica_dataset, stdin=KEY)
    found = site.verify()
    assert found.equal, (found.files, found.problems, found.ranges)
    assert found.method is not Method.SCRUB
    assert found.checked > len(DATA)
    site.nothing_is_left()


def test_a_scrub_covers_only_what_was_there_when_it_began(encrypted: Site) -> None:
    site = encrypted
    first = site.replicate(1)
    assert site.verify(by=VerifyBy.SCRUB, scrub_now=True).snapshot == first.name
    second = site.replicate(2)
    assert site.verify(by=VerifyBy.SCRUB).snapshot == first.name
    with pytest.raises(Exception, match=f"no scrub has read {second.name}"):
        site.verify(by=VerifyBy.SCRUB, snapshot=second.name)
    assert site.verify(by=VerifyBy.SCRUB, scrub_now=True).snapshot == second.name


def test_damage_of_what_cannot_be_read_is_found_by_scrub_and_healed(encrypted: Site) -> None:
    site = encrypted
    made = site.replicate()
    site.damage(made, object_of_data(site), 3)
    found = site.verify(by=VerifyBy.SCRUB, scrub_now=True)
    assert not found.equal
    assert any("is damaged" in problem and site.pool in problem for problem in found.problems), found
    if site.heals():
        mended = site.repair(found)
        assert mended.repaired, mended
        assert site.verify(by=VerifyBy.SCRUB).equal
    else:
        with pytest.raises(Unsupported, match=r"older than 2\.2"):
            site.repair(found)
