"""The process is killed, or the file system is cut off from its disk, at random moments of real work."""

from __future__ import annotations

import fcntl
import os
import random
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.image_worker import content, open_pair, replicate

FS_IOC_SHUTDOWN = 0x8004587D
"""linux/fs.h; XFS and ext4 have it for just this kind of test."""
NO_LOG_FLUSH = (2).to_bytes(4, "little")


def work_until(folder: Path, delay: float, stop: Callable[[subprocess.Popen[bytes]], None]) -> list[str]:
    """Run a worker, stop it ``delay`` seconds after it is ready; the snapshots that it said are committed."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.support.image_worker", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert worker.stdout is not None and worker.stderr is not None
    try:
        line = worker.stdout.readline()
        assert line == b"ready\n", worker.stderr.read().decode()
        select.select([], [], [], delay)
        stop(worker)
    finally:
        worker.kill()
        output, _ = worker.communicate(timeout=60)
    return [text.split()[1] for text in output.decode().splitlines()]


def image(folder: Path, side: str, name: str) -> Path:
    volume = Path("=vm") if side == "source" else Path("+n", "=vm")
    return folder / side / ".replicator" / "volumes" / volume / "snapshots" / name / "image"


def check(folder: Path, committed: list[str]) -> None:
    """Whatever is listed is whole; the last that was committed is there, or a later one; the next run completes."""
    source, target = open_pair(folder)
    for side, backend, volume in (("source", source, "vm"), ("target", target, "n/vm")):
        assert not any("left out" in warning for warning in backend.info().warnings)
        state = backend.state(volume)
        for version in state.versions if state is not None else ():
            assert image(folder, side, version.name).read_bytes() == content(int(version.name[1:])), (side, version)
    mine, theirs = source.state("vm"), target.state("n/vm")
    if committed:
        assert mine is not None and theirs is not None
        least = int(committed[-1][1:])
        for state in (mine, theirs):
            assert max(int(version.name[1:]) for version in state.versions) >= least
        assert {v.guid for v in mine.versions} & {v.guid for v in theirs.versions}
    if mine is not None and mine.versions:
        newest = mine.versions[-1]
        replicate(source, target, newest)
        assert image(folder, "target", newest.name).read_bytes() == content(int(newest.name[1:]))


SPAN = 0.8
MORE = 20


def moments(number: int, committed: list[str]) -> Iterator[float]:
    """Random moments, in seconds; further and later ones where that was too soon for anything on a busy machine.

    :param committed: filled meanwhile
    """
    span = SPAN
    for turn in range(number + MORE):
        if turn >= number and committed:
            return
        yield random.uniform(0, span)
        if not committed:
            span *= 1.5


def rounds(folder: Path, number: int) -> None:
    ever: list[str] = []
    for moment in moments(number, ever):
        committed = work_until(folder, moment, lambda worker: worker.kill())
        ever += committed
        check(folder, committed)
    assert ever


def test_killed_at_random_moments_with_copies(tmp_path: Path, count: Callable[[int, int], int]) -> None:
    rounds(tmp_path, count(5, 50))


@pytest.mark.tier("xfs")
def test_killed_at_random_moments_with_reflink(xfs_dir: Path, count: Callable[[int, int], int]) -> None:
    rounds(xfs_dir, count(5, 50))


def shut_down(mount: Path) -> None:
    """From now on nothing reaches the disk, and what was only in memory is gone."""
    fd = os.open(mount, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FS_IOC_SHUTDOWN, NO_LOG_FLUSH)
    finally:
        os.close(fd)


def remount(mount: Path, disk: Path, copy: Path, *options: str) -> None:
    """Mount what is on the disk now, as after the next start. A copy of it: the old mount may live on in the mount
    namespace of any process on this machine, and its device with it."""
    subprocess.run(["cp", "--sparse=always", str(disk), str(copy)], check=True, timeout=120)
    subprocess.run(["umount", "--lazy", str(mount)], check=True, capture_output=True, timeout=60)
    where = ["-o", ",".join(["loop", *options]), str(copy), str(mount)]
    subprocess.run(["mount", *where], check=True, capture_output=True, timeout=60)


def cut_rounds(mount: Path, number: int, *options: str) -> None:
    disk = first = mount.parent / "fs.img"
    ever: list[str] = []
    for turn, moment in enumerate(moments(number, ever)):
        committed = work_until(mount, moment, lambda _: shut_down(mount))
        copy = mount.parent / f"fs-{turn}.img"
        remount(mount, disk, copy, *options)
        if disk != first:
            disk.unlink()
        disk = copy
        ever += committed
        check(mount, committed)
    assert ever


@pytest.mark.tier("xfs")
@pytest.mark.timeout(600)
def test_xfs_cut_off_from_its_disk(xfs_dir: Path, count: Callable[[int, int], int]) -> None:
    cut_rounds(xfs_dir, count(4, 40), "nouuid")


@pytest.mark.tier("ext4")
@pytest.mark.timeout(600)
def test_ext4_cut_off_from_its_disk(ext4_dir: Path, count: Callable[[int, int], int]) -> None:
    cut_rounds(ext4_dir, count(4, 40))
