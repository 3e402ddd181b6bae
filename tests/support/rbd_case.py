"""The RBD backend under test, on a real cluster."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backends.rbd import RbdBackend
from backends.rbd.binding import load
from backends.rbd.catalog import create_snapshot, read_catalog
from backends.rbd.cluster import Connection, Session, Where
from backends.rbd.locks import Lease
from backends.rbd.naming import Naming, Place
from backends.rbd.records import Identity, SnapshotRecord, snapshot_key
from replicator.model import Version, VersionRef
from tests.support.cases import BackendCase
from transport import checksum

POOL = "rbd"
WHOLE = "whole"
"""The pool of those that are about all of it."""


class RbdCase(BackendCase):
    """:class:`~backends.rbd.backend.RbdBackend` in a new namespace, which is left behind: to remove images takes longer
    than a test.

    What a guest or an operator does goes over a connection of its own, as it comes from elsewhere.

    :param whole: not a namespace but a pool, which is emptied before
    """

    def __init__(
        self,
        conf: Path,
        *,
        whole: bool = False,
        name: str = "store",
        lease: Lease | None = None,
        grouped: bool = False,
        pool: str = POOL,
        namespace: str | None = None,
    ) -> None:
        self.conf = conf
        self.name = name
        self.namespace = namespace = None if whole else namespace or f"case-{uuid.uuid4().hex[:12]}"
        self.pool = WHOLE if whole else pool
        self.naming = Naming(namespace)
        self._lease = lease
        self._grouped = grouped
        self.hands = Connection("hands", self.where(), load)
        with self.session() as session:
            if namespace is None:
                empty_pool(session)
            else:
                make_namespace(session, namespace)
        self.backend = self.open()

    def where(self, user: str = "admin", keyring: Path | None = None) -> Where:
        """The cluster's pool, as a user."""
        return Where(self.pool, self.conf, user, keyring)

    def open(self, where: Where | None = None) -> RbdBackend:
        """Another backend over the same images, as on another node."""
        return RbdBackend(
            self.name,
            where or self.where(),
            namespace=self.namespace,
            checksums=checksum,
            grouped=self._grouped,
            lease=self._lease,
        )

    def reopen(self) -> None:
        self.backend.close()
        self.backend = self.open()

    def close(self) -> None:
        self.backend.close()
        self.hands.close()

    @contextmanager
    def session(self) -> Iterator[Session]:
        """The hands' connection."""
        with self.hands.session("working by hand") as session:
            yield session

    @contextmanager
    def image(self, volume: str, *, read_only: bool = False) -> Iterator[Any]:
        """A volume's image; all that the binding can do."""
        with self.session() as session, session.image(self.naming.place(volume), read_only=read_only) as image:
            yield image

    def create(self, volume: str, data: bytes) -> None:
        place = self.naming.place(volume)
        with self.session() as session:
            make_namespace(session, place.namespace)
            with session.ioctx(place.namespace) as ioctx:
                if place.image not in session.pool.list(ioctx):
                    session.pool.create(ioctx, place.image, len(data), features=61)
        with self.image(volume) as image:
            image.resize(len(data))
            write(image, 0, data)

    def write(self, volume: str, offset: int, data: bytes) -> None:
        with self.image(volume) as image:
            write(image, offset, data)

    def resize(self, volume: str, size: int) -> None:
        with self.image(volume) as image:
            image.resize(size)

    def read(self, volume: str) -> bytes:
        with self.image(volume, read_only=True) as image:
            return read(image)

    def read_snapshot(self, volume: str, version: Version | VersionRef) -> bytes:
        with self.session() as session, self.image(volume, read_only=True) as image:
            found = read_catalog(session, image, volume)
            snapshot = next(s for s in found.snapshots if s.version.guid == version.guid)
            image.set_snap_by_id(snapshot.raw.id)
            return read(image)

    def damage(self, volume: str, version: Version | VersionRef, offset: int, data: bytes) -> None:
        """Nobody can write into a snapshot of RBD. So another one, of damaged bytes, is put in its place, with its
        identity; the head has been written to then."""
        wrong = bytearray(self.read_snapshot(volume, version))
        wrong[offset : offset + len(data)] = data
        live = self.read(volume)
        with self.session() as session, self.image(volume) as image:
            found = read_catalog(session, image, volume)
            old = next(s for s in found.snapshots if s.version.guid == version.guid)
            image.resize(len(wrong))
            write(image, 0, bytes(wrong))
            raw = create_snapshot(image, found.image, f"damaged-{uuid.uuid4().hex}")
            was = old.version
            identity = Identity(was.guid, was.name, was.created, was.position)
            image.metadata_set(snapshot_key(raw.id), SnapshotRecord(identity).encode(raw.taken))
            for key, value in found.metadata.items():
                if key.startswith(f"replicator.hold.{old.raw.id}."):
                    mark = value.replace(old.raw.taken.time.isoformat(), raw.taken.time.isoformat())
                    image.metadata_set(key.replace(f".{old.raw.id}.", f".{raw.id}."), mark)
            if image.is_protected_snap(old.raw.name):
                image.unprotect_snap(old.raw.name)
            image.remove_snap(old.raw.name)
            image.rename_snap(raw.name, old.raw.name)
            image.resize(len(live))
            write(image, 0, live)


def make_namespace(session: Session, namespace: str) -> None:
    with session.ioctx("") as ioctx:
        if namespace and namespace not in session.pool.namespace_list(ioctx):
            session.pool.namespace_create(ioctx, namespace)


def empty_pool(session: Session) -> None:
    """Remove all images and namespaces."""
    pool: Any = session.pool
    with session.ioctx("") as ioctx:
        namespaces = [str(name) for name in pool.namespace_list(ioctx)]
    left: list[Place] = []
    for namespace in ["", *namespaces]:
        with session.ioctx(namespace) as ioctx:
            left += [Place(namespace, str(name)) for name in pool.list(ioctx)]
            for item in list(pool.trash_list(ioctx)):
                pool.trash_remove(ioctx, item["id"], True)
    for _ in range(len(left)):  # clones before what they are clones of
        for place in list(left):
            with session.ioctx(place.namespace) as ioctx:
                try:
                    purge(session, place)
                    pool.remove(ioctx, place.image)
                except session.binding.errors:
                    continue
            left.remove(place)
    assert not left, f"cannot be removed: {left}"
    for namespace in namespaces:
        with session.ioctx("") as ioctx:
            pool.namespace_remove(ioctx, namespace)


def purge(session: Session, place: Place) -> None:
    """Remove all snapshots of an image."""
    with session.image(place, read_only=False) as image:
        for snapshot in list(image.list_snaps()):
            if image.is_protected_snap(str(snapshot["name"])):
                image.unprotect_snap(str(snapshot["name"]))
            image.remove_snap(str(snapshot["name"]))


def write(image: Any, offset: int, data: bytes) -> None:
    """Write live data, growing the image where it is too short."""
    if offset + len(data) > image.size():
        image.resize(offset + len(data))
    if data:
        image.write(data, offset)


def read(image: Any) -> bytes:
    """All that there is where the image is at."""
    size = image.size()
    data: bytes = image.read(0, size) if size else b""
    return data
