"""Snapshots of many images at one instant, through an RBD group.

Only librbd's group snapshot keeps all writers of all images waiting at once, and without an error for them (exclusive
locks that we took ourselves would fail their writes). But of what it makes, librbd 16.2 tells no differences, makes no
clones and shows no name of ours. So of each image another snapshot is taken just before:

1. the images join a group, which is there only as long as this takes;
2. each gets a snapshot with a name, hidden (``BEFORE``);
3. the group is snapshotted: that is the instant;
4. of an image that nobody wrote to between 2 and 3, the first is of that instant as well: it gets the version's name,
   and the group's goes. Of another image, the group's is the version (its record says so), and the first is what
   differences are told from (``changes.py``);
5. the group forgets the snapshot, so that it is the image's alone, and the images leave it (``grouping.py``).

A client that hangs with an image's lock has it taken away after half a minute, as by any snapshot of that image; the
writers of the other images do not wait for that.

Who is cut off leaves a group with members in it: the next one finds it, and removes all that is not a version.
An image that is in a group of somebody else can be in no other: then that group is snapshotted, and what its other
images got by that is removed at once. Images without exclusive lock cannot be kept waiting, and images of different
namespaces cannot be in one group: what is not of one instant with the rest is told.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from backends.rbd import records
from backends.rbd.catalog import (
    POSITION_STEP,
    Catalog,
    RawSnapshot,
    derived_guid,
    forget_removed,
    read_catalog,
    taken_as,
)
from backends.rbd.changes import find_changes
from backends.rbd.cluster import Session
from backends.rbd.context import Context
from backends.rbd.failures import LOST, number
from backends.rbd.grouping import GROUP, Grouping
from backends.rbd.locks import Held, writing
from backends.rbd.naming import BEFORE, HIDDEN, Place
from backends.rbd.records import Identity, SnapshotRecord
from backends.rbd.snapshotting import refuse_replica, take_snapshot
from replicator import logs
from replicator.cancellation import Cancellation
from replicator.endpoint import Taken
from replicator.errors import NoSuchSnapshot, ReplicatorError, VolumeBusy
from replicator.model import Version, VolumeId

_LOCK = "group"
_WAIT = 120.0
"""Seconds to wait for another one who takes snapshots together."""
_PAUSE = 0.2
_log = logging.getLogger(__name__)

Part = tuple[Context, Sequence[str]]
"""A storage, and volumes of it."""


@dataclass(frozen=True, slots=True)
class _Member:
    """A volume that is to be snapshotted.

    :ivar pool: the number of its pool
    :ivar group: the group that it is in, by its pool's number and its name
    :ivar fenced: its writers can be kept waiting
    """

    context: Context
    volume: str
    pool: int
    group: tuple[int, str] | None
    fenced: bool

    @property
    def place(self) -> Place:
        """Its image."""
        return self.context.naming.place(self.volume)

    @property
    def id(self) -> VolumeId:
        """As it is called outside."""
        return VolumeId(self.context.storage, self.volume)

    @property
    def label(self) -> str:
        """For messages."""
        return self.context.label(self.volume)

    @property
    def is_left_over(self) -> bool:
        """Whether it is in a group of ours: somebody who was cut off left it there, or is at work there just now."""
        return self.group is not None and self.group[1] == GROUP


def take_each(parts: Sequence[Part], name: str, tell: Callable[[tuple[str, ...]], None]) -> tuple[Taken, ...]:
    """See :meth:`backends.base.Backend.snapshot_each`.

    :param parts: storages of one cluster, as one user
    :param tell: is told what is not of one instant with the others, and why
    """
    wanted = [VolumeId(context.storage, volume) for context, volumes in parts for volume in volumes]
    with parts[0][0].session(f"taking snapshot {name} of {len(wanted)} images together") as session:
        taking = _Taking(parts[0][0], session, name)
        for context, volumes in parts:
            with context.session(f"looking at {len(volumes)} images") as own:
                for volume in volumes:
                    taking.look(context, own, volume)
        taking.run()
    tell(tuple(taking.apart))
    gone = NoSuchSnapshot(f"snapshot {name} was destroyed as soon as it was taken", hint="run it again")
    return tuple(taking.taken.get(volume, Taken(volume, None, gone)) for volume in wanted)


class _Taking:
    """One request.

    :ivar taken: what came of each volume
    :ivar apart: what is not of one instant with the rest
    """

    def __init__(self, context: Context, session: Session, name: str) -> None:
        self.taken: dict[VolumeId, Taken] = {}
        self.apart: list[str] = []
        self._context = context
        self._session = session
        self._name = name
        self._members: list[_Member] = []

    def look(self, context: Context, session: Session, volume: str) -> None:
        """Find out what is to be done for a volume."""
        identity = VolumeId(context.storage, volume)
        try:
            with context.opened(session, volume) as (image, catalog):
                existing = catalog.named(self._name)
                if existing is not None:
                    self.taken[identity] = Taken(identity, existing.version)
                    return
                refuse_replica(catalog)
                found = image.group()
                group = (int(found["pool"]), str(found["name"])) if found["name"] else None
                fenced = bool(image.features() & session.binding.rbd.RBD_FEATURE_EXCLUSIVE_LOCK)
        except ReplicatorError as error:
            self.taken[identity] = Taken(identity, None, error)
        else:
            self._members.append(_Member(context, volume, session.pool_id, group, fenced))

    def run(self) -> None:
        """Take them."""
        for pool, namespace in sorted({(m.group[0], m.place.namespace) for m in self._left_over() if m.group}):
            with self._locked(pool, namespace), Grouping.of(self._session, pool, namespace, GROUP) as grouping:
                grouping.clean()
        self._members = [replace(m, group=None) if m.is_left_over else m for m in self._members]
        sets: dict[tuple[str, tuple[int, str] | None], list[_Member]] = {}
        alone = [member for member in self._members if not member.fenced]
        if len(self._members) > 1:
            for member in alone:
                self._tell(member.label, "its image has no exclusive lock, so its writers cannot be kept waiting")
        for member in self._members:
            if member.fenced:
                sets.setdefault((member.place.namespace, member.group), []).append(member)
        largest = max(sets.values(), key=len, default=[])
        for (namespace, group), members in sets.items():
            if members is not largest:
                why = (
                    f"it is in the group {group[1]}" if group else f"it is in the namespace {namespace or '(default)'}"
                )
                for member in members:
                    self._tell(member.label, why)
            if len(members) == 1 or not self._together(namespace, group, members):
                alone += members
        for member in alone:
            self._note(member, self._one)

    def _left_over(self) -> list[_Member]:
        return [member for member in self._members if member.is_left_over]

    def _tell(self, label: str, why: str) -> None:
        self.apart.append(f"the snapshots of {label} are not of one instant with those of the others: {why}")

    def _note(self, member: _Member, take: Callable[[_Member], Version]) -> None:
        try:
            version = take(member)
        except ReplicatorError as error:
            self.taken[member.id] = Taken(member.id, None, error)
        else:
            self.taken[member.id] = Taken(member.id, version)

    def _one(self, member: _Member) -> Version:
        return take_snapshot(member.context, member.volume, self._name)

    def _together(self, namespace: str, group: tuple[int, str] | None, members: list[_Member]) -> bool:
        """Whether they have their snapshots, or errors of their own, now."""
        pool, name = group or (self._session.pool_id, GROUP)
        try:
            with self._locked(pool, namespace) as held, Grouping.of(self._session, pool, namespace, name) as grouping:
                self._instant(grouping, members, held)
        except self._session.binding.errors as error:
            if number(error) in LOST:
                raise
            labels = ", ".join(sorted(member.label for member in members))
            logs.event(_log, "warning", "snapshots are taken one after the other", volumes=labels, reason=str(error))
            self.apart.append(f"the snapshots of {labels} were taken one after the other, not of one instant: {error}")
            return False
        return True

    @contextmanager
    def _locked(self, pool: int, namespace: str) -> Iterator[Held]:
        """Be the only one who does this in that place. Somebody else needs a second for it: he is waited for.

        :raises VolumeBusy: for too long
        """
        label, doing = f"the group of {self._context.storage}", f"taking snapshot {self._name}"
        lease, cancel = self._context.lease, Cancellation()
        end = time.monotonic() + _WAIT
        with ExitStack() as opened:
            while True:
                try:
                    lock = writing(self._session, namespace, _LOCK, label, doing, lease, cancel, pool=pool)
                    held = opened.enter_context(lock)
                    break
                except VolumeBusy:
                    if time.monotonic() >= end:
                        raise
                    time.sleep(_PAUSE)  # RADOS tells nobody that a lock is free
            yield held

    def _instant(self, grouping: Grouping, members: list[_Member], held: Held) -> None:
        grouping.clean()
        before, label = f"{BEFORE}{uuid.uuid4().hex}", f"{HIDDEN}{uuid.uuid4().hex}"
        try:
            grouping.join((member.place.image, member.pool) for member in members)
            for member in members:
                with self._session.image(member.place, read_only=False, pool=member.pool) as image:
                    image.create_snap(before)
            held.check()
            grouping.group.create_snap(label)
            for member in members:
                held.check()
                self._note(member, lambda each: self._commit(grouping, each, before, label))
        finally:
            try:
                with self._session.errors(f"leaving the group of {self._name}"):
                    held.check()
                    grouping.clean()
            except ReplicatorError as error:
                logs.event(_log, "warning", "a group is left for the next run to remove", error=error)

    # -- each image's own

    def _commit(self, grouping: Grouping, member: _Member, before: str, label: str) -> Version:
        """Make what an image has of the instant a version."""
        with (
            member.context.session(f"taking snapshot {self._name} of {member.volume}") as session,
            session.image(member.place, read_only=False) as image,
        ):
            catalog = read_catalog(session, image, member.label)
            parts = grouping.parts(image)
            part = next((raw for raw in catalog.raw if parts.get(raw.id) == label), None)
            first = taken_as(image, catalog.image, before)
            if part is None or first is None:
                raise self._gone(member)
            if _same(session, member.place, catalog, first, part):
                image.rename_snap(before, self._name)
                image.remove_snap_by_id(part.id)
            else:
                guid = derived_guid(session, part.taken)
                identity = Identity(guid, self._name, part.taken.time, part.id * POSITION_STEP)
                with session.notes(member.place.namespace, catalog.image) as notes:
                    notes.metadata_set(records.snapshot_key(part.id), SnapshotRecord(identity).encode(part.taken))
            found = read_catalog(session, image, member.label)
            with session.notes(member.place.namespace, found.image) as notes:
                forget_removed(notes, found)  # by hand, with what we had noted of them
            made = found.named(self._name)
            if made is None:
                raise self._gone(member)
            return made.version

    def _gone(self, member: _Member) -> NoSuchSnapshot:
        return NoSuchSnapshot(f"{member.label}@{self._name} was removed while it was being made", hint="run it again")


def _same(session: Session, place: Place, catalog: Catalog, first: RawSnapshot, part: RawSnapshot) -> bool:
    """Whether nobody wrote in between. Where no object map tells at once, nobody is asked."""
    if first.size != part.size:
        return False
    with session.image(place) as looking:
        diff = find_changes(session, looking, catalog.raw, first, part)
        return diff.trusted >= diff.size and next(diff.extents(), None) is None
