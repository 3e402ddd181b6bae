"""Changes in the records of ``rbd export-diff``: one for each that librbd tells of, neither joined nor cut.

So the same question is asked as that command asks: by extents, of all objects, whatever object maps say. A stream
between nodes needs no such records (see :mod:`backends.rbd.changes`), and costs less. Only from a snapshot that was
taken in a group, which that command cannot export from, the records are those of a stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from backends.rbd.binding import Image
from backends.rbd.catalog import Catalog, RawSnapshot, told_from
from backends.rbd.changes import find_changes
from backends.rbd.cluster import Session
from backends.rbd.context import Context
from backends.rbd.presence import require_still_there
from backends.rbd.reading import Reader
from replicator.cancellation import Cancellation
from replicator.diff_format import Piece
from replicator.errors import Unsupported
from replicator.model import VersionKind, VersionRef
from replicator.streams import CHUNK_SIZE, Extent

WINDOW = 1 << 30
"""Bytes of an image that one question is about: bounds the answer, and how long it takes to be cancelled."""


@contextmanager
def open_diff(
    context: Context, volume: str, base: VersionRef | None, to: VersionRef, cancel: Cancellation
) -> Iterator[Iterator[Piece]]:
    """See :meth:`replicator.local.LocalEndpoint.diff`."""
    if base is not None and base.kind is not VersionKind.SNAPSHOT:
        raise Unsupported(f"{context.label(volume)} has no bookmarks", hint="")
    with (
        context.session(f"exporting {volume}@{to.name}") as session,
        context.opened(session, volume) as (image, catalog),
    ):
        later = catalog.require(to)
        earlier = catalog.require(base).raw if base is not None else None
        label = f"{context.label(volume)}@{later.version.name}"
        if earlier is not None and earlier.id >= later.raw.id:
            raise Unsupported(
                f"{label} was taken before its base {base.name if base else ''} in this cluster, so RBD cannot tell "
                "the difference (a repair put another in its place)",
                hint="export it without --from",
            )
        image.set_snap_by_id(later.raw.id)
        size = image.size()
        if earlier is not None and not earlier.user:
            # Nor does librbd tell what differs from one that was taken in a group: it takes names alone.
            found = find_changes(session, image, catalog.raw, earlier, later.raw).extents()
        else:
            found = _records(image, size, earlier, cancel)
        needed = told_from(catalog.raw, earlier) if earlier is not None else ()
        pieces = _read(Reader(image, size, label, cancel), found)
        yield _believed(context, session, volume, catalog, (*needed, later.raw), pieces)


def _believed(
    context: Context,
    session: Session,
    volume: str,
    catalog: Catalog,
    snapshots: Sequence[RawSnapshot],
    pieces: Iterator[Piece],
) -> Iterator[Piece]:
    """Them, and an error behind the last one where a snapshot was removed meanwhile: then the diff has no end."""
    yield from pieces
    require_still_there(session, context.naming.place(volume), catalog.image, snapshots, catalog.label)


def _records(image: Image, size: int, base: RawSnapshot | None, cancel: Cancellation) -> Iterator[Extent]:
    """All that librbd tells of, in its order. It answers for each set of objects by itself, so the answers to many
    questions are those to one."""
    period = int(image.stat()["obj_size"]) * image.stripe_count()
    window = max(1, WINDOW // period) * period
    for start in range(0, size, window):
        cancel.check()
        found: list[Extent] = []

        def add(offset: int, length: int, exists: bool, found: list[Extent] = found) -> None:
            found.append(Extent(offset, length, zero=not exists))

        image.diff_iterate(start, min(window, size - start), base.name if base is not None else None, add, True, False)
        yield from found


def _read(reader: Reader, records: Iterator[Extent]) -> Iterator[Piece]:
    """The records with their bytes, read ahead."""
    coming: deque[Extent] = deque()

    def parts() -> Iterator[Sequence[Extent]]:
        for record in records:
            step = record.length if record.zero else CHUNK_SIZE
            for offset in range(record.offset, record.end, step):
                coming.append(record)
                yield (Extent(offset, min(step, record.end - offset), record.zero),)

    for _, data in reader.read(parts()):
        yield Piece(coming.popleft(), data[0] if data else b"")
