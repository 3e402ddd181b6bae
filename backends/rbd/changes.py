"""What a stream has to carry, as extents in ascending order.

Changes are found in two passes: which objects changed, by the object maps (fast-diff: nothing but the maps is read),
then which parts of those objects, asked of the OSDs. Both are librbd's diff, each used only for what it is right in:

- The maps say nothing true where they are marked invalid, or an image has none: then all objects are asked.
- librbd 16.2 compares maps of different lengths only as far as the shortest goes: of an image that was cut and grown
  again between two snapshots it leaves out what changed beyond the cut. So maps are believed up to the smallest size
  that any snapshot in between had; what is behind that is asked of the OSDs.
- A difference goes from an older snapshot to a newer one. Between others, both are read.
- librbd 16.2 takes what a difference begins at by its name only, and finds none of a group by that. So of such a base
  the way is told from an anchor, a snapshot with a name before it: whatever differs between base and later state
  differs from the anchor in one of the two. So what changed between anchor and base is carried as well, as it is in
  the later state. (The anchor is taken just before, so that is next to nothing: see ``together.py``.)
- Of a clone it says what is in the clone's own objects. What its parent shows it is never taken for zeros. Where the
  parent shows less of itself than before (the clone was cut and grown again, or flattened), librbd 16.2 has copied what
  was shown into objects first; that is not relied on (ceph#60290): then both are read.

Ranges begin and end at object boundaries (of a striped image: of a set of objects), as librbd miscounts others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from backends.blocks import GRANULARITY, merged
from backends.rbd.binding import Image
from backends.rbd.catalog import Catalog, RawSnapshot, anchor_of
from backends.rbd.cluster import Session
from backends.rbd.reading import Reader
from replicator.cancellation import Cancellation
from replicator.endpoint import Range
from replicator.streams import CHUNK_SIZE, Extent

WHOLE_WINDOW = 256 << 30
EXACT_WINDOW = 1 << 30
"""Bytes of an image that one question is about: bounds the answer, and how long it takes to be cancelled."""
MAX_BESIDE = 65536
"""Extents that are kept in memory, at most, but for whole objects."""


@dataclass(frozen=True, slots=True)
class Diff:
    """The way from one state of an image to a later one.

    :ivar image: open, at the later state
    :ivar size: of the later state
    :ivar base: the earlier one; None: nothing
    :ivar trusted: offset up to which the object maps may be believed; 0 without any
    :ivar period: bytes after which objects repeat: ranges begin at multiples of it
    :ivar beside: what may have changed beside that; ascending, disjoint, within ``size``
    :ivar has_parent: what is in no object of its own need not be zeros
    :ivar hidden: there may be changes that no object has: all of it may have changed
    """

    image: Image
    size: int
    base: RawSnapshot | None
    trusted: int
    period: int
    whole_window: int = WHOLE_WINDOW
    exact_window: int = EXACT_WINDOW
    beside: tuple[Extent, ...] = ()
    has_parent: bool = False
    hidden: bool = False

    def dirty(self, start: int = 0) -> Iterator[Range]:
        """Where something may have changed, whole objects at a time; without maps that is everything."""
        found = (Extent(each.offset, each.length) for each in self._dirty(start))
        yield from (Range(extent.offset, extent.length) for extent in united(found, self.beside))

    def _dirty(self, start: int = 0) -> Iterator[Range]:
        begin = start // self.period * self.period
        for offset, length in _windows(begin, self.trusted, _multiple(self.whole_window, self.period)):
            yield from (Range(e.offset, e.length) for e in merged(self._ask(offset, length, whole=True)))
        if max(begin, self.trusted) < self.size:
            yield Range(max(begin, self.trusted), self.size - max(begin, self.trusted))

    def extents(self, start: int = 0) -> Iterator[Extent]:
        """What changed, from offset ``start`` on."""
        if self.hidden:
            return (Extent(offset, length) for offset, length in _windows(start, self.size, self.exact_window))
        return merged(_from(start, united(self._exact(start), self.beside)))

    def _exact(self, start: int) -> Iterator[Extent]:
        done = 0
        for found in self._dirty(start):
            begin = max(found.offset // self.period * self.period, done)
            done = min(-(-found.end // self.period) * self.period, self.size)
            for offset, length in _windows(begin, done, _multiple(self.exact_window, self.period)):
                yield from self._ask(offset, length, whole=False)

    def estimate(self, start: int = 0) -> int | None:
        """Bytes of whole objects that changed, None where only asking all OSDs could tell."""
        if self.size and (not self.trusted or self.size - self.trusted >= self.period):
            return None
        return sum(max(0, min(found.end, self.size) - max(found.offset, start)) for found in self.dirty(start))

    def _ask(self, offset: int, length: int, *, whole: bool) -> list[Extent]:
        found: list[Extent] = []

        def add(begin: int, size: int, exists: bool) -> None:
            end = min(begin + size, self.size)
            if end > begin:  # zeros where there was nothing need not be said
                found.append(Extent(begin, end - begin, zero=not exists and not whole and not self.has_parent))

        base = self.base.name if self.base is not None else None
        self.image.diff_iterate(offset, length, base, add, True, whole)
        if self.base is None and not whole:
            return [extent for extent in found if not extent.zero]
        return found


def find_changes(
    session: Session, image: Image, raw: Iterable[RawSnapshot], base: RawSnapshot | None, to: RawSnapshot | None
) -> Diff:
    """The way from ``base`` to ``to`` (None: the head), which is the newer one; leaves ``image`` at ``to``.

    :param raw: all snapshots of the image
    """
    raw = tuple(raw)
    if base is not None and not base.user:
        anchor = anchor_of(raw, base)
        first = _bounded(find_changes(session, image, raw, anchor, base))
        diff = find_changes(session, image, raw, anchor, to)
        return replace(diff, beside=_within(first, diff.size))
    later = [s for s in raw if (base is None or s.id >= base.id) and (to is None or s.id <= to.id)]
    between = later if base is not None else [s for s in later if s == to]
    usable = _maps_valid(session, image, between, head=to is None)
    image.set_snap_by_id(None if to is None else to.id)
    size = image.size()
    period = int(image.stat()["obj_size"]) * image.stripe_count()
    trusted = _trusted(size, period, between) if usable else 0
    overlap = image.overlap()
    hidden = False
    if base is not None:
        image.set_snap_by_id(base.id)
        hidden = image.overlap() > overlap
        image.set_snap_by_id(None if to is None else to.id)
    return Diff(image, size, base, trusted, period, has_parent=overlap > 0, hidden=hidden)


def _trusted(size: int, period: int, between: Iterable[RawSnapshot]) -> int:
    """The offset up to which maps that are valid may be believed."""
    smallest = min([size, *(snapshot.size for snapshot in between)])
    return size if smallest == size else smallest // period * period


@dataclass(frozen=True, slots=True)
class CloneDiff:
    """Where a clone may differ from the snapshot that it began as: in objects of its own, and where that does not show
    through. Whether it does, only reading both says.

    :ivar image: open, at the state of the clone
    :ivar size: of that
    :ivar whole: offset up to which objects of its own can be asked for; behind it, everything may differ
    :ivar period: as in a :class:`Diff`
    """

    image: Image
    size: int
    whole: int
    period: int

    def ranges(self, start: int = 0) -> Iterator[Range]:
        """Them, from offset ``start`` on."""
        begin = start // self.period * self.period
        for offset, length in _windows(begin, self.whole, _multiple(WHOLE_WINDOW, self.period)):
            own: list[Extent] = []

            def add(found: int, size: int, _exists: bool, own: list[Extent] = own) -> None:
                offset, end = max(found, start), min(found + size, self.whole)
                if end > offset:
                    own.append(Extent(offset, end - offset))

            self.image.diff_iterate(offset, length, None, add, False, True)
            yield from (Range(e.offset, e.length) for e in merged(own))
        rest = max(start, self.whole)
        if rest < self.size:
            yield Range(rest, self.size - rest)

    def estimate(self, start: int = 0) -> int | None:
        """Bytes in objects of its own, at most; None where only reading all of it could tell."""
        if self.size and not self.whole:
            return None
        return sum(found.length for found in self.ranges(start))


def find_own(
    session: Session, image: Image, raw: Iterable[RawSnapshot], origin: RawSnapshot, to: RawSnapshot
) -> CloneDiff:
    """Where snapshot ``to`` of a clone may differ from its origin; leaves ``image`` at ``to``.

    :param raw: all snapshots of the clone
    """
    before = [s for s in raw if s.id <= to.id]
    usable = _maps_valid(session, image, before, head=False)
    image.set_snap_by_id(to.id)
    size, overlap = image.size(), image.overlap()
    period = int(image.stat()["obj_size"]) * image.stripe_count()
    whole = _trusted(size, period, before) if usable else 0
    if overlap < min(origin.size, size):
        whole = min(whole, overlap // period * period)
    return CloneDiff(image, size, whole, period)


def _bounded(diff: Diff) -> list[Extent]:
    """All that changed, without its kind; by whole objects where it is in too many pieces to keep."""
    found = _plain(islice(diff.extents(), MAX_BESIDE + 1))
    if len(found) <= MAX_BESIDE:
        return found
    return _plain(Extent(each.offset, each.length) for each in diff.dirty())


def _plain(extents: Iterable[Extent]) -> list[Extent]:
    return list(merged(Extent(each.offset, each.length) for each in extents))


def _within(extents: Iterable[Extent], size: int) -> tuple[Extent, ...]:
    return tuple(Extent(each.offset, min(each.end, size) - each.offset) for each in extents if each.offset < size)


def united(extents: Iterable[Extent], others: Iterable[Extent]) -> Iterator[Extent]:
    """Extents, and what there is in others beside them: ascending and disjoint, as both are."""
    rest = iter(others)
    other = next(rest, None)
    done = 0
    for extent in extents:
        while other is not None and other.offset < extent.end:
            begin = max(other.offset, done)
            if begin < extent.offset:
                yield Extent(begin, min(other.end, extent.offset) - begin)
            if other.end > extent.end:
                break
            other = next(rest, None)
        yield extent
        done = extent.end
    while other is not None:
        begin = max(other.offset, done)
        if begin < other.end:
            yield Extent(begin, other.end - begin)
        other = next(rest, None)


def _maps_valid(session: Session, image: Image, snapshots: list[RawSnapshot], *, head: bool) -> bool:
    rbd = session.binding.rbd
    needed = rbd.RBD_FEATURE_OBJECT_MAP | rbd.RBD_FEATURE_FAST_DIFF
    invalid = rbd.RBD_FLAG_OBJECT_MAP_INVALID | rbd.RBD_FLAG_FAST_DIFF_INVALID
    for snapshot in [s.id for s in snapshots] + ([None] if head else []):
        image.set_snap_by_id(snapshot)
        if image.features() & needed != needed or image.flags() & invalid:
            return False
    return True


def _multiple(window: int, period: int) -> int:
    return max(1, window // period) * period


def _windows(start: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    for offset in range(start, end, step):
        yield offset, min(step, end - offset)


def _from(start: int, extents: Iterable[Extent]) -> Iterator[Extent]:
    for extent in extents:
        offset = max(extent.offset, start)
        if extent.end > offset:
            yield Extent(offset, extent.end - offset, extent.zero)


def selected(ranges: Iterable[Range], size: int, start: int) -> Iterator[Extent]:
    """Just these ranges; what is beyond the end is left out."""
    for wanted in ranges:
        offset, end = max(wanted.offset, start), min(wanted.end, size)
        if offset < end:
            yield Extent(offset, end - offset)


def compared(newer: Reader, older: Reader, ranges: Iterable[Range], cancel: Cancellation) -> Iterator[Extent]:
    """Changes by reading both in these ranges, to the piece of 4 KiB. What lies beyond the end of ``older`` is zeros
    there."""
    common = min(newer.size, older.size)
    for found in ranges:
        yield from _compared(newer, older, Range(found.offset, max(0, min(found.end, common) - found.offset)), cancel)
        rest = max(found.offset, common)
        for offset, length in _windows(rest, min(found.end, newer.size), CHUNK_SIZE):
            yield Extent(offset, length)


def _compared(newer: Reader, older: Reader, within: Range, cancel: Cancellation) -> Iterator[Extent]:
    windows = [Extent(offset, length) for offset, length in _windows(within.offset, within.end, CHUNK_SIZE)]
    pairs = zip(newer.read([e] for e in windows), older.read([e] for e in windows), strict=True)
    for (batch, (mine,)), (_, (theirs,)) in pairs:
        cancel.check()
        if mine != theirs:
            for place in range(0, len(mine), GRANULARITY):
                if mine[place : place + GRANULARITY] != theirs[place : place + GRANULARITY]:
                    yield Extent(batch[0].offset + place, min(GRANULARITY, len(mine) - place))


def head_changed(session: Session, image: Image, catalog: Catalog) -> bool:
    """Whether a head has data that the newest snapshot has not. Of a replica see also :attr:`Catalog.head_is`.

    :param image: open for reading only: to look at snapshots with one that is being written to would let go its lock
    """
    newest = catalog.raw[-1] if catalog.raw else None
    if newest is None or not (newest.user or any(found.raw == newest for found in catalog.snapshots)):
        return True
    diff = find_changes(session, image, catalog.raw, newest, None)
    if newest.size != diff.size or (diff.hidden and newest.user):
        return True
    # With object maps an answer costs nothing; without, the OSDs are asked.
    found: Iterator[object] = diff.dirty() if diff.trusted >= diff.size else diff.extents()
    if next(found, None) is None:
        return False
    # Of one of a group that says only where to look.
    return newest.user or _differs(image, newest, diff)


def _differs(image: Image, snapshot: RawSnapshot, diff: Diff) -> bool:
    """Whether a head and a snapshot differ where they may; reads both, up to the first difference."""
    for extent in diff.extents():
        for offset, length in _windows(extent.offset, extent.end, CHUNK_SIZE):
            image.set_snap_by_id(snapshot.id)
            before = image.read(offset, length)
            image.set_snap_by_id(None)
            if image.read(offset, length) != before:
                return True
    return False
