"""What has to be sent: two lists of versions in, a plan or a conflict out. Pure; no I/O, no clock.

Versions are matched by guid, so renames on either side do not matter. ``position`` orders the versions of one side;
creation times are never compared, because clocks lie. One pass over dictionaries: time is linear in the number of
versions.

::

    source   a ── b ── c ── d ── e          common: c (newest that the target has and the source knows)
    target   a ── x'── c                    steps:  c → d, d → e      (or c → e: newest only, or one batch)

Snapshots that only the target has are no conflict as long as they are older than the common one: that is longer
retention. Newer ones mean that somebody wrote there, and that is a decision for people (:class:`Diverged`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from enum import StrEnum

from replicator.conflicts import (
    Conflict,
    Diverged,
    MixedForms,
    MixedStreams,
    NoCommonBase,
    NotAReplica,
    Recreated,
    Route,
    SourceIsReplica,
    SourceMissing,
    StaleEpoch,
)
from replicator.model import (
    ResumeState,
    Role,
    Version,
    VersionKind,
    VolumeId,
    VolumeState,
    clone_tag,
    verify_tag,
)
from replicator.names import MAX_SNAPSHOT_BYTES
from replicator.roles import is_beginning_of
from replicator.selection import SnapshotPatterns


class Intermediates(StrEnum):
    """Which snapshots between the common one and the newest are sent."""

    ALL = "all"
    NEWEST = "newest"


@dataclass(frozen=True, slots=True)
class SendPolicy:
    """Which snapshots of a source go to a target.

    :ivar job: only snapshots that this job made; None: foreign ones as well
    :ivar foreign: with a job: snapshots that replicator did not make and that are sent all the same, every one of them
    :ivar origins: names of snapshots that clones in the same job began as: they are sent whoever made them, because
        without them the clones would go in full and be clones no more
    """

    intermediates: Intermediates = Intermediates.ALL
    job: str | None = None
    foreign: SnapshotPatterns = field(default_factory=SnapshotPatterns)
    origins: frozenset[str] = frozenset()

    def selects(self, version: Version) -> bool:
        """Whether this version is one to send. Bookmarks have no data; what a resync kept aside stays where it is."""
        if version.kind is not VersionKind.SNAPSHOT or version.is_diverged:
            return False
        return self.job is None or version.job == self.job or self.wants(version)

    def wants(self, version: Version) -> bool:
        """Whether this is a snapshot that was asked for by its name: never passed over for a newer one."""
        if version.name in self.origins:
            return True
        return self.job is not None and version.job is None and self.foreign.matches(version.name)


@dataclass(frozen=True, slots=True)
class Common:
    """One version that both sides have, as each side knows it."""

    source: Version
    target: Version


@dataclass(frozen=True, slots=True)
class CloneBase:
    """The snapshot that a source began as, where source and target both have it: what is sent first is only the
    difference to it, and the replica is a clone as the source is one.

    :ivar source, target: the volumes that have it
    :ivar common: it, as each side knows it
    :ivar coming: the target does not have it yet: the next run of the origin brings it
    """

    source: VolumeId
    target: VolumeId
    common: Common
    coming: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One stream to send.

    :ivar base: what the source sends from (a snapshot or a bookmark), None for everything
    :ivar target_base: the same version as the target knows it, or will once the step before this one is done
    :ivar to: what is sent, as the source knows it
    :ivar name: what ``to`` is called on the target: its own name, unless another version has that there
    :ivar intermediates: snapshots between base and to travel in the same stream
    :ivar resume: the target's partial state that this step continues
    :ivar estimate: bytes of changes, None when not known; planning leaves it None
    :ivar clone: base and target_base are not of these volumes, but of those that they are clones of
    """

    base: Version | None
    target_base: Version | None
    to: Version
    name: str
    intermediates: bool = False
    resume: ResumeState | None = None
    estimate: int | None = None
    clone: CloneBase | None = None

    @property
    def arriving(self) -> Version:
        """``to`` as the target is to call it."""
        return replace(self.to, name=self.name)

    def __str__(self) -> str:
        text = f"{self.base.name} → {self.to.name}" if self.base else f"full copy of {self.to.name}"
        return f"{text} (resumed at byte {self.resume.offset})" if self.resume else text


@dataclass(frozen=True, slots=True)
class StaleResume:
    """Partial state on the target that nothing on the source continues. No conflict: it is discarded."""

    resume: ResumeState
    reason: str

    @property
    def message(self) -> str:
        """One sentence for the log."""
        return f"the half-received {self.resume.to_name} is discarded: {self.reason}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What brings the target up to date.

    :ivar steps: in order; each one's base is the ``to`` of the one before
    :ivar common: the newest version that both have, before the first step
    :ivar stale_resume: discard the target's partial state first, and why
    :ivar reason: why there is nothing to do, "" where there are steps
    :ivar renamed: the replica is still called so; it gets its new name first
    :ivar notes: what people should know of it, a sentence each
    """

    steps: tuple[Step, ...]
    common: Common | None
    stale_resume: StaleResume | None = None
    reason: str = ""
    renamed: VolumeId | None = None
    notes: tuple[str, ...] = ()

    @property
    def abort_partial(self) -> bool:
        """Whether the target's partial state must be discarded before the first step."""
        return self.stale_resume is not None

    @property
    def up_to_date(self) -> bool:
        """Whether the target has all it should have already (false for a source without any snapshot)."""
        return not self.steps and self.common is not None

    @property
    def waits_for(self) -> CloneBase | None:
        """What must be on the target before the first step can be done."""
        clone = self.steps[0].clone if self.steps else None
        return clone if clone is not None and clone.coming else None

    def brings(self, version: Version) -> Version | None:
        """A snapshot of the source as it will be on the target, if it is one of those that are sent."""
        for step in self.steps:
            if step.to.guid == version.guid:
                return step.arriving
            begin = step.base.position if step.intermediates and step.base is not None else step.to.position
            if begin < version.position < step.to.position:
                return version
        return None


def plan(
    source: VolumeState | None,
    target: VolumeState | None,
    policy: SendPolicy,
    route: Route,
    clone: CloneBase | None = None,
    *,
    origin_passed: bool = False,
) -> Plan | Conflict:
    """What brings ``target`` up to date with ``source``.

    :param source: None: there is no such volume
    :param target: None: there is no such volume, so a full copy makes it
    :param clone: what the source is a clone of, where the target has that too, or gets it first
    :param origin_passed: the target has a replica of what the source is a clone of, and that cannot get the snapshot
        any more because it has newer ones
    """
    if source is None:
        return SourceMissing(route)
    if route.source_stream is not route.target_stream:
        return MixedStreams(route)
    conflict = _lineage_conflict(source, target, route)
    if conflict is not None:
        return conflict

    sent = tuple(sorted((v for v in source.versions if policy.selects(v)), key=_position))
    there = _live_snapshots(target)
    common = _newest_common(source, there)
    if target is not None:
        conflict = _version_conflict(source, target, there, common, route)
        if conflict is not None:
            return conflict
        if there and mixes_forms(source, target):
            return MixedForms(route, source.form, target.form)

    if common is not None:
        clone = None
    builder = _Steps(source, target, policy, route.batches, common, clone)
    resumed = _resumable(source, target, policy, route, there, common or (clone.common if clone else None))
    stale = resumed if isinstance(resumed, StaleResume) else None
    if isinstance(resumed, Version) and target is not None and target.resume is not None:
        builder.resume(resumed, target.resume)
    builder.add(sent)
    steps = tuple(builder.steps)
    reason = "" if steps else ("up to date" if common else "the source has no snapshot to send yet")
    notes = _notes(source, steps[0].clone if steps else clone, origin_passed) if common is None else ()
    return Plan(steps, common, stale, reason, notes=notes)


def _notes(source: VolumeState, clone: CloneBase | None, origin_passed: bool) -> tuple[str, ...]:
    """What a first copy of a clone costs, and why."""
    if source.origin is None:
        return ()
    told = f"it is a clone of {source.origin}, which"
    if clone is not None:
        there = "goes to the target first" if clone.coming else "the target has"
        return (f"{told} {there}: only the difference to that is sent",)
    if origin_passed:
        passed = f"has newer ones of {source.origin.volume} and not that"
        return (f"it is a clone of {source.origin}, but the target {passed}: it is sent in full",)
    return (f"{told} the target does not have: it is sent in full",)


def newest_common(source: VolumeState, target: VolumeState | None) -> Common | None:
    """The newest version that the target has as a snapshot and the source knows, by the target's order."""
    return _newest_common(source, _live_snapshots(target))


def origin_guids(source: VolumeState, policy: SendPolicy) -> frozenset[str]:
    """The snapshots that clones in the same job began as. No policy may destroy them on either side: a target that
    lost one could take its clones only in full."""
    return frozenset(version.guid for version in source.snapshots if version.name in policy.origins)


def protected_guids(
    source: VolumeState, targets: Iterable[VolumeState | None], policy: SendPolicy | None = None
) -> frozenset[str]:
    """What no policy may destroy, on either side: the last common version with each target, what a partial state of
    a target continues, and what clones began as.

    :param targets: the states of all live targets; an unreachable one cannot be in here, its hold protects it instead
    """
    guids: set[str] = set(origin_guids(source, policy)) if policy is not None else set()
    for target in targets:
        common = newest_common(source, target)
        if common is not None:
            guids.add(common.source.guid)
        if target is not None and target.resume is not None:
            guids.add(target.resume.to_guid)
            if target.resume.base_guid is not None:
                guids.add(target.resume.base_guid)
    return frozenset(guids)


def mixes_forms(source: VolumeState, target: VolumeState) -> bool:
    """Whether the source sends streams of another form than those that made the target."""
    return bool(source.form and target.form) and source.form != target.form


@dataclass(frozen=True, slots=True)
class StepHolds:
    """What one step needs held from before its first byte until the target has confirmed.

    The target's hold on the new version is set by the receive itself, in the same commit.
    """

    tag: str
    source: tuple[Version, ...]
    target: tuple[Version, ...]


def holds_for(step: Step, tag: str) -> StepHolds:
    """The holds that ``step`` needs in its own volumes. Bookmarks cannot be held and need not be: only data can be
    destroyed."""
    if step.clone is not None:
        return StepHolds(tag, (step.to,), ())
    return StepHolds(
        tag,
        tuple(v for v in (step.base, step.to) if v is not None and v.kind is VersionKind.SNAPSHOT),
        (step.target_base,) if step.target_base is not None else (),
    )


def stale_holds(state: VolumeState, tag: str, keep: Set[str]) -> list[tuple[Version, str]]:
    """Versions that still carry our hold ``tag`` (or are a cursor that goes with it) although their guid is none of
    ``keep``: left by a run that ended between the confirmation and the release."""
    return [(v, tag) for v in state.versions if tag in v.tags and v.guid not in keep]


def idle_holds(
    source: VolumeState, target: VolumeState | None, tag: str
) -> tuple[list[tuple[Version, str]], list[tuple[Version, str]]]:
    """Holds of a job and target that nothing needs while no work of theirs is under way: on the source, on the target.

    Those of a work that was cut off, and those on what is older than the newest common version. A newer version, and
    what a half-received one continues, are what the next run begins with.
    """
    common = newest_common(source, target)
    resume = target.resume if target is not None else None
    needed = {resume.to_guid, resume.base_guid} if resume is not None else set()

    def of(state: VolumeState, newest: Version | None) -> list[tuple[Version, str]]:
        cut_off = [
            found for work in (clone_tag(tag), verify_tag(tag)) for found in stale_holds(state, work, frozenset())
        ]
        before = [] if newest is None else stale_holds(state, tag, frozenset({newest.guid}))
        return cut_off + [
            (version, held)
            for version, held in before
            if newest is not None and version.position < newest.position and version.guid not in needed
        ]

    return (
        of(source, common.source if common is not None else None),
        [] if target is None else of(target, common.target if common is not None else None),
    )


def _position(version: Version) -> int:
    return version.position


def _live_snapshots(target: VolumeState | None) -> tuple[Version, ...]:
    """The target's snapshots, oldest first, without what a resync kept aside."""
    versions = target.versions if target is not None else ()
    found = (v for v in versions if v.kind is VersionKind.SNAPSHOT and not v.is_diverged)
    return tuple(sorted(found, key=_position))


def _by_guid(versions: Iterable[Version]) -> dict[str, Version]:
    """Versions by identity, a snapshot before a bookmark."""
    found: dict[str, Version] = {}
    for version in versions:
        if version.kind is VersionKind.SNAPSHOT or version.guid not in found:
            found[version.guid] = version
    return found


def _newest_common(source: VolumeState, there: Sequence[Version]) -> Common | None:
    known = _by_guid(v for v in source.versions if not v.is_diverged)
    for version in reversed(there):
        if version.guid in known:
            return Common(known[version.guid], version)
    return None


def _lineage_conflict(source: VolumeState, target: VolumeState | None, route: Route) -> Conflict | None:
    ours = source.lineage
    if ours is not None and ours.role is Role.REPLICA:
        return SourceIsReplica(route, ours.epoch)
    if target is None:
        return None
    theirs = target.lineage
    if theirs is None:
        if is_beginning_of(target, {version.guid for version in source.snapshots}):
            return None
        return NotAReplica(route, target.id, "it is a volume of its own, never made by replication")
    if ours is None or theirs.uuid != ours.uuid:
        if theirs.role is Role.PRIMARY:
            return NotAReplica(route, target.id, f"it is a primary itself, of lineage {theirs.uuid}")
        there = _live_snapshots(target)
        common = _newest_common(source, there)
        return Recreated(route, target.id, theirs.uuid, there[-1] if there else None, common.target if common else None)
    if theirs.epoch > ours.epoch:
        return StaleEpoch(route, ours.epoch, theirs.epoch)
    if theirs.role is Role.PRIMARY:
        return NotAReplica(route, target.id, f"it is a primary itself (epoch {theirs.epoch})")
    return None


def _version_conflict(
    source: VolumeState, target: VolumeState, there: Sequence[Version], common: Common | None, route: Route
) -> Conflict | None:
    if common is None:
        if there:
            return NoCommonBase(route, tuple(sorted(source.versions, key=_position)), tuple(there), source.origin)
        return Diverged(route, None, (), True) if target.head_changed else None
    newer = tuple(v for v in there if v.position > common.target.position)
    if newer or target.head_changed:
        return Diverged(route, common.target, newer, target.head_changed)
    return None


def _resumable(
    source: VolumeState,
    target: VolumeState | None,
    policy: SendPolicy,
    route: Route,
    there: Sequence[Version],
    common: Common | None,
) -> Version | StaleResume | None:
    """The source's version that the target's partial state goes to; or why nothing continues it; or None: there is no
    partial state."""
    if target is None or target.resume is None:
        return None
    resume = target.resume
    to = _by_guid(source.versions).get(resume.to_guid)
    reason = ""
    if resume.kind is not route.source_stream:
        reason = f"it is of a {resume.kind} stream, and the source sends {route.source_stream} streams"
    elif mixes_forms(source, target):
        reason = f"it began as a {target.form} stream, and the source sends {source.form} ones now"
    elif to is None or to.kind is not VersionKind.SNAPSHOT:
        reason = "the source no longer has that snapshot"
    elif not policy.selects(to):
        reason = "that snapshot is no longer one to send"
    elif any(v.guid == resume.to_guid for v in there):
        reason = "the target has that snapshot already"
    elif resume.base_guid is None and common is not None and there:
        reason = f"it began as a full copy, and there is {common.target.name} to start from"
    elif resume.base_guid is not None and (common is None or common.target.guid != resume.base_guid):
        reason = "its base is not the newest snapshot that both sides have"
    elif common is not None and to.position <= common.source.position:
        reason = "that snapshot is older than what the target has"
    return StaleResume(resume, reason) if reason or to is None else to


class _Steps:
    """Builds the chain of steps, each one starting where the last one ends."""

    def __init__(
        self,
        source: VolumeState,
        target: VolumeState | None,
        policy: SendPolicy,
        batches: bool,
        common: Common | None,
        clone: CloneBase | None,
    ) -> None:
        self.steps: list[Step] = []
        self._policy = policy
        self._batches = batches
        self._clone = clone
        begin = clone.common if clone else common
        self._base = begin.source if begin else None
        self._target_base = begin.target if begin else None
        self._there = {v.guid for v in _live_snapshots(target)}
        self._names = {v.name: v.guid for v in (target.versions if target is not None else ())}
        # A batch carries every snapshot between its ends, wanted or not: it must not span one that is not sent.
        snapshots = (v for v in source.versions if v.kind is VersionKind.SNAPSHOT)
        unwanted = (v.position for v in snapshots if not policy.selects(v) or v.guid in self._there)
        self._unwanted = sorted(unwanted, reverse=True)

    def resume(self, to: Version, state: ResumeState) -> None:
        """The step that was interrupted; what follows is planned from its end."""
        if state.base_guid is None:  # also of a clone, where the target did not have its origin when it began
            self._clone = self._base = self._target_base = None
        name = state.to_name if self._names.get(state.to_name, to.guid) == to.guid else self._free_name(to)
        self._append(Step(self._base, self._target_base, to, name, resume=state))

    def add(self, sent: Sequence[Version]) -> None:
        """Steps to all (or the newest) of ``sent`` (oldest first) that are after the base and not on the target."""
        # All that a clone has came after its origin.
        after = self._base.position if self._base is not None and self._clone is None else None
        todo = [v for v in sent if (after is None or v.position > after) and v.guid not in self._there]
        if self._policy.intermediates is Intermediates.NEWEST:
            own = [v for v in todo if not self._policy.wants(v)]
            todo = [v for v in todo if v in own[-1:] or self._policy.wants(v)]
        index = 0
        while index < len(todo):
            last = self._end_of_batch(todo, index)
            to = todo[last]
            self._append(Step(self._base, self._target_base, to, self._free_name(to), intermediates=last > index))
            index = last + 1

    def _append(self, step: Step) -> None:
        self.steps.append(replace(step, clone=self._clone))
        self._clone = None
        self._names[step.name] = step.to.guid
        self._base, self._target_base = step.to, step.arriving

    def _end_of_batch(self, todo: Sequence[Version], first: int) -> int:
        """Index of the last version that can travel in the stream of the one at ``first``.

        A stream with intermediates starts from a snapshot: not from nothing, and not from a bookmark (zfs-send(8)).
        """
        if (
            not self._batches
            or self._base is None
            or self._clone is not None
            or self._base.kind is VersionKind.BOOKMARK
        ):
            return first
        while self._unwanted and self._unwanted[-1] <= self._base.position:
            self._unwanted.pop()
        stop = self._unwanted[-1] if self._unwanted else None
        last = first
        while last + 1 < len(todo):
            candidate = todo[last + 1]
            if stop is not None and candidate.position > stop:
                break
            if self._taken(todo[last]) or self._taken(candidate):
                break  # names inside a batch are the source's; only a single snapshot can be renamed on its way
            last += 1
        if stop is not None and todo[first].position > stop:
            return first
        return last

    def _taken(self, version: Version) -> bool:
        return self._names.get(version.name, version.guid) != version.guid

    def _free_name(self, version: Version) -> str:
        """The version's own name, or one derived from its guid where another version has that name on the target
        (people rotate names like ``latest``): an occupied name is no reason to stop replicating."""
        if not self._taken(version):
            return version.name
        identity = "".join(c for c in version.guid if c.isalnum())[:32]
        stem = version.name.encode()[: MAX_SNAPSHOT_BYTES - 48].decode(errors="ignore").rstrip()
        name, number = f"{stem}.{identity}", 1
        while self._names.get(name, version.guid) != version.guid:
            number += 1
            name = f"{stem}.{identity}.{number}"
        return name
