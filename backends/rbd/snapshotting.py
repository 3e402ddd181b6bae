"""Taking snapshots of live images, keeping a replica's own data aside, cloning."""

from __future__ import annotations

from collections.abc import Mapping

from backends.rbd import records
from backends.rbd.binding import Image
from backends.rbd.catalog import Catalog, forget_removed, read_catalog
from backends.rbd.changes import head_changed
from backends.rbd.cluster import Session, exists_already
from backends.rbd.context import Context
from backends.rbd.images import make_namespace
from backends.rbd.locks import writing
from backends.rbd.naming import Place
from replicator import names
from replicator.cancellation import Cancellation
from replicator.errors import NoSuchVolume, SnapshotExists, Unsupported, VolumeBusy
from replicator.model import Lineage, Role, Version, VersionRef

_OWN_LOCKS = "internal"  # the tag of exclusive locks that librbd manages by itself (librbd/managed_lock/Utils.cc)


def take_snapshot(context: Context, volume: str, name: str) -> Version:
    """Snapshot the live image; one of that name that exists is returned. The image may be in use: who has its exclusive
    lock takes the snapshot.

    :raises NoSuchVolume: there is no image, or its head is no live data: it is a replica
    """
    with (
        context.session(f"taking snapshot {name} of {volume}") as session,
        context.opened(session, volume, read_only=False) as (image, catalog),
    ):
        existing = catalog.named(name)
        if existing is not None:
            return existing.version
        refuse_replica(catalog)
        return _take(session, context.naming.place(volume), image, catalog, name)


def refuse_replica(catalog: Catalog) -> None:
    """:raises NoSuchVolume: its head is no live data"""
    if catalog.is_replica:
        raise NoSuchVolume(
            f"volume {catalog.label} has no live data to snapshot: it is a replica",
            hint="take snapshots of its primary",
        )


def _take(session: Session, place: Place, image: Image, catalog: Catalog, name: str) -> Version:
    try:
        image.create_snap(name)
    except session.binding.errors as error:
        if not exists_already(error):
            raise
    found = read_catalog(session, image, catalog.label)
    with session.notes(place.namespace, found.image) as notes:
        forget_removed(notes, found)  # by hand, with what we had noted of them
    made = found.named(name)
    if made is None:
        raise SnapshotExists(
            f"{catalog.label} has a snapshot called {name} that belongs to a group, to mirroring or to the trash",
            hint="`rbd snap ls --all` shows it",
        )
    return made.version


def set_aside(context: Context, volume: str, name: str) -> VersionRef | None:
    """Turn live data of a replica into a snapshot. See :meth:`replicator.endpoint.Endpoint.set_aside`.

    The head stays as it is: with a snapshot it is nothing that is only there, and the next receive puts it back.
    """
    names.check_snapshot(name)
    with context.session(f"keeping {volume} aside") as session:
        try:
            with context.opened(session, volume) as (_, found):
                place, identity = context.naming.place(volume), found.image
        except NoSuchVolume:
            return None
        doing = "keeping its own data aside"
        with (
            writing(
                session, place.namespace, identity, context.label(volume), doing, context.lease, Cancellation()
            ) as held,
            context.opened(session, volume, read_only=False) as (image, catalog),
            session.image(place) as looking,
        ):
            kept = None
            if catalog.partial is None and head_changed(session, looking, catalog):
                refuse_users(session, image, catalog.label)
                kept = _take(session, place, image, catalog, catalog.free_name(name)).ref
            lineage = catalog.lineage
            if lineage is not None and lineage.role is not Role.REPLICA:
                held.check()
                demoted = Lineage(lineage.uuid, Role.REPLICA, lineage.epoch)
                with session.notes(place.namespace, identity) as notes:
                    notes.metadata_set(records.LINEAGE, records.encode_lineage(demoted, catalog.image))
            return kept


def refuse_users(session: Session, image: Image, label: str) -> None:
    """Nobody else may have the image open for writing, or have it locked. :raises VolumeBusy: names who has

    A lock that people or programs have set (``rbd lock add``) must be looked for: librbd, asked for its own beside it,
    waits until that is gone.
    """
    locks = image.list_lockers()
    if isinstance(locks, Mapping) and locks["tag"] != _OWN_LOCKS:
        holders = sorted(f"{client} at {address} ({cookie})" for client, cookie, address in locks["lockers"])
        raise VolumeBusy(
            f"{label} is locked by {', '.join(holders)}, so it is not written to",
            hint="`rbd lock ls` shows it; `rbd lock rm` removes one whose holder is gone",
        )
    others = sorted({str(w["addr"]) for w in image.watchers_list() if int(w["id"]) != session.client})
    if others:
        raise VolumeBusy(
            f"{label} is in use by the client at {', '.join(others)}, so it is not written to",
            hint="`rbd status` shows it; stop it (one that died is forgotten after 30 s), then run it again",
        )


def clone_snapshot(context: Context, volume: str, version: VersionRef, new: str) -> int:
    """Make a snapshot a new image that shares its data; its size. :raises VolumeBusy: there is an image of that name"""
    source, target = context.naming.place(volume), context.naming.place(new)
    with context.session(f"cloning {volume}@{version.name}") as session:
        with context.opened(session, volume) as (image, catalog):
            snapshot = catalog.require(version)
            if not snapshot.raw.user:
                raise Unsupported(
                    f"snapshot {version.name} of {catalog.label} was taken in a group, so RBD makes no clone of it",
                    hint="it is copied instead",
                )
            features = image.features() & _kept(session) | int(session.binding.rbd.RBD_FEATURE_LAYERING)
        make_namespace(session, target)
        with session.ioctx(source.namespace) as parent, session.ioctx(target.namespace) as child:
            try:
                session.pool.clone(parent, source.image, snapshot.raw.name, child, target.image, features=features)
            except session.binding.errors as error:
                if exists_already(error):
                    raise taken(context, new) from None
                raise
        return snapshot.raw.size


def _kept(session: Session) -> int:
    """The features that a clone takes over from its parent."""
    rbd = session.binding.rbd
    return int(
        rbd.RBD_FEATURE_LAYERING
        | rbd.RBD_FEATURE_EXCLUSIVE_LOCK
        | rbd.RBD_FEATURE_OBJECT_MAP
        | rbd.RBD_FEATURE_FAST_DIFF
        | rbd.RBD_FEATURE_DEEP_FLATTEN
    )


def taken(context: Context, volume: str) -> VolumeBusy:
    """The refusal of a name that something has."""
    return VolumeBusy(
        f"{context.label(volume)} exists already", hint="choose another name; nothing is ever written over an image"
    )
