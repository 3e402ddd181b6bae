"""The file of kept digests: right over several sections, and every damage noticed."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path

import pytest

from backends.fields import BadRecord
from backends.image.durable import Files
from backends.image.kept_digests import SECTION_BLOCKS, DigestWriter, block_count, open_digests
from backends.image.records import Meta
from replicator.streams import BLOCK_SIZE
from transport import checksum

KEY = bytes(range(32))
BLOCKS = 2 * SECTION_BLOCKS + 777


def meta(blocks: int) -> Meta:
    return Meta("a" * 32, datetime(2026, 1, 1, tzinfo=UTC), 1, blocks * BLOCK_SIZE - 5, "b" * 32, digests=True)


@pytest.fixture(scope="module")
def digests() -> bytes:
    return random.Random(3).randbytes(BLOCKS * 16)


@pytest.fixture
def written(tmp_path: Path, digests: bytes) -> Path:
    path = tmp_path / "digests"
    with DigestWriter.new(Files(), path, checksum, KEY, meta(BLOCKS)) as writer:
        for start in range(0, len(digests), 160_000):
            writer.add(digests[start : start + 160_000])
    return path


def test_what_was_written_is_read(written: Path, digests: bytes) -> None:
    with open_digests(written, checksum, KEY, meta(BLOCKS)) as kept:
        assert kept.blocks == BLOCKS
        assert kept.read(0, BLOCKS) == digests
        assert kept.read(SECTION_BLOCKS - 3, 7) == digests[(SECTION_BLOCKS - 3) * 16 :][: 7 * 16]
        assert kept.read(BLOCKS - 1, 100) == digests[-16:]
        assert kept.read(BLOCKS, 1) == b""


def test_the_digests_of_another_image_are_not_taken(written: Path) -> None:
    for other in (
        Meta("a" * 32, datetime(2026, 1, 1, tzinfo=UTC), 1, meta(BLOCKS).size, "c" * 32, digests=True),
        meta(BLOCKS - 1),
        meta(BLOCKS + 1),
    ):
        with pytest.raises(BadRecord), open_digests(written, checksum, KEY, other):
            pass
    for key in (bytes(32), None):
        with pytest.raises(BadRecord), open_digests(written, checksum, key, meta(BLOCKS)):
            pass


def test_any_flipped_bit_is_noticed(written: Path) -> None:
    right = written.read_bytes()
    rng = random.Random(5)
    places = [*range(0, 72), *range(len(right) - 130, len(right)), *(rng.randrange(len(right)) for _ in range(40))]
    for place in places:
        with written.open("r+b") as file:
            file.seek(place)
            file.write(bytes([right[place] ^ 1 << rng.randrange(8)]))
        with pytest.raises(BadRecord), open_digests(written, checksum, KEY, meta(BLOCKS)):
            pass
        with written.open("r+b") as file:
            file.seek(place)
            file.write(right[place : place + 1])
    with open_digests(written, checksum, KEY, meta(BLOCKS)):
        pass


@pytest.mark.parametrize("length", [0, 10, 64, 1000, -1])
def test_a_cut_file_is_noticed(written: Path, length: int) -> None:
    data = written.read_bytes()
    written.write_bytes(data[:length])
    with pytest.raises(BadRecord), open_digests(written, checksum, KEY, meta(BLOCKS)):
        pass


def test_an_empty_image_has_no_digests(tmp_path: Path) -> None:
    nothing = Meta("a" * 32, datetime(2026, 1, 1, tzinfo=UTC), 1, 0, "b" * 32, digests=True)
    with DigestWriter.new(Files(), tmp_path / "digests", checksum, KEY, nothing):
        pass
    with open_digests(tmp_path / "digests", checksum, KEY, nothing) as kept:
        assert kept.blocks == block_count(0) == 0
        assert kept.read(0, 10) == b""
