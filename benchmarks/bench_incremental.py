"""Incremental replication of a disk image, beside rsync and a full copy.

    python -m benchmarks.bench_incremental [--quick] [--json FILE] [--directory DIR]

An image of 8 GiB (quick: 1 GiB), all of it data, gets scattered changes of 4 to 64 KiB. Ours is a snapshot, a send and
a receive of it in this process, from one storage into another of the same file system, every byte verified and durable
at the end. The peers are told to write through, too. Needs root (loop mounts), and up to five times the image's size of
disk.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from backends.image import ImageBackend
from benchmarks.report import Result, compare, print_table, write_json
from replicator.cancellation import Cancellation
from replicator.endpoint import DigestRequest, ReceiveRequest, SendRequest
from replicator.model import Lineage, Role, Version, VolumeId
from replicator.streams import BLOCK_SIZE, BlockChunk, Chunk, ChunkStream, Stream
from transport import checksum

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
GB = 1e9

REFLINK = "Incremental replication with reflink (XFS)"
COPIES = "Incremental replication without reflink (ext4)"
HASHING = "Hashing where copies do not share blocks (ext4)"

LINEAGE = Lineage("6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.PRIMARY, 1)
_MKFS = {"xfs": ("mkfs.xfs", "-q", "-m", "reflink=1"), "ext4": ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0")}


@contextmanager
def mounted(folder: Path, kind: str, size: int) -> Iterator[Path]:
    """A fresh file system of that kind in a sparse file."""
    image, mount = folder / f"{kind}.img", folder / kind
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run([*_MKFS[kind], str(image)], check=True, capture_output=True, timeout=120)
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True, capture_output=True, timeout=60)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True, capture_output=True, timeout=300)
        image.unlink()
        mount.rmdir()


def fill(path: Path, size: int) -> None:
    """An image without any hole or block of zeros."""
    part = random.Random(1).randbytes(16 * MIB)
    with path.open("wb") as file:
        for number in range(0, size, len(part)):
            file.write(number.to_bytes(8, "little"))
            file.write(part[8 : min(len(part), size - number)])
        os.fsync(file.fileno())


def change(path: Path, amount: int, seed: int) -> int:
    """Write ``amount`` bytes or a little more in pieces of 4 to 64 KiB all over the image; the bytes written."""
    rng = random.Random(seed)
    size, done = path.stat().st_size, 0
    with path.open("r+b", buffering=0) as file:
        while done < amount:
            length = rng.randrange(1, 17) * 4 * KIB
            os.pwrite(file.fileno(), rng.randbytes(length), rng.randrange((size - length) // 4096) * 4096)
            done += length
        os.fsync(file.fileno())
    return done


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass
class Figures:
    """What one incremental step took.

    :ivar changed: bytes written to the image before it
    :ivar sent: bytes of data in the stream
    """

    snapshot: float
    transfer: float
    changed: int
    sent: int

    @property
    def total(self) -> float:
        """Seconds from asking for the snapshot to the replica's being durable."""
        return self.snapshot + self.transfer


class Bench:
    """A source and a target storage on one file system, with one image."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size
        for name in ("source", "target", "peer"):
            (folder / name).mkdir()
        self.live = folder / "source" / "vm"
        self.source = ImageBackend("source", folder / "source", checksums=checksum)
        self.target = ImageBackend("target", folder / "target", checksums=checksum)
        self.base: Version | None = None
        self.sent = 0
        fill(self.live, size)

    def _counted(self, stream: Stream) -> ChunkStream:
        def chunks() -> Iterator[Chunk]:
            for chunk in stream:
                if isinstance(chunk, BlockChunk):
                    self.sent += len(chunk.data)
                yield chunk

        return ChunkStream(stream.kind, chunks(), on_close=stream.close)

    def _transfer(self, to: Version) -> None:
        base = self.base.ref if self.base else None
        key = secrets.token_hex(32)
        cancel = Cancellation()
        send = SendRequest(VolumeId("source", "vm"), base, to.ref, key)
        with self._counted(self.source.send(send, cancel)) as stream:
            self.target.receive(ReceiveRequest(VolumeId("target", "n/vm"), LINEAGE, base, to, key), stream, cancel)

    def step(self, changed: int) -> Figures:
        """Replicate what changed since the step before."""
        taken: list[Version] = []
        name = f"s{datetime.now().timestamp()}"  # noqa: DTZ005 - only a name
        snapshot = timed(lambda: taken.extend(self.source.snapshot(("vm",), name)))
        self.sent = 0
        transfer = timed(lambda: self._transfer(taken[0]))
        if self.base is not None:
            self.source.destroy("vm", self.base.ref)
            self.target.destroy("n/vm", self.base.ref)
        self.base = taken[0]
        return Figures(snapshot, transfer, changed, self.sent)

    def peers(self, amount: int) -> tuple[float, float]:
        """Seconds of rsync for ``amount`` of changes, and of a full copy, of the live image."""
        copy = self.folder / "peer" / "vm"
        subprocess.run(["cp", "--sparse=auto", "--reflink=never", str(self.live), str(copy)], check=True, timeout=3600)
        change(self.live, amount, seed=99)
        # Without --ignore-times it would believe two files of one size and one second to be equal.
        options = ("--inplace", "--no-whole-file", "--ignore-times")
        rsync = timed(lambda: _run_synced(copy, "rsync", *options, str(self.live), str(copy)))
        copy.unlink()
        full = timed(lambda: _run_synced(copy, "cp", "--sparse=auto", "--reflink=never", str(self.live), str(copy)))
        copy.unlink()
        return rsync, full

    def digest_rate(self, rounds: int) -> float:
        """Bytes a second of digesting a part of the newest snapshot, read from the cache; the best of some rounds."""
        assert self.base is not None
        length = min(self.size, GIB)
        request = DigestRequest(VolumeId("source", "vm"), self.base.ref, secrets.token_hex(32), length=length)
        return length / min(
            timed(lambda: [None for _ in self.source.digests(request, Cancellation())]) for _ in range(rounds)
        )


def _run_synced(result: Path, *argv: str) -> None:
    subprocess.run(argv, check=True, timeout=3600)
    with result.open("rb") as file:
        os.fsync(file.fileno())


def checksum_rate(rounds: int) -> float:
    """Bytes a second of the checksum path alone, on one core."""
    data, key = random.Random(2).randbytes(64 * MIB), bytes(32)
    digests = bytearray(len(data) // BLOCK_SIZE * 16)
    work = [timed(lambda: checksum.digest_blocks_into(data, key, digests, None)) for _ in range(rounds)]
    return len(data) / min(work)


def _case(subject: str, bench: Bench, percent: float, peers: tuple[float, float] | None, seed: int) -> list[Result]:
    changed = change(bench.live, int(bench.size * percent / 100), seed)
    figures = bench.step(changed)
    note = (
        f"snapshot {figures.snapshot:.2f} s, transfer {figures.transfer:.2f} s; "
        f"{figures.changed / MIB:.0f} MiB changed, {figures.sent / MIB:.0f} MiB sent"
    )
    case = f"{bench.size / GIB:g} GiB, {percent:g} % changed"
    if peers is None:
        return [Result(subject, case, figures.total, None, "", "s", None, note=note)]
    rsync, full = peers
    return [
        replace(compare(subject, case, figures.total, rsync, "rsync --inplace", "s", less_is_better=True), note=note),
        compare(subject, case, figures.total, full, "full copy (cp)", "s", less_is_better=True),
    ]


def _reflink(folder: Path, size: int) -> list[Result]:
    results: list[Result] = []
    seconds = {}
    with mounted(folder, "xfs", 6 * size) as mount:
        for factor in (1, 2):
            place = mount / str(factor)
            place.mkdir()
            bench = Bench(place, size * factor)
            bench.step(0)
            if factor == 1:
                peers = bench.peers(size // 100)
                bench.step(0)
                results += _case(REFLINK, bench, 0.1, None, seed=1)
                results += _case(REFLINK, bench, 1, peers, seed=2)
                seconds[1] = results[-1].ours
            else:
                (twice,) = _case(REFLINK, bench, 0.5, None, seed=3)
                results.append(
                    replace(
                        compare(
                            REFLINK,
                            f"{2 * size / GIB:g} GiB, the same bytes changed",
                            twice.ours,
                            seconds[1],
                            "the image of half the size",
                            "s",
                            less_is_better=True,
                        ),
                        note=twice.note,
                    )
                )
            shutil.rmtree(place)
    return results


def _copies(folder: Path, size: int, rounds: int) -> list[Result]:
    results: list[Result] = []
    with mounted(folder, "ext4", int(5.5 * size)) as mount:
        bench = Bench(mount, size)
        bench.step(0)
        peers = bench.peers(size // 100)
        bench.step(0)
        results += _case(COPIES, bench, 0.1, None, seed=1)
        results += _case(COPIES, bench, 1, peers, seed=2)
        own = checksum_rate(rounds)
        read = bench.digest_rate(rounds)
        results.append(
            replace(
                compare(
                    HASHING, "digests of a snapshot, files in the cache", read / GB, own / GB, "the checksum", "GB/s"
                ),
                note="two threads, beside the checksum alone on one core in memory",
            )
        )
    return results


def run(quick: bool, directory: Path | None = None) -> list[Result]:
    """Measure everything; ``quick`` means a smaller image."""
    size = GIB if quick else 8 * GIB
    with tempfile.TemporaryDirectory(prefix="bench-incremental-", dir=directory or Path("/var/tmp")) as name:  # noqa: S108
        folder = Path(name)
        return [*_reflink(folder, size), *_copies(folder, size, 5 if quick else 15)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Incremental replication beside rsync and a full copy.")
    parser.add_argument("--quick", action="store_true", help="an image of 1 GiB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where to make the images (default: /var/tmp)")
    options = parser.parse_args()
    results = run(options.quick, options.directory)
    print_table(results)
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
