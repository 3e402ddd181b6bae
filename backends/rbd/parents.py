"""What an image is a clone of, known by identity.

A snapshot's name says little: one that was removed while it had clones lives on in the trash, and another may have its
name. The header of the clone has the ids of image and snapshot, so that is what is read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from backends.rbd import health
from backends.rbd.binding import Image
from backends.rbd.catalog import Catalog, RawSnapshot, Snapshot
from backends.rbd.cluster import Session, is_absent
from backends.rbd.context import Context
from backends.rbd.naming import HIDDEN, Place
from replicator.endpoint import ReceiveMode, ReceiveRequest
from replicator.errors import DamagedData, InvalidName, NoSuchSnapshot, NoSuchVolume, Unsupported, UsageError
from replicator.model import Origin, VolumeId

_NONE = -1  # the pool of what is no clone
_START = struct.Struct("<BBIqI")  # version, oldest reader, length, pool, length of the namespace


@dataclass(frozen=True, slots=True)
class Parent:
    """The snapshot that an image began as.

    :ivar pool, namespace: where its image is
    :ivar image: the id of that
    :ivar snapshot: RBD's number of it
    """

    pool: int
    namespace: str
    image: str
    snapshot: int


def decode(data: bytes) -> Parent | None:
    """``cls::rbd::ParentImageSpec`` (cls/rbd/cls_rbd_types.h), as the OSD class ``rbd`` answers ``parent_get``.

    None where it is none, or of a form that this version does not know: then the image is sent as if it were none.
    """
    try:
        _, oldest, _, pool, size = _START.unpack_from(data)
        if oldest > 1 or pool == _NONE:
            return None
        namespace, place = _text(data, _START.size, size)
        (size,) = struct.unpack_from("<I", data, place)
        image, place = _text(data, place + 4, size)
        (snapshot,) = struct.unpack_from("<Q", data, place)
    except (struct.error, ValueError):
        return None
    return Parent(pool, namespace, image, snapshot)


def _text(data: bytes, place: int, size: int) -> tuple[str, int]:
    if place + size > len(data):
        raise ValueError("it ends too early")
    return data[place : place + size].decode(), place + size


def read_parent(session: Session, namespace: str, image: Image) -> Parent | None:
    """What an open image is a clone of, as it is now; None where nothing of it comes from there (any more)."""
    with session.ioctx(namespace) as ioctx:
        _, answer = ioctx.execute(f"rbd_header.{image.id()}", "rbd", "parent_get", b"")
    return decode(bytes(answer))


@dataclass(frozen=True, slots=True)
class OpenParent:
    """The volume that an image is a clone of, and the snapshot that it began as.

    :ivar image: open, at its head
    """

    image: Image
    volume: str
    catalog: Catalog
    snapshot: Snapshot


@contextmanager
def opened_parent(context: Context, session: Session, place: Place, image: Image) -> Iterator[OpenParent | None]:
    """What an image (open at its head) is a clone of, open for reading; None where that is no volume of the storage, or
    the snapshot is no version of it (any more).

    :param place: of the clone
    """
    found = read_parent(session, place.namespace, image) if image.overlap() else None
    where = _volume_of(context, session, image, found) if found is not None else None
    if found is None or where is None:
        yield None
        return
    volume, parent = where
    opening = context.opened_at(session, parent, context.label(volume))
    try:
        opened, catalog = opening.__enter__()
    except (NoSuchVolume, DamagedData):
        yield None
        return
    try:
        snapshot = next((s for s in catalog.snapshots if s.raw.id == found.snapshot), None)
        usable = snapshot is not None and catalog.image == found.image and not health.foreign(session, opened)
        yield OpenParent(opened, volume, catalog, snapshot) if snapshot is not None and usable else None
    finally:
        opening.__exit__(None, None, None)


def _volume_of(context: Context, session: Session, image: Image, parent: Parent) -> tuple[str, Place] | None:
    if parent.pool != session.pool_id or context.naming.namespace not in (None, parent.namespace):
        return None
    try:
        name = str(image.get_parent_image_spec()["image_name"])
    except session.binding.errors as error:
        if is_absent(error):  # flattened just now
            return None
        raise
    place = Place(parent.namespace, name)
    try:
        return None if name.startswith(HIDDEN) else (context.naming.volume(place), place)
    except InvalidName:
        return None


@dataclass(frozen=True, slots=True)
class CloneOf:
    """The snapshot that a replica is to be a clone of.

    :ivar place: of its image
    :ivar parent: what the clone's header then says
    """

    place: Place
    raw: RawSnapshot
    parent: Parent


def find_base(context: Context, session: Session, request: ReceiveRequest) -> CloneOf:
    """The snapshot that the replica of a request is to be a clone of. :raises NoSuchSnapshot: there is none"""
    what = context.label(request.volume.name)
    if request.origin is None or request.base is None or request.mode is not ReceiveMode.REPLICA:
        raise UsageError(f"no snapshot is given that {what} is to be a clone of", hint="")
    if request.origin.storage != context.storage:
        raise Unsupported(
            f"{what} cannot be a clone of {request.origin}, which is in another storage",
            hint="it is sent in full where what it is a clone of is not on the same target",
        )
    label, place = context.label(request.origin.name), context.naming.place(request.origin.name)
    try:
        with context.opened_at(session, place, label) as (_, catalog):
            if not catalog.is_replica:
                raise NoSuchSnapshot(f"{label} is no replica that {what} can be a clone of", hint="plan again")
            raw = catalog.require(request.base).raw
            if not raw.user:
                raise Unsupported(
                    f"{request.base.name} of {label} was taken in a group, so RBD makes no clone of it for {what}",
                    hint="`rbd flatten` the clone at its source: it is sent in full then",
                )
            return CloneOf(place, raw, Parent(session.pool_id, place.namespace, catalog.image, raw.id))
    except NoSuchVolume as error:
        raise NoSuchSnapshot(f"{error}, so {what} cannot be a clone of it", hint="plan again") from None


class Origins:
    """Tells of clones what they began as; for one listing, in which each parent is read once."""

    def __init__(self, context: Context, session: Session) -> None:
        self._context = context
        self._session = session
        self._known: dict[Parent, Origin | None] = {}

    def of(self, place: Place, image: Image) -> Origin | None:
        """Of an image that is open at its head."""
        if not image.overlap():
            return None
        parent = read_parent(self._session, place.namespace, image)
        if parent is None:
            return None
        if parent not in self._known:
            with opened_parent(self._context, self._session, place, image) as found:
                self._known[parent] = (
                    None
                    if found is None
                    else Origin(VolumeId(self._context.storage, found.volume), found.snapshot.version.name)
                )
        return self._known[parent]
