"""Compares two manifests of filesystems (``replicator/manifest.py``) entry by entry, and names what differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from replicator.endpoint import Range
from replicator.manifest import Entry, EntryKind, Holes, Leave, Record, Run, RunKind, Unreadable, encode
from replicator.streams import BLOCK_SIZE, DIGEST_SIZE

MAX_RANGES_OF_FILE = 100
"""Differing ranges named of one file."""
MAX_SHOWN_PATH = 1000
"""Characters of a path in a report."""


@dataclass(frozen=True, slots=True)
class FileDifference:
    """One entry of a filesystem that is not the same on both sides.

    :ivar path: from the root on; bytes that are no text, control characters and backslashes are written as ``\\x..``
    :ivar what: what differs, a few words each
    :ivar differing: bytes: of content in blocks that differ, and of the entry where it itself differs
    :ivar ranges: the first of those blocks, merged
    """

    path: str
    what: tuple[str, ...]
    differing: int
    ranges: tuple[Range, ...] = ()


@dataclass(slots=True)
class Tally:
    """What a comparison of two manifests has counted so far.

    :ivar entries: of the source
    :ivar checked: bytes of content and entries that were compared; holes and zeros are none
    :ivar holes: files that are equal, but stored with other holes
    :ivar unreadable_source: bytes of content that the source could not read; :ivar unreadable_target: the target
    """

    entries: int = 0
    checked: int = 0
    holes: int = 0
    unreadable_source: int = 0
    unreadable_target: int = 0


def compare_manifests(
    source: Iterator[Record], target: Iterator[Record], tally: Tally
) -> Iterator[FileDifference | None]:
    """Merge two manifests; yields a difference, or None now and then as a sign of life.

    :raises ProtocolError: of :func:`replicator.manifest.records`
    """
    yield from _Merge(_Cursor(source), _Cursor(target), tally).run()


class _Cursor:
    """A manifest with a look at what comes next."""

    def __init__(self, records: Iterator[Record]) -> None:
        self._records = records
        self.next: Record | None = next(records, None)

    def take(self) -> Record | None:
        taken, self.next = self.next, next(self._records, None)
        return taken

    def skip(self, entry: Entry) -> Iterator[int]:
        """Pass over what belongs to an entry that was taken; the bytes of each file in it."""
        depth = 1 if entry.kind is EntryKind.FOLDER else 0
        if entry.kind is EntryKind.FILE:
            yield entry.size
        content = entry.has_content
        while depth or content:
            record = self.take()
            match record:
                case None:
                    return
                case Entry():
                    depth += record.kind is EntryKind.FOLDER
                    content = record.has_content
                    yield record.size if record.kind is EntryKind.FILE else 0
                case Leave():
                    depth -= 1
                case Holes():
                    content = False
                case Run():
                    yield 0


class _Merge:
    def __init__(self, source: _Cursor, target: _Cursor, tally: Tally) -> None:
        self._source = source
        self._target = target
        self._tally = tally
        self._path: list[bytes] = []

    def run(self) -> Iterator[FileDifference | None]:
        while True:
            ours, theirs = self._source.next, self._target.next
            if isinstance(ours, Entry) and isinstance(theirs, Entry) and ours.name == theirs.name:
                self._source.take()
                self._target.take()
                yield from self._both(ours, theirs)
            elif isinstance(ours, Entry) and (not isinstance(theirs, Entry) or ours.name < theirs.name):
                yield from self._alone(self._source, ours, "is missing on the target")
            elif isinstance(theirs, Entry):
                yield from self._alone(self._target, theirs, "is on the target only")
            else:  # both leave a folder, or end
                self._source.take()
                self._target.take()
                if not self._path:
                    return
                self._path.pop()

    def _alone(self, side: _Cursor, entry: Entry, what: str) -> Iterator[FileDifference | None]:
        side.take()
        differing = len(encode(entry))
        for size in side.skip(entry):
            differing += size
            yield None
        if side is self._source:
            self._tally.entries += 1
        kind = f"{entry.kind} {what}" if entry.kind is not EntryKind.FOLDER else f"folder with all in it {what}"
        yield FileDifference(self._shown(entry.name), (kind,), differing)

    def _both(self, ours: Entry, theirs: Entry) -> Iterator[FileDifference | None]:
        self._tally.entries += 1
        self._tally.checked += len(encode(ours))
        what = list(_differences(ours, theirs))
        differing = len(encode(ours)) if what else 0
        ranges: list[Range] = []
        if ours.has_content and theirs.has_content:
            found = 0
            for piece in self._content(max(ours.size, theirs.size), what):
                if piece is not None:
                    found += piece.length
                    if len(ranges) < MAX_RANGES_OF_FILE:
                        _join(ranges, piece)
                yield None
            if found:
                what.append("content differs")
            differing += found
        else:
            for side, entry in ((self._source, ours), (self._target, theirs)):
                if entry.has_content or (entry.kind is EntryKind.FOLDER and ours.kind is not theirs.kind):
                    for size in side.skip(entry):
                        differing += size
                        yield None
        if what:
            yield FileDifference(self._shown(ours.name), tuple(what), differing, tuple(ranges))
        if ours.kind is EntryKind.FOLDER and theirs.kind is EntryKind.FOLDER:
            self._path.append(ours.name)

    def _content(self, size: int, what: list[str]) -> Iterator[Range | None]:
        """Blocks that differ of one file; both sides are passed over to the end of its content."""
        ours, theirs = _Blocks(self._source), _Blocks(self._target)
        block = 0
        while ours.fill() | theirs.fill():
            count = min(run.left for run in (ours, theirs) if run.left)
            mine, yours = ours.take(count), theirs.take(count)
            length = min(count * BLOCK_SIZE, max(0, size - block * BLOCK_SIZE))
            self._count(mine, yours, length)
            for index, width in _unequal(mine, yours, count):
                start = (block + index) * BLOCK_SIZE
                yield Range(start, max(1, min(width * BLOCK_SIZE, size - start)))
            block += count
            yield None
        if ours.unreadable:
            what.append("cannot be read in full on the source")
        if theirs.unreadable:
            what.append("cannot be read in full on the target")
        if not what and ours.holes != theirs.holes:
            self._tally.holes += 1

    def _count(self, mine: _Piece, yours: _Piece, length: int) -> None:
        if RunKind.DATA in (mine.kind, yours.kind):
            self._tally.checked += length
        self._tally.unreadable_source += length if mine.kind is RunKind.UNREADABLE else 0
        self._tally.unreadable_target += length if yours.kind is RunKind.UNREADABLE else 0

    def _shown(self, name: bytes) -> str:
        return shown_path(b"/".join([*(part for part in self._path if part), name]))


@dataclass(frozen=True, slots=True)
class _Piece:
    """Blocks of one kind; None: beyond the file's end."""

    kind: RunKind | None
    digests: bytes


class _Blocks:
    """The blocks of one file, taken in pieces of any number."""

    def __init__(self, cursor: _Cursor) -> None:
        self._cursor = cursor
        self._run: Run | None = None
        self._used = 0
        self.holes: Holes | None = None
        self.unreadable = False

    @property
    def left(self) -> int:
        return self._run.count - self._used if self._run is not None else 0

    def fill(self) -> bool:
        if self.left == 0 and self.holes is None:
            record = self._cursor.take()
            self._used = 0
            self._run = record if isinstance(record, Run) else None
            if not isinstance(record, Run):
                self.holes = record if isinstance(record, Holes) else Holes(0)
            elif record.kind is RunKind.UNREADABLE:
                self.unreadable = True
        return self.left > 0

    def take(self, count: int) -> _Piece:
        run, start = self._run, self._used
        if run is None or self.left == 0:
            return _Piece(None, b"")
        self._used += count
        return _Piece(run.kind, run.digests[start * DIGEST_SIZE : (start + count) * DIGEST_SIZE])


def _unequal(mine: _Piece, yours: _Piece, count: int) -> Iterator[tuple[int, int]]:
    """Blocks of two pieces of ``count`` blocks that are not equal: index and number."""
    if mine.kind is not yours.kind or mine.kind is RunKind.UNREADABLE:
        yield 0, count
        return
    if mine.digests == yours.digests:
        return
    for index in range(count):
        cut = slice(index * DIGEST_SIZE, (index + 1) * DIGEST_SIZE)
        if mine.digests[cut] != yours.digests[cut]:
            yield index, 1


def _join(ranges: list[Range], piece: Range) -> None:
    if ranges and ranges[-1].end == piece.offset:
        ranges[-1] = Range(ranges[-1].offset, ranges[-1].length + piece.length)
    else:
        ranges.append(piece)


# -- in words


def _differences(ours: Entry, theirs: Entry) -> Iterator[str]:
    """What differs between two entries of one name; the target's comes first."""
    yield from _cannot("source", ours)
    yield from _cannot("target", theirs)
    if Unreadable.ENTRY in ours.unreadable | theirs.unreadable:
        return
    if ours.kind is not theirs.kind:
        yield f"is a {theirs.kind}, not a {ours.kind}"
        return
    if ours.mode != theirs.mode:
        yield f"mode is {theirs.mode:04o}, not {ours.mode:04o}"
    if (ours.uid, ours.gid) != (theirs.uid, theirs.gid):
        yield f"owner is {theirs.uid}:{theirs.gid}, not {ours.uid}:{ours.gid}"
    if ours.size != theirs.size:
        yield f"size is {theirs.size}, not {ours.size}"
    if (ours.seconds, ours.nanoseconds) != (theirs.seconds, theirs.nanoseconds):
        yield f"modification time is {_moment(theirs)}, not {_moment(ours)}"
    if ours.links != theirs.links:
        yield f"names of the file: {theirs.links}, not {ours.links}"
    if ours.inode != theirs.inode:
        yield f"is another {ours.kind} (object {theirs.inode}, not {ours.inode})"
    if ours.device != theirs.device:
        yield f"device number is {_device(theirs)}, not {_device(ours)}"
    if (ours.flags, ours.project) != (theirs.flags, theirs.project):
        yield f"flags and project are {theirs.flags:#x} {theirs.project}, not {ours.flags:#x} {ours.project}"
    if ours.target != theirs.target:
        yield "points to another place"
    if ours.xattrs != theirs.xattrs:
        yield "extended attributes differ"
    if ours.acl != theirs.acl:
        yield "access control list differs"


_PARTS = {
    Unreadable.ENTRY: "cannot be read",
    Unreadable.LISTING: "entries cannot be listed",
    Unreadable.ATTRIBUTES: "attributes cannot be read",
    Unreadable.TARGET: "where it points cannot be read",
}


def _cannot(side: str, entry: Entry) -> Iterator[str]:
    for part, words in _PARTS.items():
        if part in entry.unreadable:
            yield f"{words} on the {side}"


def _moment(entry: Entry) -> str:
    try:
        text = datetime.fromtimestamp(entry.seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    except (OverflowError, ValueError, OSError):
        text = str(entry.seconds)
    return f"{text}.{entry.nanoseconds:09d}"


def _device(entry: Entry) -> str:
    return f"{entry.device >> 8 & 0xFFF}:{entry.device & 0xFF | entry.device >> 12 & 0xFFF00}"


def shown_path(path: bytes) -> str:
    """A path as people can read it, unambiguously; the root is ``.``"""
    text = (path or b".").replace(b"\\", b"\\x5c").decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) > MAX_SHOWN_PATH:
        half = MAX_SHOWN_PATH // 2
        text = f"{text[:half]} … {text[-half:]}"
    return text
