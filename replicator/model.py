"""The nouns of the engine, as frozen values.

Nothing here knows a storage or a socket. All times are timezone-aware UTC, all sizes are bytes. The same values cross
the wire between nodes as JSON (see ``transport/messages.py``), so their fields are part of the protocol.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Flag, StrEnum, auto
from typing import Literal

from replicator import names
from replicator.errors import InvalidName, UsageError

SNAPSHOT_PREFIX = "replicator"
"""Snapshots of ours are ``replicator_<job>_<UTC time>``; only those are ours to destroy."""
DIVERGED_PREFIX = "diverged-"
"""Data that only a replica had is kept under ``diverged-<UTC time>``; never destroyed by a policy."""

_TIME_FORMAT = "%Y%m%dT%H%M%S"
_OURS = re.compile(rf"{SNAPSHOT_PREFIX}_(?P<job>[A-Za-z0-9][A-Za-z0-9._-]{{0,62}})_(?P<time>\d{{8}}T\d{{6}}\.\d{{3}}Z)")


@dataclass(frozen=True, slots=True, order=True)
class VolumeId:
    """A volume on one node: ``STORAGE:NAME``."""

    storage: str
    name: str

    def __str__(self) -> str:
        return f"{self.storage}:{self.name}"

    @classmethod
    def parse(cls, text: str) -> VolumeId:
        """``STORAGE:NAME`` -> VolumeId.

        :raises UsageError: no colon
        :raises InvalidName: a part that may not be used
        """
        storage, colon, name = text.partition(":")
        if not colon:
            raise UsageError(
                f"volume {text!r} has no storage", hint="write it as STORAGE:NAME, for example tank:vm-100"
            )
        return cls(names.check_word("storage name", storage), names.check_volume(name))


def replica_volume(source_node: str, volume: VolumeId, storage: str, *, same_path: bool = False) -> VolumeId:
    """Where a replica of ``volume`` of ``source_node`` lives in a target's ``storage``: under ``<source node>/``.

    :param same_path: under its own name instead
    """
    return VolumeId(storage, volume.name if same_path else f"{source_node}/{volume.name}")


class VersionKind(StrEnum):
    """What a version is: data (snapshot) or only its identity, usable as a base for sending (bookmark)."""

    SNAPSHOT = "snapshot"
    BOOKMARK = "bookmark"


@dataclass(frozen=True, slots=True)
class VersionRef:
    """Names one version of a volume in a request. ``guid`` is its identity, ``name`` where it was last seen."""

    name: str
    guid: str
    kind: VersionKind = VersionKind.SNAPSHOT


@dataclass(frozen=True, slots=True)
class Version:
    """A snapshot or a bookmark of a volume.

    :ivar name: without the volume
    :ivar guid: identity; the same on every node that has this version, whatever it is called there
    :ivar created: when the data was frozen (on the node that made it)
    :ivar position: the storage's own order (ZFS createtxg, a counter); comparable within one volume on one node only
    :ivar size: logical size of the volume in bytes, None where the storage has no such thing
    :ivar holds: tags that protect it from being destroyed
    """

    name: str
    guid: str
    created: datetime
    position: int
    kind: VersionKind = VersionKind.SNAPSHOT
    size: int | None = None
    holds: tuple[str, ...] = ()

    @property
    def ref(self) -> VersionRef:
        """This version as a request names it."""
        return VersionRef(self.name, self.guid, self.kind)

    @property
    def job(self) -> str | None:
        """The job that made it, from its name; None for a foreign version."""
        return job_of(self.name)

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags that protect it: its holds; of a cursor, the tag of the hold that it goes with."""
        tag, _, guid = self.name.rpartition(":")
        is_cursor = self.kind is VersionKind.BOOKMARK and guid == self.guid and has_cursor(tag)
        return (*self.holds, tag) if is_cursor else self.holds

    @property
    def is_diverged(self) -> bool:
        """Whether this is data that a resync kept aside."""
        return self.name.startswith(DIVERGED_PREFIX)


def format_time(moment: datetime) -> str:
    """UTC time as it stands in names: ``20261120T081710.123Z``."""
    moment = moment.astimezone(UTC)
    return f"{moment.strftime(_TIME_FORMAT)}.{moment.microsecond // 1000:03d}Z"


def snapshot_name(job: str, moment: datetime) -> str:
    """The name of a snapshot that ``job`` takes at ``moment``."""
    return f"{SNAPSHOT_PREFIX}_{names.check_word('job name', job)}_{format_time(moment)}"


def job_of(name: str) -> str | None:
    """The job whose snapshot has this name, None where the name is not of our making."""
    match = _OURS.fullmatch(name)
    return match["job"] if match else None


def hold_tag(job: str, target_node: str, target_storage: str) -> str:
    """The tag under which ``job`` holds the base for one target, on both sides."""
    return names.check_tag(f"{SNAPSHOT_PREFIX}:{job}:{target_node}:{target_storage}")


def cursor_name(tag: str, guid: str) -> str:
    """The name of the bookmark that goes with a hold on a source: still a base where somebody destroys the snapshot."""
    return f"{tag}:{guid}"


class HoldPurpose(StrEnum):
    """What a job holds a snapshot for."""

    BASE = ""
    """The next difference is sent from it."""
    CLONE = "clone"
    """A clone of it is being sent."""
    VERIFY = "verify"
    """It is being compared or healed."""


@dataclass(frozen=True, slots=True)
class HoldTag:
    """What a tag of :func:`hold_tag`, :func:`clone_tag` or :func:`verify_tag` says: the job, the target's node and
    storage, and what for."""

    job: str
    node: str
    storage: str
    purpose: HoldPurpose = HoldPurpose.BASE

    @classmethod
    def parse(cls, tag: str) -> HoldTag | None:
        """None where the tag is not of a job and target of ours."""
        prefix, *parts = tag.split(":")
        if prefix != SNAPSHOT_PREFIX or len(parts) not in (3, 4):
            return None
        purpose = parts[3] if len(parts) == 4 else None
        if purpose is not None and purpose not in (HoldPurpose.CLONE, HoldPurpose.VERIFY):
            return None
        return cls(parts[0], parts[1], parts[2], HoldPurpose(purpose or ""))

    def __str__(self) -> str:
        doing = {HoldPurpose.CLONE: ", which sends a clone of it", HoldPurpose.VERIFY: ", which verifies it"}
        return f"job {self.job} for {self.node}:{self.storage}{doing.get(self.purpose, '')}"


def has_cursor(tag: str) -> bool:
    """Whether a bookmark goes with this tag on a source; other holds are short-lived."""
    parsed = HoldTag.parse(tag)
    return parsed is not None and parsed.purpose is HoldPurpose.BASE


def clone_tag(tag: str) -> str:
    """The tag under which the same job holds the origin of a clone while the clone is sent; ``tag`` is its hold tag.

    One that an interrupted run left is released by the next run of the origin itself, which comes before its clones,
    or by the daemon's search for what is left over.
    """
    return names.check_tag(f"{tag}:{HoldPurpose.CLONE}")


def verify_tag(tag: str) -> str:
    """The tag under which the same job holds on both sides what it compares or heals; ``tag`` is its hold tag."""
    return names.check_tag(f"{tag}:{HoldPurpose.VERIFY}")


def restore_tag(node: str) -> str:
    """The tag under which ``node`` holds what it copies while it restores."""
    return names.check_tag(f"{SNAPSHOT_PREFIX}:restore:{node}")


def restored_by(tag: str) -> str | None:
    """The node of a tag of :func:`restore_tag`, None where it is none."""
    head, _, node = tag.rpartition(":")
    return node if head == f"{SNAPSHOT_PREFIX}:restore" else None


def rejoin_tag(node: str) -> str:
    """The tag under which a copy that was promoted holds what ``node`` needs to follow it."""
    return names.check_tag(f"{SNAPSHOT_PREFIX}:rejoin:{names.check_node(node)}")


def handover_tag(node: str) -> str:
    """The tag under which a primary that stepped down for ``node`` holds the snapshot that ``node`` goes on from.

    On the newest snapshot of a replica it says that a switch-over may not have come to its end.
    """
    return names.check_tag(f"{SNAPSHOT_PREFIX}:handover:{names.check_node(node)}")


def kept_tag(node: str) -> str:
    """The tag under which a copy of ``node`` that follows another one holds what only it has."""
    return names.check_tag(f"{SNAPSHOT_PREFIX}:kept:{names.check_node(node)}")


def waits_for_rejoin(version: Version) -> bool:
    """Whether a copy on another node may need this version, and so the history up to it, to follow this one."""
    return any(map(is_rejoin_tag, version.holds))


def is_rejoin_tag(tag: str) -> bool:
    """Whether it is one of :func:`rejoin_tag`."""
    return tag.startswith(f"{SNAPSHOT_PREFIX}:rejoin:")


def role_tag_of(tag: str) -> str | None:
    """The node of a tag of :func:`rejoin_tag`, :func:`handover_tag` or :func:`kept_tag`, None where it is none."""
    head, _, node = tag.rpartition(":")
    return node if head in {f"{SNAPSHOT_PREFIX}:{what}" for what in ("rejoin", "handover", "kept")} else None


class Role(StrEnum):
    """Whether a copy is the one that is written to, or one that follows it."""

    PRIMARY = "primary"
    REPLICA = "replica"


@dataclass(frozen=True, slots=True)
class Lineage:
    """Which family of copies a volume belongs to, and its part in it; kept in the storage beside the data.

    :ivar uuid: the same for all copies
    :ivar epoch: raised by each promotion (:func:`replicator.roles.next_epoch`); data is taken only from an epoch not
        older than one's own
    """

    uuid: str
    role: Role
    epoch: int

    def __post_init__(self) -> None:
        try:
            uuid.UUID(self.uuid)
        except ValueError:
            raise InvalidName(f"lineage {self.uuid!r} is not a UUID", hint="") from None
        if not 1 <= self.epoch < 2**63:
            raise InvalidName(f"epoch {self.epoch} of lineage {self.uuid} is out of range", hint="")


class StreamKind(StrEnum):
    """``blocks``: extents with digests, understood by us; ``native``: opaque bytes of the storage (zfs send)."""

    BLOCKS = "blocks"
    NATIVE = "native"


Form = Literal["", "raw", "plain"]
"""How a native stream has encrypted data: as it is on the disk, or decrypted. One replica is made of one form."""


class VerifyBy(StrEnum):
    """How replicas of native streams (ZFS) are verified; those of blocks are always read."""

    AUTO = "auto"
    """Read both sides; where one cannot be read, take the pools' last scrubs."""
    READING = "reading"
    """Read both sides, or fail."""
    SCRUB = "scrub"
    """Compare identities and take the pools' last scrubs; read nothing."""


@dataclass(frozen=True, slots=True)
class ResumeState:
    """A half-received version on a target, as the target's storage durably has it.

    :ivar to_name: name of the version being received
    :ivar base_guid: base of the interrupted step, None for a full one
    :ivar offset: blocks: every change below this byte offset of the volume is durable; native: bytes received
    :ivar token: native: the storage's opaque resume token
    """

    kind: StreamKind
    to_guid: str
    to_name: str
    base_guid: str | None
    offset: int
    token: str = ""


class Capability(Flag):
    """What a storage can do; a backend declares it, planning and ``check`` read it."""

    NONE = 0
    SEND = auto()
    RECEIVE = auto()
    BOOKMARKS = auto()
    NATIVE_INTERMEDIATES = auto()
    """One stream can carry several snapshots."""
    ATOMIC_GROUP = auto()
    """Snapshots of several volumes at one instant."""
    ATOMIC_SNAPSHOT = auto()
    """A snapshot of one volume is one instant (false for a plain file copied while in use)."""
    DIGESTS = auto()
    """Blocks can be compared by digest and sent one by one (needed by resync and verify)."""
    CLONE = auto()
    """A snapshot becomes a new volume without copying."""
    RENAME = auto()
    """A replica can be given another name, with all that belongs to it."""
    ORIGINS = auto()
    """A clone can be sent as the difference to the snapshot that it began as, and stays a clone of it."""
    PROPERTIES = auto()
    """Volumes have properties beside their data that a replica may take over."""
    ROLES = auto()
    """Copies can be promoted and demoted."""


@dataclass(frozen=True, slots=True)
class StorageInfo:
    """A storage of a node, as ``check`` and planning need it.

    :ivar detail: one sentence for people, e.g. "reflink copies (XFS)"
    :ivar warnings: what an operator should know
    """

    name: str
    kind: str
    stream: StreamKind
    capabilities: Capability
    total: int
    free: int
    detail: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Lack:
    """Something that a storage needs for what it is used for, and has not.

    :ivar remedy: what to do, a command line where one does it
    :ivar needed: whether it does not work without; else it is only slower
    """

    message: str
    remedy: str
    needed: bool = True


@dataclass(frozen=True, slots=True)
class Origin:
    """The snapshot that a clone began as.

    :ivar volume: of the same storage
    :ivar snapshot: its name there
    """

    volume: VolumeId
    snapshot: str

    def __str__(self) -> str:
        return f"{self.volume}@{self.snapshot}"


@dataclass(frozen=True, slots=True)
class Property:
    """Something that a storage knows of a volume beside its data; name and value in the storage's own words."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class VolumeInfo:
    """A volume in a listing.

    :ivar origin: what it is a clone of, where that is a volume of the same storage
    """

    id: VolumeId
    size: int | None
    lineage: Lineage | None
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class VolumeState:
    """All that planning needs to know of a volume, read in one go.

    :ivar versions: oldest first by ``position``; complete versions only
    :ivar head_changed: replicas only: there is live data beside the snapshots that no snapshot has (somebody wrote)
    :ivar size: logical size now, bytes
    :ivar origin: what it is a clone of, where that is a volume of the same storage
    :ivar form: ZFS: in which form its streams are made; of a replica, in which it was received ("" where nothing says
        so). "" where a storage has only one
    """

    id: VolumeId
    size: int | None
    versions: tuple[Version, ...]
    lineage: Lineage | None
    resume: ResumeState | None = None
    head_changed: bool = False
    origin: Origin | None = None
    form: Form = ""

    @property
    def snapshots(self) -> tuple[Version, ...]:
        """The versions that have data."""
        return tuple(v for v in self.versions if v.kind is VersionKind.SNAPSHOT)

    def by_guid(self, guid: str) -> Version | None:
        """The version of that identity, a snapshot before a bookmark."""
        found = [v for v in self.versions if v.guid == guid]
        return min(found, key=lambda v: v.kind is not VersionKind.SNAPSHOT, default=None)

    def find(self, text: str) -> Version | None:
        """The version of that name, or else of that identity."""
        return next((v for v in self.versions if v.name == text), None) or self.by_guid(text)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a transfer is.

    :ivar total: estimate in bytes, None when unknown
    :ivar done: bytes of changes handled (written or zeroed), resumed part included
    :ivar sent: bytes that crossed the network, after compression; equal to the data bytes locally
    :ivar rate: bytes of ``done`` per second, lately
    """

    volume: str
    target: str
    step: str
    done: int
    total: int | None
    sent: int
    rate: float
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
