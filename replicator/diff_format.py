"""The file format of ``rbd export-diff``, version 1: writing it and reading it. Knows no storage and no file.

::

    "rbd diff v1\\n"
    "f" le32 length, name            the snapshot that the difference is from; not there: from nothing
    "t" le32 length, name            the snapshot that it brings
    "s" le64 size                    bytes of the image at that snapshot
    "w" le64 offset, le64 length, the bytes      |      "z" le64 offset, le64 length: zeros
    …                                any number of either, in ascending order
    "e"

Source: "RBD Incremental Backup" (doc/dev/rbd-diff.rst) and how the command of Ceph 16.2 writes it: the header in this
order; one record for each change that librbd tells of, as long as librbd tells it, at most an object (of a striped
image: a set of objects); and one that holds nothing but zeros is written as ``z``, whatever it is.

A diff has no checksum and no identity: see :mod:`replicator.diff_identity`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from replicator.errors import BadDiff
from replicator.streams import CHUNK_SIZE, MAX_VOLUME_SIZE, Buffer, Extent

BANNER = b"rbd diff v1\n"
MAX_NAME = 4096
"""Bytes of a snapshot's name that are read; the same limit as ``rbd import-diff`` has."""
_LENGTH = struct.Struct("<I")
_SIZE = struct.Struct("<Q")
_RANGE = struct.Struct("<QQ")
_ZEROS = bytes(CHUNK_SIZE)

Read = Callable[[int], bytes]
"""Gives so many bytes, fewer only at the end."""


@dataclass(frozen=True, slots=True)
class DiffHeader:
    """What a diff is.

    :ivar base: name of the snapshot that it applies to; None: to nothing
    :ivar to: name of the snapshot that it brings
    :ivar size: bytes of the volume at that snapshot
    """

    base: str | None
    to: str
    size: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of a record's bytes. The pieces of a record follow each other, and have together the record's length.

    :ivar record: the whole range that the record is about; a zero one is one piece without data
    :ivar data: the next of its bytes, at most ``CHUNK_SIZE``
    """

    record: Extent
    data: Buffer = b""


# -- writing


def encode(header: DiffHeader, pieces: Iterable[Piece]) -> Iterator[Buffer]:
    """A diff, part by part. Whether a record holds only zeros is found out without having all of it in memory."""
    yield _encode_header(header)
    zeros = done = 0
    begun = False
    for piece in pieces:
        record = piece.record
        if record.zero:
            yield _encode_record(b"z", record)
            continue
        done += len(piece.data)
        if not begun and _is_zero(piece.data):
            zeros += len(piece.data)
        else:
            if not begun:
                begun = True
                yield _encode_record(b"w", record)
                yield from (_ZEROS[: min(CHUNK_SIZE, zeros - at)] for at in range(0, zeros, CHUNK_SIZE))
            yield piece.data
        if done == record.length:
            if not begun:
                yield _encode_record(b"z", record)
            zeros = done = 0
            begun = False
    yield b"e"


def _encode_header(header: DiffHeader) -> bytes:
    found = bytearray(BANNER)
    for tag, name in ((b"f", header.base), (b"t", header.to)):
        if name is not None:
            encoded = name.encode()
            found += tag + _LENGTH.pack(len(encoded)) + encoded
    return bytes(found + b"s" + _SIZE.pack(header.size))


def _encode_record(tag: bytes, record: Extent) -> bytes:
    return tag + _RANGE.pack(record.offset, record.length)


def _is_zero(data: Buffer) -> bool:
    if data[0] or data[-1]:
        return False
    return bytes(data) == (_ZEROS if len(data) == CHUNK_SIZE else bytes(len(data)))


# -- reading


class DiffReader:
    """Reads a diff from its beginning, which it does when it is made; iterate it once.

    Nothing in it is believed: names and ranges are bounded, every record lies behind the one before and within the
    volume, and the end is where it says so and where the bytes end. Memory is bounded whatever is in it.

    :ivar header: what the diff is
    :raises BadDiff: it is none, is cut short or garbled; with the byte where that shows
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._at = 0
        self._tag = b""
        self._end = 0
        self.header = self._read_header()

    def __iter__(self) -> Iterator[Piece]:
        """Its records; the end of the iterator is the end of a whole diff."""
        while self._tag != b"e":
            record = self._read_record()
            if record.zero:
                yield Piece(record)
            else:
                for at in range(0, record.length, CHUNK_SIZE):
                    yield Piece(record, self._take(min(CHUNK_SIZE, record.length - at), "the bytes of a record"))
            self._tag = self._take(1, "a record, or the end")
        if self._read(1):
            raise self._bad("there is more behind its end", self._at)

    def _read_header(self) -> DiffHeader:
        banner = self._take(len(BANNER), "the first line")
        if banner != BANNER:
            raise self._bad(_other_format(banner), 0)
        found: dict[bytes, object] = {}
        while True:
            begin = self._at
            self._tag = self._take(1, "the header")
            if self._tag not in (b"f", b"t", b"s"):
                break
            if self._tag in found:
                raise self._bad(f"{self._tag.decode()!r} is there twice", begin)
            found[self._tag] = self._read_size() if self._tag == b"s" else self._read_name()
        base, to, size = (found.get(tag) for tag in (b"f", b"t", b"s"))
        if not isinstance(size, int):
            raise self._bad("the size of the image is missing", begin)
        if not isinstance(to, str):
            raise BadDiff(
                "the diff brings no snapshot, but what an image was at some time",
                hint="export a snapshot: rbd export-diff POOL/IMAGE@SNAPSHOT",
            )
        return DiffHeader(base if isinstance(base, str) else None, to, size)

    def _read_name(self) -> str:
        begin = self._at
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size, "the length of a name"))
        if not 1 <= length <= MAX_NAME:
            raise self._bad(f"a snapshot's name of {length} bytes; 1 to {MAX_NAME} are allowed", begin)
        try:
            return self._take(length, "a snapshot's name").decode()
        except UnicodeDecodeError:
            raise self._bad("a snapshot's name is not UTF-8", begin) from None

    def _read_size(self) -> int:
        begin = self._at
        (size,) = _SIZE.unpack(self._take(_SIZE.size, "the size"))
        if size > MAX_VOLUME_SIZE:
            raise self._bad(f"an image of {size} bytes; at most {MAX_VOLUME_SIZE} are allowed", begin)
        return int(size)

    def _read_record(self) -> Extent:
        begin = self._at - 1
        if self._tag not in (b"w", b"z"):
            raise self._bad(f"a record of the unknown kind {self._tag!r}", begin)
        offset, length = _RANGE.unpack(self._take(_RANGE.size, "the range of a record"))
        if length < 1 or offset < self._end or offset + length > self.header.size:
            raise self._bad(
                f"a record of {length} bytes at {offset}, where one between {self._end} and {self.header.size} was due",
                begin,
            )
        self._end = offset + length
        return Extent(offset, length, zero=self._tag == b"z")

    def _take(self, size: int, what: str) -> bytes:
        data = self._read(size)
        self._at += len(data)
        if len(data) != size:
            raise BadDiff(
                f"the diff is cut short: it ends at byte {self._at}, in {what}",
                hint="it was not written to its end, or not copied to its end: export or copy it again",
            )
        return data

    @staticmethod
    def _bad(why: str, at: int) -> BadDiff:
        return BadDiff(
            f"this is not a diff of rbd export-diff (version 1): at byte {at}, {why}", hint="export or copy it again"
        )


def _other_format(banner: bytes) -> str:
    if banner.startswith((b"rbd diff v2", b"rbd image v2")):
        return "there is version 2 of the format: write it with rbd export-diff, or rbd export --export-format 1"
    return "it begins with something else"
