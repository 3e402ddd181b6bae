"""The manifest of a filesystem's snapshot: everything that is in it, in an order that both sides have.

Two nodes that hold the same snapshot each walk their own and write such a manifest; merging the two finds every entry
that differs, by its name (``replicator/manifest_comparison.py``). Content is not in it, only the digests of its blocks,
keyed as everywhere (``transport/checksum.py``); names are, as the bytes that they are.

As bytes it is a sequence of records, ``length (4) · type (1) · body``, little-endian; the length counts type and body.
It begins with a head and the root, an entry without a name; the entries of a folder follow it, ascending by the bytes
of their names, up to a LEAVE. RUNS follow a file that has content, and HOLES end them.

====== =====================================================================================================
type   body
====== =====================================================================================================
0      head: ``replicator manifest 1``
1      entry: the fields of :class:`Entry` (``_ENTRY``), then its name
2      run of blocks with data: 16 bytes of digest each, 1 to 1,024
3      run of blocks of zeros, whether stored or not: their number (8)
4      run of blocks that cannot be read: their number (8)
5      holes: bytes that are stored as data (8), digest of where they are (16)
6      leave: the folder has no more entries
====== =====================================================================================================

What is not in it: access and change times, which legitimately differ; quotas; sizes of folders.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Flag, StrEnum, auto

from replicator.errors import ProtocolError
from replicator.streams import CHUNK_SIZE, DIGEST_SIZE, Chunk, NativeChunk

MAX_RUN = 1024
"""Blocks with digests in one record: 64 MiB, so that a slow disk gives a sign of life."""
MAX_RECORD = 1 + MAX_RUN * DIGEST_SIZE
MAX_NAME = 255
"""Bytes (NAME_MAX of Linux; ZFS with longnames is beyond what Linux programs take by default)."""
MAX_PATH = 1 << 20
"""Bytes of the names of the folders that are open at once."""
GATHER = 1.0
"""Seconds for which records are gathered into a chunk."""
NOTHING = bytes(DIGEST_SIZE)
"""Stands for the digest of what is not there."""

_HEAD = b"replicator manifest 1"
_ENTRY = struct.Struct("<BBBBIIIIIIQQqQQ16s16s16s")
_LENGTH = struct.Struct("<IB")
_COUNT = struct.Struct("<Q")
_HOLES = struct.Struct("<Q16s")
_MAX_BLOCKS = 1 << 48
_HINT = "both nodes must run the same version; see the log of the node that sent it"


class EntryKind(StrEnum):
    """What an entry is, as people say it."""

    FILE = "file"
    FOLDER = "folder"
    SYMLINK = "symbolic link"
    PIPE = "pipe"
    SOCKET = "socket"
    CHARACTER = "character device"
    BLOCK = "block device"
    UNKNOWN = "entry that cannot be read"


_KINDS = tuple(EntryKind)


class Unreadable(Flag):
    """Parts of an entry that the storage could not read."""

    NOTHING = 0
    ENTRY = auto()
    """All of it: what it is, is not known."""
    LISTING = auto()
    """Which entries a folder has."""
    ATTRIBUTES = auto()
    """Extended attributes and access control lists."""
    TARGET = auto()
    """What a symbolic link points to."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a folder, with all that belongs to it but the content.

    :ivar name: as it is in the folder; b"" for the root
    :ivar mode: permission bits, set-uid and the like included
    :ivar links: names that it has; 0 for folders
    :ivar flags: ``fsx_xflags`` of Linux: immutable, append-only, no dump …; 0 where there is no such thing
    :ivar project: project quota's number
    :ivar inode: ZFS keeps an object's number when it replicates; two names of one file have the same; 0 for the root
    :ivar size: bytes of a file; 0 for others
    :ivar device: of a device node
    :ivar target: digest of what a symbolic link points to
    :ivar xattrs: digest of all extended attributes, names and values; acl: the same of access control lists
    :ivar linked: a file that came before under another name: its content is not here again
    """

    name: bytes
    kind: EntryKind
    mode: int = 0
    uid: int = 0
    gid: int = 0
    seconds: int = 0
    nanoseconds: int = 0
    links: int = 0
    flags: int = 0
    project: int = 0
    inode: int = 0
    size: int = 0
    device: int = 0
    target: bytes = NOTHING
    xattrs: bytes = NOTHING
    acl: bytes = NOTHING
    linked: bool = False
    unreadable: Unreadable = Unreadable.NOTHING

    @property
    def has_content(self) -> bool:
        """Whether runs and holes follow it."""
        return self.kind is EntryKind.FILE and not self.linked


class RunKind(StrEnum):
    """What the blocks of a run are."""

    DATA = "data"
    ZEROS = "zeros"
    UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive blocks of a file, ``BLOCK_SIZE`` bytes each, its last one short. ``digests`` only with DATA."""

    kind: RunKind
    count: int
    digests: bytes = b""


@dataclass(frozen=True, slots=True)
class Holes:
    """The end of a file's content, and how it is stored.

    :ivar stored: bytes that are no hole
    :ivar where: digest of where those are
    """

    stored: int
    where: bytes = NOTHING


@dataclass(frozen=True, slots=True)
class Leave:
    """A folder has no more entries."""


Record = Entry | Run | Holes | Leave


# -- as bytes


def encode(record: Record) -> bytes:
    """One record."""
    match record:
        case Entry():
            kind, body = 1, _encode_entry(record)
        case Run(RunKind.DATA):
            kind, body = 2, record.digests
        case Run(RunKind.ZEROS):
            kind, body = 3, _COUNT.pack(record.count)
        case Run():
            kind, body = 4, _COUNT.pack(record.count)
        case Holes():
            kind, body = 5, _HOLES.pack(record.stored, record.where)
        case Leave():
            kind, body = 6, b""
    return _LENGTH.pack(1 + len(body), kind) + body


def _encode_entry(entry: Entry) -> bytes:
    fixed = _ENTRY.pack(
        _KINDS.index(entry.kind),
        entry.unreadable.value,
        entry.linked,
        len(entry.name),
        entry.mode,
        entry.uid,
        entry.gid,
        entry.nanoseconds,
        entry.flags,
        entry.project,
        entry.links,
        entry.inode,
        entry.seconds,
        entry.size,
        entry.device,
        entry.target,
        entry.xattrs,
        entry.acl,
    )
    return fixed + entry.name


def chunks(records: Iterable[Record]) -> Iterator[NativeChunk]:
    """A manifest as a stream's chunks, one in ``GATHER`` seconds at least while there are records; the last one comes
    once they have ended."""
    pending = bytearray(_LENGTH.pack(1 + len(_HEAD), 0) + _HEAD)
    since = time.monotonic()
    for record in records:
        data = encode(record)
        if len(pending) + len(data) > CHUNK_SIZE or time.monotonic() - since > GATHER:
            yield NativeChunk(bytes(pending))
            pending.clear()
            since = time.monotonic()
        pending += data
    yield NativeChunk(bytes(pending))


def records(stream: Iterable[Chunk]) -> Iterator[Record]:
    """The records of a manifest that a peer may have written.

    :raises ProtocolError: it is none, it ends early, or a record is out of order or range
    """
    order = _Order()
    pieces = _pieces(stream)
    if next(pieces, None) != (0, _HEAD):
        raise _bad("does not begin as one")
    for kind, body in pieces:
        record = _decode(kind, body)
        order.check(record)
        yield record
    order.end()


def _pieces(stream: Iterable[Chunk]) -> Iterator[tuple[int, bytes]]:
    """Type and body of each record, wherever chunks begin and end."""
    pending = bytearray()
    for chunk in stream:
        if not isinstance(chunk, NativeChunk):
            raise _bad("is a stream of blocks")
        pending += chunk.data
        chunk.release()
        place = 0
        while len(pending) - place >= _LENGTH.size:
            length, kind = _LENGTH.unpack_from(pending, place)
            if not 1 <= length <= MAX_RECORD:
                raise _bad(f"has a record of {length} bytes")
            end = place + 4 + length
            if end > len(pending):
                break
            yield kind, bytes(pending[place + _LENGTH.size : end])
            place = end
        del pending[:place]
    if pending:
        raise _bad("ends within a record")


def _decode(kind: int, body: bytes) -> Record:
    if kind == 1 and _ENTRY.size <= len(body) <= _ENTRY.size + MAX_NAME:
        return _decode_entry(body)
    if kind == 2 and body and len(body) % DIGEST_SIZE == 0:
        return Run(RunKind.DATA, len(body) // DIGEST_SIZE, body)
    if kind in (3, 4) and len(body) == _COUNT.size:
        (count,) = _COUNT.unpack(body)
        if not 1 <= count <= _MAX_BLOCKS:
            raise _bad(f"has a run of {count} blocks")
        return Run(RunKind.ZEROS if kind == 3 else RunKind.UNREADABLE, count)
    if kind == 5 and len(body) == _HOLES.size:
        stored, where = _HOLES.unpack(body)
        return Holes(stored, where)
    if kind == 6 and not body:
        return Leave()
    raise _bad(f"has a record of type {kind} with {len(body)} bytes")


def _decode_entry(body: bytes) -> Entry:
    (
        kind, unreadable, linked, length, mode, uid, gid, nanoseconds, flags, project, links, inode, seconds, size,
        device, target, xattrs, acl,
    ) = _ENTRY.unpack_from(body)  # fmt: skip
    name = body[_ENTRY.size :]
    if kind >= len(_KINDS) or unreadable >= 16 or linked > 1 or length != len(name):
        raise _bad("has an entry that is none")
    if b"/" in name or b"\0" in name or name in (b".", b".."):
        raise _bad("has a name that no entry can have")
    return Entry(
        name, _KINDS[kind], mode, uid, gid, seconds, nanoseconds, links, flags, project, inode, size, device, target,
        xattrs, acl, bool(linked), Unreadable(unreadable),
    )  # fmt: skip


class _Order:
    """Checks that records come where they may."""

    def __init__(self) -> None:
        self._last: list[bytes | None] = []
        self._begun = False
        self._content = False
        self._path = 0

    def check(self, record: Record) -> None:
        if self._content != isinstance(record, Run | Holes):
            raise _bad("has content where there is none, or none where there is some")
        match record:
            case Holes():
                self._content = False
            case Leave():
                self._require_open()
                self._last.pop()
                self._path -= len(self._last[-1] or b"") if self._last else 0
            case Entry():
                self._enter(record)
            case Run():
                pass

    def _require_open(self) -> None:
        if not self._last:
            raise _bad("goes on after its end")

    def _enter(self, entry: Entry) -> None:
        if not self._begun:
            if entry.name or entry.kind is not EntryKind.FOLDER:
                raise _bad("does not begin with its root")
            self._begun = True
        else:
            self._require_open()
            before = self._last[-1]
            if not entry.name or (before is not None and entry.name <= before):
                raise _bad("has names that are not in order")
            self._last[-1] = entry.name
        if entry.kind is EntryKind.FOLDER:
            self._path += len(entry.name)
            if self._path > MAX_PATH:
                raise _bad("has a path that is too long")
            self._last.append(None)
        self._content = entry.has_content

    def end(self) -> None:
        if not self._begun or self._last or self._content:
            raise _bad("ends too early")


def _bad(what: str) -> ProtocolError:
    return ProtocolError(f"a manifest of a filesystem {what}", hint=_HINT)
