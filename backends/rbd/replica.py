"""The target side: receiving a stream into the head of an image, and making a snapshot of it a version.

RBD has no place to write but the head. So what is being received is noted before the first write (``Partial``): from
then on the head is nobody's content. How a version becomes one, and what a cut in between leaves:

1. all writes are flushed. A cut: the partial state, to be continued.
2. a snapshot is taken under a hidden name. A cut: a snapshot without a record, which the next receive removes.
3. it is held, and protected. A cut: the same.
4. its record is written, in one step: now it is a version. A cut: it is listed; what is left is done by the next
   receive, which does not read its stream.
5. it gets its name, and a snapshot that it replaces gets another (``catalog.settle``).
6. the partial state goes.
"""

from __future__ import annotations

import uuid
from dataclasses import replace

from backends.rbd import records
from backends.rbd.binding import Image
from backends.rbd.catalog import (
    POSITION_STEP,
    Catalog,
    Snapshot,
    add_hold,
    create_snapshot,
    settle,
)
from backends.rbd.cluster import Session
from backends.rbd.context import Context
from backends.rbd.images import clone_image, create_image, exists, image_id
from backends.rbd.layout import Layout, follow, wanted
from backends.rbd.locks import writing
from backends.rbd.naming import HIDDEN, Place
from backends.rbd.parents import CloneOf, Parent, find_base, read_parent
from backends.rbd.receiving import apply_stream
from backends.rbd.records import Identity, Partial, Replaced, SnapshotRecord, Stage
from backends.rbd.snapshotting import refuse_users, taken
from backends.rbd.target import Target, discard_image, remove_leftover, writable
from backends.requests import check_receive
from replicator.cancellation import Cancellation
from replicator.endpoint import ReceiveMode, ReceiveRequest
from replicator.errors import (
    NoSuchSnapshot,
    NoSuchVolume,
    SnapshotExists,
    StaleResume,
    StorageUnavailable,
    UsageError,
    VolumeBusy,
)
from replicator.model import DIVERGED_PREFIX, Lineage, Role, StreamKind, Version, VolumeState, format_time
from replicator.roles import check_may_receive
from replicator.streams import Stream


def receive(
    context: Context, request: ReceiveRequest, stream: Stream, cancel: Cancellation
) -> tuple[Version, tuple[str, ...]]:
    """See :meth:`replicator.endpoint.Endpoint.receive`; also what of the source the replica is not like."""
    size = check_receive(request, stream, context.storage)
    place = context.naming.place(request.volume.name)
    with context.session(f"receiving {request.volume.name}@{request.to.name}") as session:
        if request.mode is ReceiveMode.RESTORE:
            return _Restore(context, session, request, size, place).run(stream, cancel), ()
        received = _Receive(context, session, request, size, place)
        version = received.run(stream, cancel)
        return version, received.told


def abort_receive(context: Context, volume: str) -> None:
    """Discard partial state: the head is put back to the newest version."""
    place = context.naming.place(volume)
    doing = "discarding partial state"
    with context.session(f"{doing} of {volume}") as session:
        for leftover in (place.restoring, place.arriving):
            if exists(session, leftover):
                remove_leftover(context, session, leftover, context.label(volume), doing)
        if not exists(session, place):
            return
        with context.opened(session, volume) as (_, found):
            if found.partial is None:
                return
        with writable(context, session, place, context.label(volume), doing, Cancellation()) as target:
            if target.catalog.partial is not None:
                target.put_back(target.catalog.partial)


class _Incoming:
    """What comes, and where it goes.

    :param place: of the volume
    """

    def __init__(self, context: Context, session: Session, request: ReceiveRequest, size: int, place: Place) -> None:
        self._context = context
        self._session = session
        self._request = request
        self._size = size
        self._place = place
        self._label = context.label(request.volume.name)
        what = "restoring" if request.mode is ReceiveMode.RESTORE else "receiving"
        self._doing = f"{what} {request.to.name}"


class _Receive(_Incoming):
    """One receive of a replica.

    :ivar told: what of the source the replica is not like, a sentence each
    """

    told: tuple[str, ...] = ()

    @property
    def _rebuilding(self) -> bool:
        return self._request.mode is ReceiveMode.REBUILD

    def run(self, stream: Stream, cancel: Cancellation) -> Version:
        request = self._request
        if request.lineage is None:
            raise UsageError(f"no lineage is given for the replica {request.volume}", hint="")
        origin = find_base(self._context, self._session, request) if request.origin is not None else None
        self._discard_first(request.lineage, cancel)
        made = not exists(self._session, self._place)
        if made:
            if request.base is not None and origin is None:
                raise NoSuchSnapshot(f"{self._label} is not there, and so not its {request.base.name}", hint="")
            self._make(request.lineage, origin)
        with writable(self._context, self._session, self._place, self._label, self._doing, cancel) as target:
            self._take_lineage(target, request.lineage)
            done = self._there_already(target)
            if done is not None:
                return done
            if origin is not None:
                self._check_clone(target, origin, made)
            own = request.base is not None and origin is None
            base = target.catalog.require(request.base) if request.base is not None and own else None
            self._check_name(target.catalog)
            version = self._receive(target, base, stream, cancel)
            self.told = self._follow(target)
            return version

    def _follow(self, target: Target) -> tuple[str, ...]:
        if not self._request.properties:
            return ()
        source = wanted(self._request.properties)
        if self._context.connection.where.data_pool is not None:
            source = replace(source, layout=replace(source.layout, data_pool=None))
        return follow(self._session, target.image, self._label, source)

    # -- what it is a clone of

    def _discard_first(self, sender: Lineage, cancel: Cancellation) -> None:
        """Remove what a first copy has left that this one does not continue, where either is one of a clone: what is a
        clone, and of what, is fixed when an image is made."""
        request = self._request
        if request.resume is not None or request.mode is not ReceiveMode.REPLICA:
            return
        try:
            with self._context.opened_at(self._session, self._place, self._label) as (image, found):
                first = found.is_replica and not found.snapshots and found.partial is not None
                if not first or (request.origin is None and not self._parent_of(image)):
                    return
                check_may_receive(request.volume, VolumeState(request.volume, None, (), found.lineage), sender)
        except NoSuchVolume:
            return
        discard_image(self._context, self._session, self._place, self._label, self._doing, cancel)

    def _parent_of(self, image: Image) -> Parent | None:
        return read_parent(self._session, self._place.namespace, image)

    def _check_clone(self, target: Target, origin: CloneOf, made: bool) -> None:
        """:raises NoSuchSnapshot: it has versions, so what it began as is settled"""
        if target.catalog.snapshots or (not made and self._request.resume is None):
            raise NoSuchSnapshot(
                f"{self._label} is there already, so it does not become a clone of {origin.place}", hint="plan again"
            )
        if self._parent_of(target.image) != origin.parent:
            raise _stale(self._label, self._request)

    # -- may it?

    def _make(self, sender: Lineage, origin: CloneOf | None) -> None:
        """A new image: it gets its name once it says that it is a replica, so it is never taken for anything else."""
        if self._request.resume is not None:
            raise _stale(self._label, self._request)
        place = self._place.arriving
        remove_leftover(self._context, self._session, place, self._label, self._doing)
        if origin is None:
            create_image(self._session, place, self._size, self._layout())
        else:
            clone_image(self._session, origin.place, origin.raw.name, place, self._layout())
        identity = image_id(self._session, place)
        if identity is None:
            raise VolumeBusy(f"{self._label} is being made by another replicator", hint="wait until it is done")
        lease = self._context.lease
        with writing(self._session, place.namespace, identity, self._label, self._doing, lease, Cancellation()) as held:
            with self._session.image(place, read_only=False) as image:
                refuse_users(self._session, image, self._label)
                lineage = Lineage(sender.uuid, Role.REPLICA, sender.epoch)
                held.check()
                image.metadata_set(records.PARTIAL, self._partial(None, Stage.REVERT).encode(identity))
                image.metadata_set(records.LINEAGE, records.encode_lineage(lineage, identity))
            with self._session.ioctx(place.namespace) as ioctx:
                self._session.pool.rename(ioctx, place.image, self._place.image)

    def _layout(self) -> Layout:
        """How a new image is laid out."""
        found = wanted(self._request.properties).layout
        pool = self._context.connection.where.data_pool
        if pool is None:
            return found
        if not self._session.rados.pool_exists(pool):
            raise StorageUnavailable(
                f"storage {self._context.storage} has its data in pool {pool}, which is not there",
                hint="make the pool, or correct data_pool of the storage",
            )
        return replace(found, data_pool=pool, only_there=True)

    def _partial(self, base: Snapshot | None, stage: Stage) -> Partial:
        request = self._request
        base_guid = base.version.guid if base is not None else None
        if request.origin is not None and request.base is not None:
            base_guid = request.base.guid
        return Partial(request.to.guid, request.to.name, base_guid, self._size, request.mode, stage)

    def _take_lineage(self, target: Target, sender: Lineage) -> None:
        """Check the rules and note the sender's lineage and epoch, durably, before any data."""
        catalog = target.catalog
        mine = catalog.lineage
        if not (mine is None and self._all_aside(target)):
            volume = self._request.volume
            check_may_receive(volume, VolumeState(volume, None, catalog.versions, mine), sender)
        wanted = Lineage(sender.uuid, Role.REPLICA, sender.epoch)
        if mine != wanted:
            target.still_ours()
            target.image.metadata_set(records.LINEAGE, records.encode_lineage(wanted, catalog.image))

    @staticmethod
    def _all_aside(target: Target) -> bool:
        """Whether there is nothing in the image but what was kept aside."""
        catalog = target.catalog
        newest = catalog.snapshots[-1] if catalog.snapshots else None
        return newest is not None and all(v.is_diverged for v in catalog.versions) and target.head_is(newest)

    def _there_already(self, target: Target) -> Version | None:
        """The version, if a confirmation was lost; nothing is read then."""
        found = target.catalog.find(self._request.to.ref)
        if found is None or self._rebuilding:
            return None
        if self._request.hold and self._request.hold not in found.version.holds:
            add_hold(self._session, target.image, target.image, found.raw, self._request.hold)
        partial = target.catalog.partial
        if partial is not None and partial.to_guid == self._request.to.guid:
            if found.raw == target.catalog.raw[-1]:
                target.forget_partial()
            else:
                target.put_back(partial)
        return target.read_again().require(self._request.to.ref).version

    def _check_name(self, catalog: Catalog) -> None:
        """Another version of that name is in the way, unless a rebuild is to replace it."""
        other = catalog.named(self._request.to.name)
        if other is None or other.version.guid == self._request.to.guid:
            return
        if not self._rebuilding or catalog.find(self._request.to.ref) is not None:
            raise SnapshotExists(
                f"{catalog.label} has another snapshot called {other.version.name} (guid {other.version.guid})",
                hint="rename or destroy it there, if it is not needed",
            )

    # -- the data

    def _receive(self, target: Target, base: Snapshot | None, stream: Stream, cancel: Cancellation) -> Version:
        partial = self._partial(base, Stage.WRITE)
        start = self._resumed_at(target, partial)
        is_clone = self._request.origin is not None
        if start is None and is_clone:
            target.begin_clone(partial)
        elif start is None:
            target.begin(partial, base)
        else:
            target.resize(self._size)  # a cut may have come before it

        def reached(offset: int) -> None:
            if not self._rebuilding and (not target.work.cancelled or cancel.cancelled):
                target.note(replace(partial, offset=offset))

        apply_stream(
            self._context,
            target,
            self._request,
            stream,
            start=start or 0,
            empty=base is None and start is None and not is_clone,
            reached=reached,
        )
        return self._complete(target)

    def _resumed_at(self, target: Target, partial: Partial) -> int | None:
        """The offset to continue from, None to begin anew."""
        resume, state = self._request.resume, target.catalog.partial
        if resume is None or self._rebuilding:
            return None
        base_guid = partial.base_guid
        fits = (
            state is not None
            and state.resume is not None
            and resume.kind is StreamKind.BLOCKS
            and (state.to_guid, state.base_guid) == (self._request.to.guid, base_guid)
            and state.size == self._size
            and (resume.to_guid, resume.base_guid) == (self._request.to.guid, base_guid)
            and resume.offset <= state.offset
        )
        if not fits:
            raise _stale(self._label, self._request)
        return resume.offset

    # -- the commit

    def _complete(self, target: Target) -> Version:
        """All is written and flushed: make it a version. See the head of this file."""
        to = self._request.to
        catalog = target.read_again()
        target.still_ours()
        raw = create_snapshot(target.image, catalog.image, f"{HIDDEN}{uuid.uuid4().hex}")
        same = catalog.find(to.ref)
        replaced = same or catalog.named(to.name)
        holds = {self._request.hold} - {""} | set(same.version.holds if same is not None else ())
        for tag in sorted(holds):
            add_hold(self._session, target.image, target.image, raw, tag)
        position = same.version.position if same is not None else raw.id * POSITION_STEP
        other = catalog.named(to.name)
        name = to.name if other is None or other is replaced else replaced.version.name if replaced else to.name
        record = SnapshotRecord(
            Identity(to.guid, name, to.created, position),
            None if replaced is None else self._aside(catalog, replaced, other=same is None),
        )
        target.still_ours()
        target.image.metadata_set(records.snapshot_key(raw.id), record.encode(raw.taken))
        found = target.read_again().require(to.ref)
        settle(self._session, target.image, target.catalog, found)
        if target.read_again().snapshots[-1].version.guid == to.guid:
            target.forget_partial()
        else:  # a rebuilt one that is not the newest
            target.put_back(self._partial(None, Stage.REVERT))
        return target.read_again().require(to.ref).version

    def _aside(self, catalog: Catalog, replaced: Snapshot, *, other: bool) -> Replaced:
        """What becomes of a snapshot that is replaced: kept just before the new one, with an identity of its own."""
        name = catalog.free_name(self._request.aside or DIVERGED_PREFIX + format_time(self._context.clock()))
        version = replaced.version
        if other:
            return Replaced(replaced.raw.id, version.guid, name, version.position)
        return Replaced(replaced.raw.id, uuid.uuid4().hex, name, catalog.position_before(version.position))


class _Restore(_Incoming):
    """One restore: an image that gets its name once it is complete."""

    def run(self, stream: Stream, cancel: Cancellation) -> Version:
        if exists(self._session, self._place):
            raise taken(self._context, self._request.volume.name)
        if self._request.resume is not None:
            raise _stale(self._label, self._request)
        place = self._place.restoring
        if exists(self._session, place):
            remove_leftover(self._context, self._session, place, self._label, self._doing)
        create_image(self._session, place, self._size)
        with writable(self._context, self._session, place, self._label, self._doing, cancel) as target:
            apply_stream(self._context, target, self._request, stream, start=0, empty=True, reached=_nothing)
        self._publish(place)
        return replace(self._request.to, holds=())

    def _publish(self, place: Place) -> None:
        with self._session.ioctx(place.namespace) as ioctx:
            try:
                self._session.pool.rename(ioctx, place.image, self._place.image)
            except self._session.binding.errors:
                if exists(self._session, self._place):
                    raise taken(self._context, self._request.volume.name) from None
                raise


def _nothing(_offset: int) -> None:
    """An interrupted restore is begun anew."""


def _stale(label: str, request: ReceiveRequest) -> StaleResume:
    name = request.resume.to_name if request.resume is not None else request.to.name
    return StaleResume(
        f"the half-received {name} of {label} is not what the stream continues",
        hint="the next run discards it and starts anew",
    )
