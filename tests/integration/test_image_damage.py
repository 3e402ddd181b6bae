"""Damaged, truncated, vanished and full: each gives its clear error, loses nothing complete, and heals."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.image import ImageBackend
from backends.image.durable import Files
from replicator.cancellation import Cancellation
from replicator.endpoint import DigestRequest, ReceiveMode, ReceiveRequest, SendRequest
from replicator.errors import DamagedData, NoSpace, StorageUnavailable, VolumeBusy, VolumeChanged
from replicator.model import Lineage, Role, Version, VolumeId
from replicator.streams import BLOCK_SIZE, Stream
from tests.support.blocks import KEY, apply, changed, full_chunks, make_stream, make_version, pattern, untouched_stream
from transport import checksum

PRIMARY = Lineage("6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.PRIMARY, 3)
SIZE = 40 * BLOCK_SIZE + 100
DATA = pattern(SIZE)


def make(folder: Path, files: Files | None = None) -> ImageBackend:
    folder.mkdir(exist_ok=True)
    return ImageBackend("store", folder, checksums=checksum, files=files, warnings_age=0)


def sending(backend: ImageBackend, base: Version | None, to: Version) -> Stream:
    request = SendRequest(VolumeId("store", "vm"), base.ref if base else None, to.ref, KEY)
    return backend.send(request, Cancellation())


def receiving(backend: ImageBackend, to: Version, stream: Stream, **more: object) -> Version:
    request = ReceiveRequest(VolumeId("store", "vm"), PRIMARY, None, to, KEY, **more)  # type: ignore[arg-type]
    with stream:
        return backend.receive(request, stream, Cancellation())


def private(folder: Path) -> Path:
    return folder / ".replicator" / "volumes" / "=vm"


def flip(path: Path, offset: int) -> None:
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


@pytest.fixture
def source(tmp_path: Path) -> ImageBackend:
    """A source without reflink, with an image ``vm``."""
    backend = make(tmp_path / "store")
    if backend.info().detail.startswith("reflink"):
        pytest.fail("the temporary directory is on a file system with reflink: give pytest another with --basetemp")
    (tmp_path / "store" / "vm").write_bytes(DATA)
    return backend


def two_snapshots(source: ImageBackend, folder: Path) -> tuple[Version, Version, bytes]:
    (one,) = source.snapshot(("vm",), "one")
    after = changed(DATA, [(3 * BLOCK_SIZE + 4096, b"three"), (30 * BLOCK_SIZE, b"thirty")])
    (folder / "vm").write_bytes(after)
    (two,) = source.snapshot(("vm",), "two")
    return one, two, after


def test_a_bit_flipped_in_a_source_snapshot_is_not_sent(source: ImageBackend, tmp_path: Path) -> None:
    one, two, after = two_snapshots(source, tmp_path / "store")
    image = private(tmp_path / "store") / "snapshots" / "two" / "image"
    flip(image, 30 * BLOCK_SIZE + 9)
    for base in (None, one):
        with pytest.raises(DamagedData) as raised, sending(source, base, two) as stream:
            for _ in stream:
                pass
        assert str(30 * BLOCK_SIZE) in str(raised.value)
        assert "vm@two" in str(raised.value)
    flip(image, 30 * BLOCK_SIZE + 9)
    assert bytes(apply(sending(source, one, two), DATA, SIZE).data) == after


def test_a_bit_flipped_in_the_base_costs_no_correctness(source: ImageBackend, tmp_path: Path) -> None:
    one, two, after = two_snapshots(source, tmp_path / "store")
    base = private(tmp_path / "store") / "snapshots" / "one" / "image"
    base.chmod(0o600)
    with base.open("r+b") as file:  # just what makes the changed piece look unchanged
        file.seek(3 * BLOCK_SIZE + 4096)
        file.write(b"three")
    applied = apply(sending(source, one, two), DATA, SIZE)
    assert bytes(applied.data) == after


@pytest.mark.parametrize("where", [0, 9, 40, 64, 64 + 16 * 3, -40, -1])
def test_a_damaged_digest_file_is_noticed_and_made_anew(
    source: ImageBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture, where: int
) -> None:
    one, two, after = two_snapshots(source, tmp_path / "store")
    digests = private(tmp_path / "store") / "snapshots" / "two" / "digests"
    right = digests.read_bytes()
    flip(digests, where % len(right))
    assert source.estimate("vm", one.ref, two.ref) is None
    with caplog.at_level(logging.WARNING):
        assert bytes(apply(sending(source, one, two), DATA, SIZE).data) == after
    assert "digests of store:vm@two are made anew" in caplog.text
    assert digests.read_bytes() == right
    assert source.estimate("vm", one.ref, two.ref) == 2 * BLOCK_SIZE


@pytest.mark.parametrize("damage", ["truncated", "gone", "key"])
def test_a_missing_digest_file_or_key_is_made_anew(source: ImageBackend, tmp_path: Path, damage: str) -> None:
    one, two, after = two_snapshots(source, tmp_path / "store")
    digests = private(tmp_path / "store") / "snapshots" / "one" / "digests"
    if damage == "truncated":
        os.truncate(digests, 100)
    elif damage == "gone":
        digests.unlink()
    else:
        (private(tmp_path / "store") / "key").unlink()
    assert bytes(apply(sending(source, one, two), DATA, SIZE).data) == after
    assert source.estimate("vm", one.ref, two.ref) == 2 * BLOCK_SIZE


@pytest.mark.parametrize("damage", ["truncated", "longer", "no image", "no record", "bad record", "a file"])
def test_a_snapshot_that_is_not_whole_is_left_out_and_replaced(tmp_path: Path, damage: str) -> None:
    backend = make(tmp_path / "store")
    one = make_version("one", SIZE)
    receiving(backend, one, make_stream(*full_chunks(DATA)))
    folder = private(tmp_path / "store") / "snapshots" / "one"
    if damage in ("truncated", "longer"):
        os.truncate(folder / "image", SIZE - 1 if damage == "truncated" else SIZE + 1)
    elif damage == "no image":
        (folder / "image").unlink()
    elif damage == "no record":
        (folder / "meta.json").unlink()
    elif damage == "bad record":
        (folder / "meta.json").write_text('{"format": 1, "guid": 7}')
    else:
        Files().remove_tree(folder)
        folder.write_text("?")
    state = backend.state("vm")
    assert state is not None and state.versions == ()
    assert any("'one'" in warning and "left out" in warning for warning in backend.info().warnings)
    receiving(backend, one, make_stream(*full_chunks(DATA)))
    assert (folder / "image").read_bytes() == DATA
    assert not any("left out" in warning for warning in backend.info().warnings)


def test_a_damaged_lineage_is_never_taken_for_none(source: ImageBackend, tmp_path: Path) -> None:
    source.set_lineage("vm", PRIMARY)
    (tmp_path / "store" / "other").write_bytes(b"x" * 512)
    (private(tmp_path / "store") / "lineage.json").write_text("{")
    with pytest.raises(DamagedData):
        source.state("vm")
    with pytest.raises(DamagedData):
        receiving(source, make_version("one", SIZE), untouched_stream())
    assert [volume.id.name for volume in source.volumes()] == ["other", "vm"]
    assert any("lineage.json" in warning for warning in source.info().warnings)


class Interfering(Files):
    """Does something to the source when the first bytes of its copy are written."""

    def __init__(self, path: Path, how: str) -> None:
        self.path = path
        self.how = how

    def write_at(self, fd: int, data: memoryview, offset: int) -> None:
        if self.how == "truncate":
            os.truncate(self.path, BLOCK_SIZE)
        elif self.how == "replace":
            self.path.with_name("new").write_bytes(b"new")
            self.path.with_name("new").rename(self.path)
        self.how = ""
        super().write_at(fd, data, offset)


@pytest.mark.parametrize("how", ["truncate", "replace"])
def test_a_source_that_changes_while_it_is_copied(source: ImageBackend, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "store"
    (before,) = source.snapshot(("vm",), "before")
    interfered = make(folder, Interfering(folder / "vm", how))
    with pytest.raises(VolumeChanged):
        interfered.snapshot(("vm",), "during")
    state = source.state("vm")
    assert state is not None and state.versions == (before,)
    assert [path.name for path in (private(folder) / "snapshots").iterdir()] == ["before"]
    (after,) = source.snapshot(("vm",), "after")
    assert after.size == (folder / "vm").stat().st_size


def test_a_source_that_grows_while_it_is_copied_is_copied_as_long_as_it_was(
    source: ImageBackend, tmp_path: Path
) -> None:
    class Growing(Files):
        def write_at(self, fd: int, data: memoryview, offset: int) -> None:
            with (tmp_path / "store" / "vm").open("ab") as file:
                file.write(b"more")
            super().write_at(fd, data, offset)

    (taken,) = make(tmp_path / "store", Growing()).snapshot(("vm",), "one")
    assert taken.size == SIZE
    assert bytes(apply(sending(source, None, taken), b"", SIZE).data) == DATA


def fill_up(folder: Path) -> None:
    with (folder / "filler").open("wb") as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes([1]) * (1 << 20))
            file.flush()


def check_disk_full(folder: Path, size: int) -> None:
    backend = make(folder)
    data = pattern(1 << 20, 7) * (size >> 20)
    small = make_version("small", SIZE)
    receiving(backend, small, make_stream(*full_chunks(DATA)))
    big = make_version("big", len(data))
    with pytest.raises(NoSpace) as raised:
        receiving(backend, big, make_stream(*full_chunks(data, 1 << 20)))
    assert "store" in str(raised.value) and "free" in str(raised.value)
    state = backend.state("vm")
    assert state is not None and [v.name for v in state.versions] == ["small"]
    assert (private(folder) / "snapshots" / "small" / "image").read_bytes() == DATA
    assert state.resume is not None and state.resume.to_guid == big.guid
    backend.abort_receive("vm")
    third = data[: len(data) // 3]
    fits = make_version("fits", len(third))
    receiving(backend, fits, make_stream(*full_chunks(third, 1 << 20)))
    assert (private(folder) / "snapshots" / "fits" / "image").read_bytes() == third


@pytest.mark.tier("ext4")
def test_disk_full_on_ext4(small_ext4_dir: Path) -> None:
    check_disk_full(small_ext4_dir / "store", 96 << 20)


@pytest.mark.tier("xfs")
def test_disk_full_on_xfs(small_xfs_dir: Path) -> None:
    check_disk_full(small_xfs_dir / "store", 400 << 20)


@pytest.mark.tier("ext4")
def test_a_receive_cut_by_a_full_disk_continues_once_there_is_room(small_ext4_dir: Path) -> None:
    folder = small_ext4_dir / "store"
    backend = make(folder)
    fill_up(folder)
    os.truncate(folder / "filler", (folder / "filler").stat().st_size - (4 << 20))
    data = pattern(12 << 20, 3)
    to = make_version("big", len(data))
    with pytest.raises(NoSpace):
        receiving(backend, to, make_stream(*full_chunks(data, 1 << 20)))
    state = backend.state("vm")
    assert state is not None and state.resume is not None
    (folder / "filler").unlink()
    rest = [chunk for chunk in full_chunks(data, 1 << 20) if chunk.end > state.resume.offset]
    receiving(backend, to, make_stream(*rest), resume=state.resume)
    assert (private(folder) / "snapshots" / "big" / "image").read_bytes() == data


@pytest.mark.tier("ext4")
def test_a_snapshot_that_does_not_fit_leaves_nothing(small_ext4_dir: Path) -> None:
    folder = small_ext4_dir / "store"
    backend = make(folder)
    (folder / "vm").write_bytes(pattern(40 << 20, 5))
    with pytest.raises(NoSpace):
        backend.snapshot(("vm",), "one")
    state = backend.state("vm")
    assert state is not None and state.versions == ()
    assert list((private(folder) / "snapshots").iterdir()) == []
    os.truncate(folder / "vm", 8 << 20)
    backend.snapshot(("vm",), "one")


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    backend = ImageBackend("store", tmp_path / "missing", checksums=checksum)
    assert backend.capabilities
    for call in (backend.info, backend.volumes, lambda: backend.state("vm"), lambda: backend.snapshot(("vm",), "one")):
        with pytest.raises(StorageUnavailable) as raised:
            call()
        assert str(tmp_path / "missing") in str(raised.value) and raised.value.hint
    assert not (tmp_path / "missing").exists()


def test_a_damaged_replica_is_rebuilt_and_the_damaged_one_kept(tmp_path: Path) -> None:
    backend = make(tmp_path / "store")
    one = make_version("one", SIZE)
    receiving(backend, one, make_stream(*full_chunks(DATA)))
    image = private(tmp_path / "store") / "snapshots" / "one" / "image"
    flip(image, 5 * BLOCK_SIZE)
    damaged = image.read_bytes()
    part = full_chunks(DATA, BLOCK_SIZE)[5:6]
    request = ReceiveRequest(
        VolumeId("store", "vm"), PRIMARY, one.ref, one, KEY, mode=ReceiveMode.REBUILD, aside="diverged-x"
    )
    backend.receive(request, make_stream(*part), Cancellation())
    assert image.read_bytes() == DATA
    assert (private(tmp_path / "store") / "snapshots" / "diverged-x" / "image").read_bytes() == damaged
    digests = b"".join(
        batch.digests for batch in backend.digests(DigestRequest(VolumeId("store", "vm"), one.ref, KEY), Cancellation())
    )
    assert digests == checksum.digest_blocks(DATA, bytes.fromhex(KEY))


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A loop device over a file of data."""
    (tmp_path / "disk").write_bytes(pattern(8 << 20, 11))
    made = subprocess.run(
        ["losetup", "--find", "--show", str(tmp_path / "disk")], check=True, capture_output=True, text=True, timeout=30
    )
    path = Path(made.stdout.strip())
    yield path
    subprocess.run(["losetup", "--detach", str(path)], check=True, timeout=30)


def check_device(folder: Path, device: Path) -> ImageBackend:
    folder.mkdir()
    backend = ImageBackend("store", folder, checksums=checksum, devices={"vm": device})
    assert [(volume.id.name, volume.size) for volume in backend.volumes()] == [("vm", 8 << 20)]
    before = pattern(8 << 20, 11)
    (one,) = backend.snapshot(("vm",), "one")
    assert bytes(apply(sending(backend, None, one), b"", 8 << 20).data) == before
    after = changed(before, [(3 << 20, b"new" * 5000), (5 << 20, 70000)])
    with device.open("r+b") as file:
        file.write(after)
        os.fsync(file.fileno())
    (two,) = backend.snapshot(("vm",), "two")
    applied = apply(sending(backend, one, two), before, 8 << 20)
    assert bytes(applied.data) == after
    assert applied.written <= 1 << 17
    return backend


@pytest.mark.tier("root")
def test_a_block_device_as_source(tmp_path: Path, device: Path) -> None:
    check_device(tmp_path / "store", device)


@pytest.mark.tier("xfs")
def test_snapshots_of_a_block_device_share_their_blocks(xfs_dir: Path, device: Path) -> None:
    before = os.statvfs(xfs_dir).f_bfree
    check_device(xfs_dir / "store", device)
    status = os.statvfs(xfs_dir)
    assert (before - status.f_bfree) * status.f_frsize < 10 << 20


@pytest.mark.tier("ext4")
def test_a_storage_that_must_be_mounted_is_not_there_otherwise(tmp_path: Path, small_ext4_dir: Path) -> None:
    folder = tmp_path / "not-mounted"
    folder.mkdir()
    (folder / "a.raw").write_bytes(b"x" * 4096)
    there = ImageBackend("images", small_ext4_dir, checksums=checksum, mount_point=True)
    gone = ImageBackend("images", folder, checksums=checksum, mount_point=True)
    assert there.volumes() == ()
    for look in (gone.volumes, gone.info, lambda: gone.state("a.raw"), lambda: gone.snapshot(("a.raw",), "s")):
        with pytest.raises(StorageUnavailable, match="nothing is mounted there"):
            look()
    assert sorted(path.name for path in folder.iterdir()) == ["a.raw"]


@pytest.mark.tier("ext4")
def test_live_data_in_use_is_not_set_aside(tmp_path: Path, ext4_dir: Path) -> None:
    """What a guest that still runs would write on would be lost with the name of its file."""
    backend = ImageBackend("images", ext4_dir, checksums=checksum)
    live = ext4_dir / "a.raw"
    live.write_bytes(os.urandom(1 << 20))
    with subprocess.Popen(["sleep", "60"], stdin=live.open("rb")) as user:
        try:
            with pytest.raises(VolumeBusy, match=rf"sleep \({user.pid}\)"):
                backend.set_aside("a.raw", "diverged-x")
        finally:
            user.kill()
    device = subprocess.run(
        ["losetup", "--find", "--show", str(live)], check=True, capture_output=True, text=True, timeout=30
    ).stdout.strip()
    try:
        with pytest.raises(VolumeBusy, match=device):
            backend.set_aside("a.raw", "diverged-x")
    finally:
        subprocess.run(["losetup", "--detach", device], check=True, timeout=30)
    assert live.exists()
    assert backend.set_aside("a.raw", "diverged-x") is not None
    assert not live.exists()
