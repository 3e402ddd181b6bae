"""Names and links: nothing leads out of the storage's directory, nothing strange is taken for a volume."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from backends.image import ImageBackend
from backends.image.catalog import Catalog
from backends.image.durable import Files
from replicator.cancellation import Cancellation
from replicator.endpoint import ReceiveMode, ReceiveRequest
from replicator.errors import InvalidName, ReplicatorError, StorageError, VolumeBusy
from replicator.model import Lineage, Role, VolumeId
from tests.support.blocks import KEY, make_chunk, make_stream, make_version
from transport import checksum

PRIMARY = Lineage("6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.PRIMARY, 3)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"secret" * 100)
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture
def backend(root: Path) -> ImageBackend:
    return ImageBackend("store", root, checksums=checksum, warnings_age=0)


BAD_NAMES = """
. .. ../outside/secret a/../../outside/secret /etc/passwd a//b a/ .replicator/x .hidden a/.b a@b a#b a\\b lost+found
"""


@pytest.mark.parametrize("name", ["", "a\0b", "a\nb", "x" * 201, "\udcff", " a", *BAD_NAMES.split()])
def test_names_that_are_refused(backend: ImageBackend, root: Path, name: str) -> None:
    to = make_version("one", 512)
    volume = VolumeId("store", name)
    attempts = (
        lambda: backend.state(name),
        lambda: backend.snapshot((name,), "one"),
        lambda: backend.set_lineage(name, PRIMARY),
        lambda: backend.set_aside(name, "diverged-x"),
        lambda: backend.receive(ReceiveRequest(volume, PRIMARY, None, to, KEY), make_stream(), Cancellation()),
    )
    for attempt in attempts:
        with pytest.raises(InvalidName):
            attempt()
    assert list(root.iterdir()) == []
    assert sorted(path.name for path in root.parent.iterdir()) == ["outside", "store"]


def test_links_are_not_followed(backend: ImageBackend, root: Path) -> None:
    (root / "file").symlink_to(root.parent / "outside" / "secret")
    (root / "folder").symlink_to(root.parent / "outside")
    (root / "real").write_bytes(b"x" * 512)
    (root / "inside").symlink_to("real")
    for name in ("file", "folder/secret", "inside", "folder"):
        with pytest.raises(InvalidName):
            backend.snapshot((name,), "one")
    assert [volume.id.name for volume in backend.volumes()] == ["real"]
    assert sum("symbolic link" in warning for warning in backend.info().warnings) == 3


def test_a_restore_does_not_follow_links(backend: ImageBackend, root: Path) -> None:
    (root / "folder").symlink_to(root.parent / "outside")
    (root / "new").symlink_to(root.parent / "outside" / "made")
    to = make_version("one", 512)
    for name in ("folder/made", "new"):
        request = ReceiveRequest(VolumeId("store", name), None, None, to, KEY, mode=ReceiveMode.RESTORE)
        with pytest.raises(ReplicatorError):
            backend.receive(request, make_stream(make_chunk((0, b"x" * 512))), Cancellation())
    assert [path.name for path in (root.parent / "outside").iterdir()] == ["secret"]


def test_a_private_directory_of_somebody_else_is_not_used(backend: ImageBackend, root: Path) -> None:
    (root / "vm").write_bytes(b"x" * 512)
    (root / ".replicator").symlink_to(root.parent / "outside")
    with pytest.raises(StorageError):
        backend.snapshot(("vm",), "one")
    with pytest.raises(StorageError):
        backend.state("vm")
    assert [path.name for path in (root.parent / "outside").iterdir()] == ["secret"]
    (root / ".replicator").unlink()
    (root / ".replicator").mkdir()
    (root / ".replicator").chmod(0o777)
    with pytest.raises(StorageError):
        backend.snapshot(("vm",), "one")


def test_private_data_is_private(backend: ImageBackend, root: Path) -> None:
    (root / "vm").write_bytes(b"x" * 512)
    backend.snapshot(("vm",), "one")
    assert (root / ".replicator").stat().st_mode & 0o777 == 0o700
    folder = root / ".replicator" / "volumes" / "=vm"
    assert (folder / "snapshots" / "one" / "image").stat().st_mode & 0o777 == 0o400
    if (folder / "key").exists():
        assert (folder / "key").stat().st_mode & 0o777 == 0o600


def test_what_is_no_image(backend: ImageBackend, root: Path) -> None:
    os.mkfifo(root / "fifo")
    (root / "folder").mkdir()
    (root / "folder" / "vm").write_bytes(b"x" * 512)
    (root / ".vm.swp").write_bytes(b"x")
    (root / "lost+found").mkdir()
    (root / "lost+found" / "x").write_bytes(b"x")
    (root / "bad@name").write_bytes(b"x")
    (root / os.fsdecode(b"bad\xff")).write_bytes(b"x")
    assert [volume.id.name for volume in backend.volumes()] == ["folder/vm"]
    warnings = backend.info().warnings
    assert any("bad@name" in warning for warning in warnings)
    assert any("bad\\udcff" in warning for warning in warnings)
    assert all(warning.isascii() or "…" in warning for warning in warnings)
    with pytest.raises(StorageError):
        backend.snapshot(("fifo",), "one")
    assert backend.state("folder") is None


def test_a_volume_and_a_volume_below_its_name(backend: ImageBackend, root: Path) -> None:
    """As replicas they have no live image, so both names can be in use at the same time."""
    for name in ("a", "a/b", "a/b/c", "=a", "+a", "+a/=b"):
        to = make_version("one", 512)
        request = ReceiveRequest(VolumeId("store", name), PRIMARY, None, to, KEY)
        backend.receive(request, make_stream(make_chunk((0, name.encode().ljust(512, b".")))), Cancellation())
    names = [volume.id.name for volume in backend.volumes()]
    assert names == sorted(["a", "a/b", "a/b/c", "=a", "+a", "+a/=b"])
    for name in names:
        state = backend.state(name)
        assert state is not None and len(state.versions) == 1


def test_the_longest_names(backend: ImageBackend, root: Path) -> None:
    name = "/".join(["é" * 100, "b" * 200, "c" * 100])
    to = make_version("s" * 200, 512)
    request = ReceiveRequest(VolumeId("store", name), PRIMARY, None, to, KEY, hold="t" * 200)
    backend.receive(request, make_stream(make_chunk((0, b"x" * 512))), Cancellation())
    state = backend.state(name)
    assert state is not None and state.versions[0].holds == ("t" * 200,)


def test_another_writer_makes_a_volume_busy(tmp_path: Path) -> None:
    folder = tmp_path / "volume"
    folder.mkdir()
    one, other = (Catalog("store:vm", folder, Files(), lock_timeout=0.05) for _ in range(2))
    with one.writing("receiving"):
        with pytest.raises(VolumeBusy), other.writing("snapshot"):
            pass
        with other.changing("holding"):  # moments are not kept waiting by what takes long
            pass
    entered = threading.Event()
    with other.writing("snapshot"):
        entered.set()
    assert entered.is_set()
