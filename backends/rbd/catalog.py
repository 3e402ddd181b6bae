"""What is known of an image: its snapshots as versions, its lineage, what is being received; and changing that."""

from __future__ import annotations

import errno
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from backends.fields import BadRecord
from backends.rbd import records
from backends.rbd.binding import Image
from backends.rbd.cluster import Session
from backends.rbd.failures import number
from backends.rbd.header import Notes
from backends.rbd.naming import BEFORE, HIDDEN
from backends.rbd.records import HeadRecord, Identity, Partial, Replaced, SnapshotRecord, Taken
from replicator import names
from replicator.errors import DamagedData, InvalidName, NoSuchSnapshot, SnapshotHeld
from replicator.model import Lineage, Role, Version, VersionRef

POSITION_STEP = 1024
"""Between the positions of two snapshots, so that one kept aside fits in between."""
_NAMESPACE = uuid.UUID("2b1f2a0e-8f0b-5f0e-9c3c-6f9a1d2c7b41")
# RBD_SNAP_NAMESPACE_TYPE_… (rbd/librbd.h); others are of trash and mirroring.
_USER_NAMESPACE, _GROUP_NAMESPACE = 0, 1
MAX_SNAPSHOTS = 100_000


@dataclass(frozen=True, slots=True)
class RawSnapshot:
    """A snapshot as RBD has it.

    :ivar user: it is one that people (or we) made, and no part of a group, of the trash or of mirroring: only these
        have names that RBD's functions take
    :ivar grouped: it was taken as part of a group
    """

    taken: Taken
    name: str
    size: int
    user: bool
    grouped: bool = False

    @property
    def id(self) -> int:
        """RBD's number; later ones are greater."""
        return self.taken.snapshot


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot that is a version.

    :ivar record: its record, None where it was taken here and is called as RBD calls it
    """

    raw: RawSnapshot
    version: Version
    record: SnapshotRecord | None


@dataclass(frozen=True, slots=True)
class Catalog:
    """An image as it was when it was read.

    :ivar raw: all its snapshots, oldest first
    :ivar snapshots: those that are versions, by position
    :ivar warnings: what was left out, and why
    """

    label: str
    image: str
    size: int
    raw: tuple[RawSnapshot, ...]
    snapshots: tuple[Snapshot, ...]
    metadata: dict[str, str]
    lineage: Lineage | None
    partial: Partial | None
    head: HeadRecord | None
    warnings: tuple[str, ...]

    @property
    def versions(self) -> tuple[Version, ...]:
        """The versions, oldest first."""
        return tuple(snapshot.version for snapshot in self.snapshots)

    def find(self, version: VersionRef) -> Snapshot | None:
        """The snapshot of that identity."""
        return next((s for s in self.snapshots if s.version.guid == version.guid), None)

    def named(self, name: str) -> Snapshot | None:
        """The snapshot of that name."""
        return next((s for s in self.snapshots if s.version.name == name), None)

    def require(self, version: VersionRef) -> Snapshot:
        """The snapshot of that identity. :raises NoSuchSnapshot:"""
        found = self.find(version)
        if found is None:
            raise NoSuchSnapshot(
                f"{self.label} has no snapshot {version.name} (guid {version.guid})",
                hint=f"`replicator snapshots {self.label}` lists what there is",
            )
        return found

    @property
    def is_replica(self) -> bool:
        """Whether its head is ours."""
        return self.lineage is not None and self.lineage.role is Role.REPLICA

    @property
    def head_is(self) -> str | None:
        """The guid of the version that the head was when the newest snapshot was taken; "" for no content."""
        if not self.raw:
            return None
        newest = self.raw[-1]
        if self.head is not None and self.head.taken == newest.taken:
            return self.head.guid
        return next((s.version.guid for s in self.snapshots if s.raw == newest), None)

    def is_protected_by_us(self, snapshot: RawSnapshot) -> bool:
        """Whether its protection is ours to take away."""
        try:
            records.load_mark(self.metadata.get(records.protected_key(snapshot.id), ""), snapshot.taken)
        except BadRecord:
            return False
        return True

    def free_name(self, name: str) -> str:
        """``name``, or with a number behind it where that is taken."""
        taken = {raw.name for raw in self.raw} | {version.name for version in self.versions}
        candidates = (name if number == 1 else f"{name}-{number}" for number in range(1, 1 << 20))
        return names.check_snapshot(next(candidate for candidate in candidates if candidate not in taken))

    def position_before(self, position: int) -> int:
        """The position just before one, that nothing has."""
        taken = {version.position for version in self.versions}
        return next((p for p in range(position - 1, 0, -1) if p not in taken), 0)


# -- reading


def read_raw(image: Image, identity: str) -> Iterator[RawSnapshot]:
    """The snapshots of an open image, as RBD has them."""
    for number_read, found in enumerate(image.list_snaps()):
        if number_read == MAX_SNAPSHOTS:
            return
        snapshot = int(found["id"])
        moment = image.get_snap_timestamp(snapshot).replace(microsecond=0, tzinfo=UTC)
        yield RawSnapshot(
            Taken(identity, snapshot, moment),
            str(found["name"]),
            int(found["size"]),
            found["namespace"] == _USER_NAMESPACE,
            found["namespace"] == _GROUP_NAMESPACE,
        )


def read_metadata(image: Image) -> dict[str, str]:
    """What we keep with an open image."""
    return {key: value for key, value in image.metadata_list() if key.startswith(records.PREFIX)}


def read_catalog(session: Session, image: Image, label: str) -> Catalog:
    """What is known of an open image.

    :raises DamagedData: its lineage cannot be read. Never taken for "none": that would let a promoted copy be
        overwritten
    """
    identity = image.id()
    raw = tuple(sorted(read_raw(image, identity), key=lambda found: found.id))
    metadata = read_metadata(image)
    warnings: list[str] = []
    snapshots = _versions(session, raw, metadata, label, warnings)
    return Catalog(
        label,
        identity,
        image.size(),
        raw,
        snapshots,
        metadata,
        _lineage(metadata, identity, label),
        _partial(metadata, identity),
        _head(metadata, identity),
        tuple(warnings),
    )


def _lineage(metadata: dict[str, str], image: str, label: str) -> Lineage | None:
    text = metadata.get(records.LINEAGE)
    try:
        return None if text is None else records.load_lineage(text, image)
    except BadRecord as error:
        raise DamagedData(
            f"the record of the role and epoch of {label} cannot be read: {error}",
            hint=f"`rbd image-meta get IMAGE {records.LINEAGE}` shows it; `replicator resync` writes it anew",
        ) from None


def _partial(metadata: dict[str, str], image: str) -> Partial | None:
    try:
        return Partial.load(metadata.get(records.PARTIAL, ""), image)
    except BadRecord:
        return None


def _head(metadata: dict[str, str], image: str) -> HeadRecord | None:
    try:
        return HeadRecord.load(metadata.get(records.HEAD, ""), image)
    except BadRecord:
        return None


def derived_guid(session: Session, taken: Taken) -> str:
    """The identity of a snapshot that was taken here: nothing that has to be kept, and no other snapshot has it."""
    what = f"{session.fsid}/{session.pool_id}/{taken.image}/{taken.snapshot}/{taken.time.isoformat()}"
    return uuid.uuid5(_NAMESPACE, what).hex


def record_of(raw: RawSnapshot, metadata: dict[str, str]) -> SnapshotRecord | None:
    """What is kept of a snapshot; None where nothing is, or that is not of it."""
    try:
        return SnapshotRecord.load(metadata.get(records.snapshot_key(raw.id), ""), raw.taken)
    except BadRecord:
        return None


def _versions(
    session: Session, raw: tuple[RawSnapshot, ...], metadata: dict[str, str], label: str, warnings: list[str]
) -> tuple[Snapshot, ...]:
    found: dict[int, Snapshot] = {}
    for snapshot in raw:
        if not (snapshot.user or snapshot.grouped):
            continue
        record = record_of(snapshot, metadata)
        hidden = snapshot.grouped or snapshot.name.startswith(HIDDEN)
        if hidden and record is None:
            continue  # of ours and not complete, or of a group of somebody else
        try:
            own = names.check_snapshot(snapshot.name if record is None or not hidden else record.identity.name)
        except InvalidName as error:
            warnings.append(f"{label}: snapshot {snapshot.name!a} is left out: {error}")
            continue
        identity = (
            Identity(derived_guid(session, snapshot.taken), own, snapshot.taken.time, snapshot.id * POSITION_STEP)
            if record is None
            else replace(record.identity, name=own)
        )
        holds = records.holds_in(metadata, snapshot.taken)
        found[snapshot.id] = Snapshot(snapshot, _version(identity, snapshot.size, holds), record)
    for version in list(found.values()):
        replaced = version.record.replaces if version.record is not None else None
        if replaced is not None and replaced.snapshot in found:
            # As if all that follows from the record had been done already; `settle` does it.
            old = found[replaced.snapshot]
            found[replaced.snapshot] = replace(old, version=as_replaced(old.version, replaced))
    return tuple(sorted(found.values(), key=lambda s: (s.version.position, s.raw.id)))


def _version(identity: Identity, size: int, holds: tuple[str, ...]) -> Version:
    return Version(identity.name, identity.guid, identity.created, identity.position, size=size, holds=holds)


def as_replaced(old: Version, replaced: Replaced) -> Version:
    """A version that another has taken the place of."""
    return replace(old, name=replaced.name, guid=replaced.guid, position=replaced.position, holds=())


# -- changing


def taken_as(image: Image, identity: str, name: str) -> RawSnapshot | None:
    """The snapshot that RBD has under a name."""
    return next((raw for raw in read_raw(image, identity) if raw.user and raw.name == name), None)


def create_snapshot(image: Image, identity: str, name: str) -> RawSnapshot:
    """Take one. :raises NoSuchSnapshot: it was removed at once"""
    image.create_snap(name)
    made = taken_as(image, identity, name)
    if made is None:
        raise NoSuchSnapshot(f"snapshot {name} was removed while it was being made", hint="run it again")
    return made


def add_hold(session: Session, image: Image, notes: Notes, snapshot: RawSnapshot, tag: str) -> None:
    """Hold a snapshot, and have RBD refuse to remove it where the image can (layering)."""
    notes.metadata_set(records.hold_key(snapshot.id, tag), records.encode_mark(snapshot.taken))
    if not snapshot.user:  # of a group: nothing that takes names can remove it
        return
    if image.features() & session.binding.rbd.RBD_FEATURE_LAYERING and not image.is_protected_snap(snapshot.name):
        # The note comes first: without it, what we protected would stay protected for ever.
        notes.metadata_set(records.protected_key(snapshot.id), records.encode_mark(snapshot.taken))
        image.protect_snap(snapshot.name)


def remove_key(notes: Notes, key: str) -> None:
    """Remove a record, which may be gone."""
    with suppress(KeyError):  # what the binding makes of ENOENT
        notes.metadata_remove(key)


def remove_hold(session: Session, image: Image, notes: Notes, catalog: Catalog, snapshot: Snapshot, tag: str) -> None:
    """Take a hold back; with the last one goes our protection."""
    if tag not in snapshot.version.holds:
        return
    remove_key(notes, records.hold_key(snapshot.raw.id, tag))
    if snapshot.version.holds == (tag,):
        unprotect(session, image, notes, catalog, snapshot.raw)


def unprotect(session: Session, image: Image, notes: Notes, catalog: Catalog, snapshot: RawSnapshot) -> None:
    """Take our protection away. What clones of the old format need it stays until they are gone."""
    if not catalog.is_protected_by_us(snapshot):
        return
    try:
        if image.is_protected_snap(snapshot.name):
            image.unprotect_snap(snapshot.name)
    except session.binding.errors as error:
        if number(error) == errno.EBUSY:
            return
        raise
    remove_key(notes, records.protected_key(snapshot.id))


def destroy(session: Session, image: Image, notes: Notes, catalog: Catalog, snapshot: Snapshot) -> None:
    """Remove a snapshot and its records. :raises SnapshotHeld: by us, or by somebody else's protection"""
    label = f"snapshot {snapshot.version.name} of {catalog.label}"
    if snapshot.version.holds:
        raise SnapshotHeld(
            f"{label} is held by {', '.join(snapshot.version.holds)}",
            hint="the job that holds it releases it once its target has a newer one",
        )
    unprotect(session, image, notes, catalog, snapshot.raw)
    try:
        if snapshot.raw.grouped:
            image.remove_snap_by_id(snapshot.raw.id)
        else:
            image.remove_snap(snapshot.raw.name)
    except session.binding.errors as error:
        if number(error) == errno.EBUSY:
            raise SnapshotHeld(
                f"{label} is protected, or has clones",
                hint="`rbd children` lists clones; `rbd snap unprotect` takes a protection away that nobody needs",
            ) from None
        if number(error) != errno.ENOENT:
            raise
    forget(notes, catalog, snapshot.raw.id)
    if snapshot.raw.grouped:
        left = [raw for raw in catalog.raw if raw != snapshot.raw]
        # Newer ones may be about to be needed: they are made first.
        remove_named(session, image, [raw for raw in needless(left) if raw.id < snapshot.raw.id])


def remove_named(session: Session, image: Image, snapshots: Iterable[RawSnapshot]) -> None:
    """Remove snapshots by their names; some may be gone."""
    for raw in snapshots:
        try:
            image.remove_snap(raw.name)
        except session.binding.errors as error:
            if number(error) != errno.ENOENT:
                raise


def anchor_of(snapshots: Iterable[RawSnapshot], grouped: RawSnapshot) -> RawSnapshot | None:
    """The newest snapshot before one of a group that RBD can tell differences from; None: there is none."""
    named = [raw for raw in snapshots if raw.user and raw.id < grouped.id]
    return max(named, key=lambda raw: raw.id, default=None)


def told_from(snapshots: Iterable[RawSnapshot], base: RawSnapshot) -> tuple[RawSnapshot, ...]:
    """What must be there for differences from a snapshot to be told: it, and the anchor of one of a group."""
    anchor = anchor_of(snapshots, base) if base.grouped else None
    return (base,) if anchor is None else (anchor, base)


def needless(snapshots: Sequence[RawSnapshot]) -> list[RawSnapshot]:
    """Those of ours that were taken before one of a group, and no such one needs (any more)."""
    anchors = {anchor_of(snapshots, raw) for raw in snapshots if raw.grouped}
    return [raw for raw in snapshots if raw.user and raw.name.startswith(BEFORE) and raw not in anchors]


def forget(notes: Notes, catalog: Catalog, snapshot: int) -> None:
    """Remove the records of a snapshot that is gone."""
    for key in catalog.metadata:
        if records.snapshot_of(key) == snapshot:
            remove_key(notes, key)


# -- putting in order what was interrupted; only under the volume's lock


def tidy(session: Session, image: Image, catalog: Catalog) -> None:
    """Finish what is complete, remove what is not, and records of what is gone."""
    versions = {snapshot.raw.id: snapshot for snapshot in catalog.snapshots}
    needed = {raw for raw in catalog.raw if raw.name.startswith(BEFORE)}.difference(needless(catalog.raw))
    for raw in catalog.raw:
        version = versions.get(raw.id)
        if version is not None and version.record is not None:
            settle(session, image, catalog, version)
        elif raw.user and raw.name.startswith(HIDDEN) and not _is_marker(catalog, raw) and raw not in needed:
            unprotect(session, image, image, catalog, raw)  # it was held already
            image.remove_snap(raw.name)
            forget(image, catalog, raw.id)
    forget_removed(image, catalog)


def forget_removed(notes: Notes, catalog: Catalog) -> None:
    """Remove the records of snapshots that somebody else has removed."""
    # Records of newer ones than were listed may belong to a snapshot that was made since.
    newest = catalog.raw[-1].id if catalog.raw else 0
    known = {raw.id for raw in catalog.raw}
    for key in catalog.metadata:
        snapshot = records.snapshot_of(key)
        if snapshot is not None and snapshot <= newest and snapshot not in known:
            remove_key(notes, key)


def _is_marker(catalog: Catalog, raw: RawSnapshot) -> bool:
    return catalog.head is not None and catalog.head.taken == raw.taken


def settle(session: Session, image: Image, catalog: Catalog, snapshot: Snapshot) -> None:
    """Do what follows from a version's record: give RBD's snapshots their names, and a replaced one its own record.

    The record says it all, and the listing has shown it since it was written; each step may be done again. The name
    of the replaced one is free before the other gets it; the record that says so goes last.
    """
    record = snapshot.record
    if record is None:
        return
    replaced = record.replaces
    old = next((s for s in catalog.snapshots if replaced is not None and s.raw.id == replaced.snapshot), None)
    if replaced is not None and old is not None:
        identity = Identity(replaced.guid, replaced.name, old.version.created, replaced.position)
        if old.raw.user and (old.raw.name == record.identity.name or old.raw.name.startswith(HIDDEN)):
            image.rename_snap(old.raw.name, replaced.name)
        renamed = replace(old.raw, name=replaced.name)
        image.metadata_set(records.snapshot_key(old.raw.id), SnapshotRecord(identity).encode(old.raw.taken))
        for tag in records.holds_in(catalog.metadata, old.raw.taken):
            remove_key(image, records.hold_key(old.raw.id, tag))
        unprotect(session, image, image, catalog, renamed)
    if snapshot.raw.name.startswith(HIDDEN):
        image.rename_snap(snapshot.raw.name, record.identity.name)
    if replaced is not None:
        image.metadata_set(records.snapshot_key(snapshot.raw.id), record.settled.encode(snapshot.raw.taken))


def mark_head(image: Image, catalog: Catalog, guid: str) -> None:
    """Note that the head, which was just put back, is the content of that version; see :class:`HeadRecord`."""
    raw = create_snapshot(image, catalog.image, f"{HIDDEN}head-{uuid.uuid4().hex}")
    image.metadata_set(records.HEAD, HeadRecord(raw.taken, guid).encode())


def unmark_head(image: Image, catalog: Catalog) -> None:
    """Remove that note, as the head is going to be something else."""
    if catalog.head is None:
        return
    raw = next((found for found in catalog.raw if found.taken == catalog.head.taken), None)
    remove_key(image, records.HEAD)
    if raw is not None and raw.name.startswith(HIDDEN):
        image.remove_snap(raw.name)


def now_utc() -> datetime:
    """The time, with a time zone."""
    return datetime.now(UTC)
