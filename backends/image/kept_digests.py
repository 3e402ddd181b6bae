"""The digests that are kept beside a snapshot made by copying.

They say what changed between two copies without reading either, and whether a block is still what was written. They
are keyed with the volume's own random key, so that a guest cannot prepare blocks that look equal.

Format, little-endian::

    header   64 bytes: magic "REPLDIG1", u32 block size, u32 blocks in a section, u64 image size, u64 blocks,
             the image's identity (32 ASCII characters of Meta.image)
    sections 16 bytes a block: keyed BLAKE3, 128 bits kept; 65536 blocks a section, the last one shorter
    table    32 bytes a section: its keyed digest
    trailer  32 bytes: keyed digest of header and table

A section is verified when it is read, so memory stays at one section (1 MiB for 4 GiB of image) whatever the size.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from backends.fields import BadRecord
from backends.image.durable import Files
from backends.image.records import Meta
from replicator.checksums import Checksums
from replicator.streams import BLOCK_SIZE, DIGEST_SIZE

_MAGIC = b"REPLDIG1"
_HEADER = struct.Struct("<8sIIQQ32s")
SECTION_BLOCKS = 65536
_SECTION_BYTES = SECTION_BLOCKS * DIGEST_SIZE
_CHECK_SIZE = 32


def block_count(size: int) -> int:
    """Blocks of an image of ``size`` bytes, a short last one included."""
    return -(-size // BLOCK_SIZE)


def _header(meta: Meta) -> bytes:
    return _HEADER.pack(_MAGIC, BLOCK_SIZE, SECTION_BLOCKS, meta.size, block_count(meta.size), meta.image.encode())


class DigestWriter:
    """Writes a new file of digests, in order."""

    def __init__(self, files: Files, path: Path, checksums: Checksums, key: bytes, meta: Meta) -> None:
        self._files = files
        self._checksums = checksums
        self._key = key
        self._header = _header(meta)
        self._left = block_count(meta.size) * DIGEST_SIZE
        self._section = bytearray()
        self._table = bytearray()
        self._fd = files.open_new(path)
        files.write_all(self._fd, self._header)

    @classmethod
    @contextmanager
    def new(cls, files: Files, path: Path, checksums: Checksums, key: bytes, meta: Meta) -> Iterator[DigestWriter]:
        """A writer whose file is complete and durable when the block ends without an error."""
        writer = cls(files, path, checksums, key, meta)
        try:
            yield writer
            writer.finish()
        finally:
            writer.close()

    def add(self, digests: bytes | memoryview) -> None:
        """The digests of the next blocks."""
        self._left -= len(digests)
        self._section += digests
        while len(self._section) >= _SECTION_BYTES:
            self._flush(bytes(self._section[:_SECTION_BYTES]))
            del self._section[:_SECTION_BYTES]

    def _flush(self, section: bytes) -> None:
        self._table += self._checksums.keyed_digest(self._key, section)
        self._files.write_all(self._fd, section)

    def finish(self) -> None:
        """Write the rest and make the file durable."""
        if self._left:
            raise AssertionError(f"{self._left} bytes of digests are missing")
        if self._section:
            self._flush(bytes(self._section))
        check = self._checksums.keyed_digest(self._key, self._header, bytes(self._table))
        self._files.write_all(self._fd, bytes(self._table) + check)
        self._files.sync(self._fd)

    def close(self) -> None:
        """Close the file, finished or not."""
        os.close(self._fd)


class KeptDigests:
    """Reads a file of digests. Not thread-safe.

    :raises BadRecord: it is not the one of this image, or damaged; here or when a section is read
    """

    def __init__(self, file: BinaryIO, checksums: Checksums, key: bytes, meta: Meta) -> None:
        self._file = file
        self._checksums = checksums
        self._key = key
        self.blocks = block_count(meta.size)
        self._sections = -(-self.blocks // SECTION_BLOCKS)
        self._cached: tuple[int, bytes] = (-1, b"")
        header = file.read(_HEADER.size)
        if header != _header(meta):
            raise BadRecord("its header is not that of this snapshot")
        file.seek(_HEADER.size + self.blocks * DIGEST_SIZE)
        self._table = file.read(self._sections * _CHECK_SIZE)
        if file.read(_CHECK_SIZE + 1) != checksums.keyed_digest(key, header, self._table):
            raise BadRecord("it is damaged")

    def section(self, index: int) -> bytes:
        """All digests of one section."""
        if self._cached[0] != index:
            first = index * SECTION_BLOCKS
            length = min(SECTION_BLOCKS, self.blocks - first) * DIGEST_SIZE
            self._file.seek(_HEADER.size + first * DIGEST_SIZE)
            data = self._file.read(length)
            expected = self._table[index * _CHECK_SIZE : (index + 1) * _CHECK_SIZE]
            if len(data) != length or self._checksums.keyed_digest(self._key, data) != expected:
                raise BadRecord(f"its section {index} is damaged")
            self._cached = (index, data)
        return self._cached[1]

    def check(self) -> None:
        """Read and verify everything."""
        for index in range(self._sections):
            self.section(index)

    def read(self, first: int, count: int) -> bytes:
        """The digests of ``count`` blocks from block ``first``; fewer at the end."""
        parts = []
        end = min(first + count, self.blocks)
        while first < end:
            index, skip = divmod(first, SECTION_BLOCKS)
            take = min(SECTION_BLOCKS - skip, end - first)
            parts.append(self.section(index)[skip * DIGEST_SIZE : (skip + take) * DIGEST_SIZE])
            first += take
        return parts[0] if len(parts) == 1 else b"".join(parts)


@contextmanager
def open_digests(path: Path, checksums: Checksums, key: bytes | None, meta: Meta) -> Iterator[KeptDigests]:
    """The kept digests of a snapshot, wholly verified. :raises BadRecord: missing or damaged"""
    if key is None:
        raise BadRecord("the volume's key is missing or damaged")
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise BadRecord("it is missing") from None
    with file:
        kept = KeptDigests(file, checksums, key, meta)
        kept.check()
        yield kept
