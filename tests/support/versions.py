"""Makes versions, states and routes for tests of what is pure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from replicator.conflicts import Route
from replicator.model import (
    Lineage,
    ResumeState,
    Role,
    StreamKind,
    Version,
    VersionKind,
    VolumeId,
    VolumeState,
    snapshot_name,
)

EPOCH = datetime(2026, 11, 20, 8, 0, tzinfo=UTC)
LINEAGE = "6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00"
OTHER_LINEAGE = "00000000-7f3a-4b0e-9a43-3f1f5f5a1d00"
SOURCE = VolumeId("tank", "vm-100")
TARGET = VolumeId("backup", "prox1/vm-100")
ROUTE = Route(SOURCE, "prox2:backup")
TAG = "replicator:vms:prox2:backup"


def at(minutes: float) -> datetime:
    """A moment so many minutes after the tests' epoch."""
    return EPOCH + timedelta(minutes=minutes)


def snap(
    number: int,
    *,
    name: str = "",
    guid: str = "",
    position: int | None = None,
    job: str = "vms",
    created: datetime | None = None,
    holds: Iterable[str] = (),
) -> Version:
    """The snapshot with that number: its guid, position and time follow from it unless given."""
    created = created or at(number)
    return Version(
        name or snapshot_name(job, created),
        guid or f"guid{number}",
        created,
        number if position is None else position,
        holds=tuple(holds),
    )


def mark(number: int, name: str = "") -> Version:
    """The bookmark of that number."""
    return Version(name or f"mark{number}", f"guid{number}", at(number), number, VersionKind.BOOKMARK)


def source_state(*versions: Version, epoch: int = 1, role: Role = Role.PRIMARY) -> VolumeState:
    """A source volume of the tests' lineage."""
    return VolumeState(SOURCE, 1 << 20, versions, Lineage(LINEAGE, role, epoch))


def target_state(
    *versions: Version,
    epoch: int = 1,
    role: Role = Role.REPLICA,
    lineage: str = LINEAGE,
    resume: ResumeState | None = None,
    head_changed: bool = False,
) -> VolumeState:
    """A replica of the tests' lineage."""
    return VolumeState(TARGET, 1 << 20, versions, Lineage(lineage, role, epoch), resume, head_changed)


def partial(to: Version, base: Version | None, offset: int = 4096) -> ResumeState:
    """A half-received version."""
    return ResumeState(StreamKind.BLOCKS, to.guid, to.name, base.guid if base else None, offset)
