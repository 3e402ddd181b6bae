"""An image that is being written to: under all its locks, in order, and what its head is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

from backends.base import not_removable
from backends.rbd import records
from backends.rbd.binding import Image
from backends.rbd.catalog import Catalog, Snapshot, mark_head, read_catalog, remove_key, tidy, unmark_head
from backends.rbd.changes import head_changed
from backends.rbd.cluster import Session
from backends.rbd.context import Context
from backends.rbd.images import image_id, remove_image
from backends.rbd.locks import Held, writing
from backends.rbd.naming import Place
from backends.rbd.objects import Objects, objects_of
from backends.rbd.receiving import copy_back
from backends.rbd.records import Partial, Stage
from backends.rbd.snapshotting import refuse_users
from replicator.cancellation import Cancellation
from replicator.errors import VolumeBusy


def remove_leftover(context: Context, session: Session, place: Place, label: str, doing: str) -> None:
    """Remove an image that was never completed. :raises VolumeBusy: it is being worked on"""
    identity = image_id(session, place)
    if identity is not None:
        with writing(session, place.namespace, identity, label, doing, context.lease, Cancellation()) as held:
            held.check()
            remove_image(session, place)


def discard_image(context: Context, session: Session, place: Place, label: str, doing: str, work: Cancellation) -> None:
    """Remove a replica that has no version: only part of a first one ever came. :raises VolumeBusy: it is in use"""
    identity = image_id(session, place)
    if identity is None:
        return
    with writing(session, place.namespace, identity, label, doing, context.lease, work) as held:
        with session.image(place, read_only=False) as image:
            refuse_users(session, image, label)
            tidy(session, image, read_catalog(session, image, label))
            found = read_catalog(session, image, label)
            if found.image != identity or found.snapshots or found.partial is None:
                raise VolumeBusy(f"{label} was changed by somebody else just now", hint="run it again")
            unmark_head(image, found)
        held.check()
        remove_image(session, place)


@contextmanager
def writable(
    context: Context, session: Session, place: Place, label: str, doing: str, cancel: Cancellation
) -> Iterator[Target]:
    """Be the only writer of an image, which is put in order first. :raises VolumeBusy: it is in use"""
    identity = image_id(session, place)
    if identity is None:
        raise context.no_volume(label)
    with (
        writing(session, place.namespace, identity, label, doing, context.lease, cancel) as held,
        session.image(place, read_only=False) as image,
    ):
        if image.id() != identity:
            raise VolumeBusy(f"{label} was replaced by another image just now", hint="run it again")
        refuse_users(session, image, label)
        rbd = session.binding.rbd
        if image.features() & rbd.RBD_FEATURE_EXCLUSIVE_LOCK:
            # Whoever opens the image now cannot write; and whoever had it and was lost is fenced off by the cluster.
            image.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
        tidy(session, image, read_catalog(session, image, label))
        yield Target(session, place, label, image, held)


def remove_replica(context: Context, volume: str) -> None:
    """See :meth:`backends.base.Backend.remove`."""
    place, label, doing = context.naming.place(volume), context.label(volume), "removing it"
    with context.session(f"removing {volume}") as session:
        remove_leftover(context, session, place.arriving, label, doing)
        identity = image_id(session, place)
        if identity is None:
            return
        with writing(session, place.namespace, identity, label, doing, context.lease, Cancellation()) as held:
            with session.image(place, read_only=False) as image:
                refuse_users(session, image, label)
                found = read_catalog(session, image, label)
                if not found.is_replica or found.snapshots:
                    raise not_removable(label, found.lineage)
                tidy(session, image, found)
                unmark_head(image, read_catalog(session, image, label))
                if any(True for _ in image.list_snaps()):
                    raise VolumeBusy(
                        f"{label} has snapshots of a group, of mirroring or with clones, so it is not removed",
                        hint="`rbd snap ls --all` and `rbd children --all` show them",
                    )
            held.check()
            remove_image(session, place)


class Target:
    """An image that is being written to, under all its locks."""

    def __init__(self, session: Session, place: Place, label: str, image: Image, held: Held) -> None:
        self.session = session
        self.image = image
        self.label = label
        self.work = held.work
        self._held = held
        self._place = place
        self.catalog = read_catalog(session, image, label)

    def read_again(self) -> Catalog:
        """What is known of the image now."""
        self.catalog = read_catalog(self.session, self.image, self.label)
        return self.catalog

    def still_ours(self) -> None:
        """Before what RBD's own lock does not keep apart: metadata. :raises StorageUnavailable: the lease is lost"""
        self._held.check()

    def objects(self) -> AbstractContextManager[Objects | None]:
        """Its objects, to write to them; None where only librbd may."""
        return objects_of(self.session, self._place.namespace, self.image)

    def note(self, partial: Partial) -> None:
        """Write the record of what is being received."""
        self.still_ours()
        self.image.metadata_set(records.PARTIAL, partial.encode(self.catalog.image))

    def forget_partial(self) -> None:
        """Remove that record: the head is a version's content."""
        self.still_ours()
        remove_key(self.image, records.PARTIAL)

    def head_is(self, base: Snapshot | None) -> bool:
        """Whether the head is exactly that version, or for None nothing at all."""
        catalog = self.catalog
        if catalog.partial is not None or base is None or catalog.head_is != base.version.guid:
            return False
        with self.session.image(self._place) as looking:
            return not head_changed(self.session, looking, catalog)

    def begin(self, partial: Partial, base: Snapshot | None) -> None:
        """Make the head what the stream applies to, of the size that it is going to have."""
        stage = Stage.WRITE if self.head_is(base) else Stage.REVERT
        self.note(replace(partial, stage=stage))
        unmark_head(self.image, self.catalog)
        self.read_again()
        if stage is Stage.REVERT:
            self._revert(base)
            self.note(replace(partial, stage=Stage.WRITE))
        self.resize(partial.size)

    def begin_clone(self, partial: Partial) -> None:
        """Take a head that is what the image is a clone of as what the stream applies to."""
        self.note(replace(partial, stage=Stage.WRITE))
        self.resize(partial.size)

    def put_back(self, partial: Partial) -> None:
        """Make the head the newest version again, and note that it is."""
        newest = self.catalog.snapshots[-1] if self.catalog.snapshots else None
        self.note(replace(partial, stage=Stage.REVERT))
        unmark_head(self.image, self.catalog)
        self.read_again()
        self._revert(newest)
        if newest is None:  # nothing that a note could be about: the record goes on saying that the head is nothing
            return
        if not self.head_is_newest(newest):
            mark_head(self.image, self.catalog, newest.version.guid)
        self.forget_partial()

    def head_is_newest(self, newest: Snapshot) -> bool:
        """Whether nothing was written since RBD's newest snapshot, and that is this version."""
        catalog = replace(self.read_again(), partial=None)
        if catalog.head_is != newest.version.guid:
            return False
        with self.session.image(self._place) as looking:
            return not head_changed(self.session, looking, catalog)

    def resize(self, size: int) -> None:
        """Cut or grow the head."""
        self.still_ours()
        if self.image.size() != size:
            self.image.resize(size)

    def _revert(self, base: Snapshot | None) -> None:
        if base is None:
            self.resize(0)
            return
        self.resize(base.raw.size)
        copy_back(self.session, self._place, self.image, self.catalog, base.raw, self.work)
