"""Any sequence of writes, zeros, holes, cuts and growth, sent step by step, gives equal bytes and equal holes."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.image import ImageBackend
from backends.image.durable import Files
from backends.image.linux import punch
from replicator.cancellation import Cancellation
from replicator.endpoint import DigestRequest, Range, ReceiveRequest, SendRequest
from replicator.errors import ConnectionLost
from replicator.model import Lineage, ResumeState, Role, StreamKind, Version, VolumeId
from replicator.streams import BLOCK_SIZE, BlockChunk, Chunk, ChunkStream
from tests.support.blocks import KEY, apply
from transport import checksum

PRIMARY = Lineage("6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.PRIMARY, 3)
LIMIT = 5 * BLOCK_SIZE


class Change:
    """One thing that a guest, or its owner, does to an image."""

    def __init__(self, kind: str, offset: int, length: int, seed: int) -> None:
        self.kind = kind
        self.offset = offset
        self.length = length
        self.seed = seed

    def __repr__(self) -> str:
        return f"{self.kind}({self.offset}, {self.length}, {self.seed})"

    def do(self, path: Path) -> None:
        with path.open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            length = max(0, min(self.length, size - self.offset))
            if self.kind == "resize":
                file.truncate(self.offset)
            elif self.kind == "punch" and length:
                punch(file.fileno(), self.offset, length)
            elif length:
                file.seek(self.offset)
                file.write((b"\0" if self.kind == "zero" else bytes([self.seed])) * length)


sizes = st.one_of(st.integers(0, LIMIT), st.integers(0, LIMIT // 4096).map(lambda n: n * 4096))
a_change = st.builds(
    Change, st.sampled_from(["write", "write", "write", "zero", "punch", "resize"]), sizes, sizes, st.integers(1, 255)
)
rounds = st.lists(st.lists(a_change, max_size=5), min_size=1, max_size=5)


@dataclass
class Pair:
    """A source and a target storage in directories of one file system."""

    folder: Path
    source: ImageBackend
    target: ImageBackend

    @property
    def live(self) -> Path:
        return self.folder / "a" / "vm"

    def image(self, side: str, name: str) -> Path:
        volume = Path("=vm") if side == "a" else Path("+n1", "=vm")
        return self.folder / side / ".replicator" / "volumes" / volume / "snapshots" / name / "image"

    def send(self, base: Version | None, to: Version, resume: ResumeState | None = None) -> ChunkStream:
        request = SendRequest(VolumeId("a", "vm"), base.ref if base else None, to.ref, KEY, resume=resume)
        stream = self.source.send(request, Cancellation())
        assert isinstance(stream, ChunkStream)
        return stream

    def receive(
        self, base: Version | None, to: Version, stream: ChunkStream, resume: ResumeState | None = None
    ) -> Version:
        request = ReceiveRequest(VolumeId("b", "n1/vm"), PRIMARY, base.ref if base else None, to, KEY, resume=resume)
        with stream:
            return self.target.receive(request, stream, Cancellation())


@contextmanager
def pair_in(folder: Path) -> Iterator[Pair]:
    for side in "ab":
        (folder / side).mkdir(parents=True)
    pair = Pair(
        folder,
        ImageBackend("a", folder / "a", checksums=checksum),
        ImageBackend("b", folder / "b", checksums=checksum, workers=2),
    )
    pair.live.write_bytes(b"")
    yield pair
    Files().remove_tree(folder)


def cut(stream: ChunkStream, after: int) -> ChunkStream:
    """The stream, cut off after so many extents: chunks are split so that there is something to cut."""

    def chunks() -> Iterator[Chunk]:
        left = after
        for chunk in stream:
            assert isinstance(chunk, BlockChunk)
            if left < len(chunk.extents):
                raise ConnectionLost("cut")
            left -= len(chunk.extents)
            yield chunk

    return ChunkStream(StreamKind.BLOCKS, chunks(), on_close=stream.close)


def follow(pair: Pair, story: list[list[Change]], cut_after: int) -> None:
    base: Version | None = None
    before = b""
    for number, changes in enumerate(story):
        for change in changes:
            change.do(pair.live)
        content = pair.live.read_bytes()
        (to,) = pair.source.snapshot(("vm",), f"s{number}")
        assert pair.image("a", to.name).read_bytes() == content
        applied = apply(pair.send(base, to), before, len(content))
        assert bytes(applied.data) == content
        resume = None
        try:
            pair.receive(base, to, cut(pair.send(base, to), cut_after))
        except ConnectionLost:
            state = pair.target.state("n1/vm")
            assert state is not None
            resume = state.resume
            assert resume is not None
            pair.receive(base, to, pair.send(base, to, resume), resume)
        assert pair.image("b", to.name).read_bytes() == content
        check_digests(pair, to)
        base, before = to, content
    state = pair.source.state("vm")
    assert state is not None and base is not None
    applied = apply(pair.send(state.versions[0], base), pair.image("a", "s0").read_bytes(), len(before))
    assert bytes(applied.data) == before  # a longer step than any before: from the first to the last


def check_digests(pair: Pair, to: Version) -> None:
    """Both sides' digests are equal, those that are kept included."""
    found = []
    for backend, volume in ((pair.source, VolumeId("a", "vm")), (pair.target, VolumeId("b", "n1/vm"))):
        request = DigestRequest(volume, to.ref, KEY)
        found.append(b"".join(batch.digests for batch in backend.digests(request, Cancellation())))
    assert found[0] == found[1] == checksum.digest_blocks(pair.image("a", to.name).read_bytes(), bytes.fromhex(KEY))
    # Sending from the target checks what it reads against its own kept digests.
    request_all = SendRequest(VolumeId("b", "n1/vm"), None, to.ref, KEY, ranges=(Range(0, max(1, to.size or 0)),))
    apply(pair.target.send(request_all, Cancellation()), b"", to.size or 0)


_numbers = itertools.count()


def check_chain(folder: Path, examples: int) -> None:
    @settings(max_examples=examples)
    @given(rounds, st.integers(0, 4))
    def chain(story: list[list[Change]], cut_after: int) -> None:
        with pair_in(folder / f"pair-{next(_numbers)}") as pair:
            follow(pair, [[Change("resize", LIMIT, 0, 1)], *story], cut_after)

    chain()


def test_any_chain_is_equal_with_copies(tmp_path: Path, count: Callable[[int, int], int]) -> None:
    check_chain(tmp_path, count(25, 600))


@pytest.mark.tier("xfs")
def test_any_chain_is_equal_on_xfs(xfs_dir: Path, count: Callable[[int, int], int]) -> None:
    check_chain(xfs_dir, count(25, 600))


@pytest.mark.tier("btrfs")
def test_any_chain_is_equal_on_btrfs(btrfs_dir: Path, count: Callable[[int, int], int]) -> None:
    check_chain(btrfs_dir, count(25, 600))


@pytest.mark.tier("btrfs")
def test_any_chain_is_equal_on_compressed_btrfs(btrfs_dir: Path, count: Callable[[int, int], int]) -> None:
    """Compressed extents say nothing by where they lie: they are read."""
    subprocess.run(["mount", "-o", "remount,compress-force=zstd", str(btrfs_dir)], check=True, timeout=30)
    check_chain(btrfs_dir, count(15, 300))


@pytest.mark.tier("ext4")
def test_any_chain_is_equal_on_ext4(ext4_dir: Path, count: Callable[[int, int], int]) -> None:
    check_chain(ext4_dir, count(15, 300))


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def check_holes(folder: Path) -> None:
    """Space taken by a sparse image stays its own, on both sides, through a full and an incremental step."""
    with pair_in(folder / "pair") as pair:
        with pair.live.open("r+b") as file:
            file.truncate(64 << 20)
            for offset in range(0, 64 << 20, 8 << 20):
                file.seek(offset + 8192)
                file.write(b"data" * 2048)
            os.fsync(file.fileno())
        (one,) = pair.source.snapshot(("vm",), "one")
        pair.receive(None, one, pair.send(None, one))
        with pair.live.open("r+b") as file:
            punch(file.fileno(), 8 << 20, 1 << 20)
            file.seek(5 << 20)
            file.write(b"more" * 2048)
            os.fsync(file.fileno())
        (two,) = pair.source.snapshot(("vm",), "two")
        pair.receive(one, two, pair.send(one, two))
        for name in ("one", "two"):
            for side in "ab":
                path = pair.image(side, name)
                assert path.stat().st_size == 64 << 20
                assert allocated(path) <= 8 * 8192 + 65536, (side, name)
        assert pair.image("b", "two").read_bytes() == pair.live.read_bytes()


def test_holes_stay_holes_with_copies(tmp_path: Path) -> None:
    check_holes(tmp_path)


@pytest.mark.tier("xfs")
def test_holes_stay_holes_on_xfs(xfs_dir: Path) -> None:
    check_holes(xfs_dir)


@pytest.mark.tier("btrfs")
def test_holes_stay_holes_on_btrfs(btrfs_dir: Path) -> None:
    check_holes(btrfs_dir)


@pytest.mark.tier("xfs")
def test_nothing_that_is_shared_is_read(xfs_dir: Path) -> None:
    """On reflink the change of one block costs one block, whatever the size of the image."""
    with pair_in(xfs_dir / "pair") as pair:
        pair.live.write_bytes(os.urandom(32 << 20))
        (one,) = pair.source.snapshot(("vm",), "one")
        with pair.live.open("r+b") as file:
            file.seek(9 << 20)
            file.write(b"x" * 4096)
        (two,) = pair.source.snapshot(("vm",), "two")
        assert pair.source.estimate("vm", one.ref, two.ref) == 4096
        applied = apply(pair.send(one, two), pair.image("a", "one").read_bytes(), 32 << 20)
        assert applied.written == 4096
