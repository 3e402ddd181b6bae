"""What an operator can ask of a node: the one interface behind the command line, the HTTP API and the page.

:class:`Control` is implemented by :class:`replicator.engine.Engine` in the process that does the work, and by
:class:`replicator.client.DaemonClient` over the daemon's Unix socket. The values here are what both return; they cross
the socket as JSON (pydantic ``TypeAdapter`` over these dataclasses). All times are UTC, durations seconds, sizes bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from replicator.cancellation import Cancellation
from replicator.endpoint import PruneOutcome, Range
from replicator.model import Lineage, Progress, Version
from replicator.verification import Resync, Verification


class State(StrEnum):
    """How a replica is, most telling first."""

    RUNNING = "running"
    CONFLICT = "conflict"
    FAILED = "failed"
    LAGGING = "lagging"
    NEVER = "never synced"
    PAUSED = "paused"
    OK = "ok"


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One row of ``status``: a volume of a job and one of its targets.

    :ivar volume: as its job names it: ``STORAGE:NAME``, with ``NODE/`` before it for a pull job
    :ivar lag: age of the newest snapshot that the target has complete, or of the last look that showed that nothing was
        written since; None when it has none (known)
    :ivar objective: the job's max_lag
    :ivar duration: of the last run that transferred or checked something
    :ivar sent: bytes over the network in that run
    :ivar failures: consecutive ones
    :ivar message: what is wrong, and ``hint`` what to do; "" when all is well
    :ivar differing: bytes that are known to differ from the source, in the snapshot in which that was found last
    """

    job: str
    volume: str
    target: str
    state: State
    lag: float | None
    objective: float | None
    last_sync: datetime | None
    next_sync: datetime | None
    duration: float | None
    done: int
    sent: int
    failures: int
    paused: bool = False
    snapshot: str = ""
    message: str = ""
    hint: str = ""
    progress: Progress | None = None
    differing: int = 0

    @property
    def misses_objective(self) -> bool:
        """Whether the replica is further behind than the job allows."""
        return self.objective is not None and (self.lag is None or self.lag > self.objective)


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """A peer, as this node sees it. ``round_trip`` and ``clock_difference`` in seconds, None when not known."""

    node: str
    address: str
    up: bool
    round_trip: float | None = None
    clock_difference: float | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class Orphan:
    """A replica whose source is gone.

    :ivar volume: the source as it was: ``STORAGE:NAME``
    :ivar target: ``NODE:STORAGE``
    :ivar replica: ``STORAGE:NAME`` on that node
    """

    job: str
    volume: str
    target: str
    replica: str


@dataclass(frozen=True, slots=True)
class CopyStatus:
    """A copy that this node has: a primary that is replicated, or a replica.

    :ivar note: what should be known of it, "" for nothing
    """

    volume: str
    role: str
    epoch: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Status:
    """``status``: this node, its peers, its replicas. ``daemon``: whether one runs (else nothing is scheduled).

    :ivar orphans: replicas that are kept although their sources are gone
    :ivar copies: of this node, with their roles
    """

    node: str
    version: str
    daemon: bool
    now: datetime
    replicas: tuple[ReplicaStatus, ...]
    peers: tuple[PeerStatus, ...] = ()
    orphans: tuple[Orphan, ...] = ()
    copies: tuple[CopyStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One transfer that a run would make. ``size`` is an estimate of the changes, None when it is not known."""

    base: str | None
    to: str
    size: int | None
    resumes_at: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedReplica:
    """What a run would do for one volume and target.

    :ivar snapshot: whether the run takes a new snapshot first (its size is not known yet)
    :ivar source_prunes: what goes from the source; told once a volume, with the first of its targets
    :ivar conflict: what stops it, "" if nothing; ``hint`` is the way out
    """

    job: str
    volume: str
    target: str
    steps: tuple[PlannedStep, ...]
    source_prunes: tuple[PruneOutcome, ...] = ()
    target_prunes: tuple[PruneOutcome, ...] = ()
    notes: tuple[str, ...] = ()
    conflict: str = ""
    conflict_kind: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run did for one volume and target.

    ``outcome``: ok, failed, conflict, cancelled; skipped: another run or work on the same replica was under way.
    """

    job: str
    volume: str
    target: str
    outcome: str
    seconds: float
    steps: int
    done: int
    sent: int
    snapshot: str = ""
    message: str = ""
    hint: str = ""
    code: str = ""
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class ResyncPreview:
    """What a resync would do to one target before it asks for consent.

    :ivar effects: sentences, each one thing that it will change on the target
    """

    volume: str
    target: str
    effects: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SideSnapshots:
    """The snapshots of a volume on one side. ``node`` and ``volume`` say where; None versions: it does not exist.

    :ivar leftovers: what holds of ours nothing needs any more, a sentence each
    """

    node: str
    volume: str
    role: str
    epoch: int | None
    versions: tuple[Version, ...] | None
    partial: str = ""
    message: str = ""
    leftovers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a prune did (or would do) to one copy of a volume."""

    node: str
    volume: str
    outcomes: tuple[PruneOutcome, ...]
    message: str = ""


@dataclass(frozen=True, slots=True)
class OrphanReport:
    """A replica whose source is gone, and what a request to remove it did (or would do).

    :ivar lineage: of the replica; None where it is not known
    :ivar versions: its snapshots
    :ivar kept: why it stays, "" where it goes
    :ivar gone: it was removed
    """

    orphan: Orphan
    lineage: Lineage | None
    size: int | None
    versions: tuple[Version, ...]
    kept: str = ""
    gone: bool = False


class Level(StrEnum):
    """How bad a finding of ``check`` is."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that ``check`` looked at."""

    subject: str
    level: Level
    message: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """Something that happened."""

    time: datetime
    kind: str
    job: str
    volume: str
    target: str
    outcome: str
    seconds: float | None
    done: int
    sent: int
    message: str = ""


@dataclass(frozen=True, slots=True)
class Restored:
    """A new volume made from a snapshot. ``copied`` is 0 when it shares its data with the snapshot."""

    volume: str
    snapshot: str
    source_node: str
    size: int | None
    copied: int


class RoleVerb(StrEnum):
    """What can be done to the role of a copy."""

    PROMOTE = "promote"
    DEMOTE = "demote"
    SWITCHOVER = "switchover"
    REJOIN = "rejoin"


@dataclass(frozen=True, slots=True)
class RoleOrder:
    """A request to change a role.

    :ivar volume: STORAGE:NAME; of a switch-over as its job has it, else of this node
    :ivar node: the node to switch over to, or to rejoin from; "" for the others
    :ivar force: promote although something speaks against it
    :ivar primary_is_down: the operator's word that nodes which do not answer are down
    :ivar fail_back: once it has rejoined and is in sync, switch over to it
    """

    verb: RoleVerb
    volume: str
    node: str = ""
    force: bool = False
    primary_is_down: bool = False
    fail_back: bool = False


@dataclass(frozen=True, slots=True)
class RolePreview:
    """What a change of role would do, before it asks for consent.

    :ivar effects: sentences, each one thing
    """

    verb: RoleVerb
    volume: str
    effects: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RoleReport:
    """What a change of role did.

    :ivar volume, node: the copy whose role changed (of a switch-over the new primary)
    :ivar snapshot: that it goes on from; ``age`` in seconds then, None where it is not known
    :ivar beyond: what the former primary is known to have beyond that
    :ivar aside: names under which data is kept that only this copy had
    :ivar without_primary: seconds in which there was no writable copy
    :ivar reasons: why it could be, a sentence each
    """

    verb: RoleVerb
    volume: str
    node: str
    role: str
    epoch: int
    snapshot: str
    age: float | None = None
    beyond: str = ""
    aside: tuple[str, ...] = ()
    without_primary: float | None = None
    done: int = 0
    sent: int = 0
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Note:
    """Something that long work says while it goes on, besides progress."""

    message: str


Happening = Progress | Note | RunReport | Verification | Resync
Listener = Callable[[Happening], None]
"""Called from the working threads, several at once; must not block."""


class Control(Protocol):
    """Everything an operator can ask. Methods raise errors of :mod:`replicator.errors`.

    ``volume`` is ``STORAGE:NAME`` as in ``status``; ``target`` is ``NODE:STORAGE``; None means all of them.
    Long work reports to ``listen`` and stops at a resumable point when ``cancel`` says so.
    """

    def status(self) -> Status:
        """What every replica is like now."""

    def plan(self, job: str | None) -> tuple[PlannedReplica, ...]:
        """What a run would do now; changes nothing."""

    def sync(
        self, job: str, volume: str | None, target: str | None, listen: Listener, cancel: Cancellation
    ) -> tuple[RunReport, ...]:
        """Run a job now, whatever its schedule; failures are in the reports."""

    def preview_resync(self, volume: str, target: str | None, full: bool) -> tuple[ResyncPreview, ...]:
        """What :meth:`resync` would change."""

    def resync(
        self, volume: str, target: str | None, full: bool, listen: Listener, cancel: Cancellation
    ) -> tuple[Resync, ...]:
        """Make replicas right again.

        :param full: of storages with streams of their own (ZFS): keep the whole replica aside and send everything anew,
            also where that is not known to be necessary. Others are always compared in full
        """

    def verify(
        self,
        volume: str,
        target: str | None,
        snapshot: str | None,
        repair: bool,
        scrub: bool,
        listen: Listener,
        cancel: Cancellation,
    ) -> tuple[Verification, ...]:
        """Compare replicas with their source, and mend them with ``repair``.

        :param scrub: of ZFS: scrub the pools now instead of reading
        """

    def snapshots(self, volume: str) -> tuple[SideSnapshots, ...]:
        """The snapshots of a volume on every side."""

    def prune(self, job: str, dry_run: bool) -> tuple[PruneReport, ...]:
        """Apply a job's retention now."""

    def orphans(self, job: str) -> tuple[OrphanReport, ...]:
        """The replicas of a job whose sources are gone, and whether they can be removed."""

    def remove_orphans(self, job: str, wanted: tuple[OrphanReport, ...]) -> tuple[OrphanReport, ...]:
        """Remove replicas whose sources are gone, with all their snapshots; what became of each.

        :param wanted: of :meth:`orphans`: what has changed since is kept
        """

    def restore(self, snapshot: str, to: str, listen: Listener, cancel: Cancellation) -> Restored:
        """``STORAGE:NAME@SNAPSHOT`` -> new volume ``STORAGE:NAME`` of this node, wherever the snapshot is."""

    def preview_role(self, order: RoleOrder) -> RolePreview:
        """What :meth:`change_role` would do. :raises ConflictError: it may not be; why, and the way out"""

    def change_role(self, order: RoleOrder, listen: Listener, cancel: Cancellation) -> RoleReport:
        """Promote, demote, switch over or rejoin. Idempotent: what was cut off is finished, or undone."""

    def history(self, limit: int) -> tuple[HistoryEntry, ...]:
        """What happened, newest first."""

    def pause(self, job: str) -> None:
        """Let a job not run by itself any more, also after a restart."""

    def resume(self, job: str) -> None:
        """Let a paused job run by its schedule again."""

    def check(self) -> tuple[Finding, ...]:
        """Configuration, network, clocks, storages, peers and space."""


__all__ = [
    "Control",
    "CopyStatus",
    "Finding",
    "Happening",
    "HistoryEntry",
    "Level",
    "Listener",
    "Note",
    "Orphan",
    "OrphanReport",
    "PeerStatus",
    "PlannedReplica",
    "PlannedStep",
    "PruneReport",
    "Range",
    "ReplicaStatus",
    "Restored",
    "ResyncPreview",
    "RoleOrder",
    "RolePreview",
    "RoleReport",
    "RoleVerb",
    "RunReport",
    "SideSnapshots",
    "State",
    "Status",
]
