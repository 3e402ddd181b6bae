"""Drives one volume's replication from a source endpoint to a target endpoint.

Knows plans, steps, holds and attempts; knows no storage and no socket. What it does at every moment is safe to be cut
off: the base of each step is held on both sides before the first byte, a new version counts only once the target says
that it is durable, and the next run derives everything anew from what the two sides list.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from replicator.cancellation import Cancellation
from replicator.conflicts import Conflict, Recreated, Route
from replicator.endpoint import Endpoint, ReceiveMode, ReceiveRequest, SendRequest, VolumeListing
from replicator.errors import NoSuchVolume, ReplicatorError, StaleResume, StorageError, VolumeBusy
from replicator.model import (
    DIVERGED_PREFIX,
    Capability,
    Lineage,
    Progress,
    Property,
    Role,
    StreamKind,
    Version,
    VolumeId,
    VolumeInfo,
    VolumeState,
    clone_tag,
    handover_tag,
    is_rejoin_tag,
    rejoin_tag,
    verify_tag,
)
from replicator.origins import OriginThere, find_origin
from replicator.planning import CloneBase, Plan, SendPolicy, Step, origin_guids, plan, stale_holds
from replicator.streams import KEY_SIZE, BegunStream, Chunk, ChunkStream, Stream
from replicator.watchdog import Watchdog

PAUSE_BETWEEN_ATTEMPTS = 1.0
"""Seconds; a cut that is mended at once is not worth a scheduler's back-off."""


class Pacer(Protocol):
    """Holds back a stream to a rate (see ``transport.pacing``)."""

    def wait(self, size: int, cancel: Cancellation) -> None:
        """Return when ``size`` more bytes may pass."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one replication, in seconds.

    :ivar stall: between two chunks
    :ivar prepare: until the first chunk (a target without reflink copies the base first) and for the commit
    :ivar attempts: tries within one run when an error is retryable
    """

    stall: float = 120.0
    prepare: float = 3600.0
    attempts: int = 3


@dataclass(frozen=True, slots=True)
class Pair:
    """A volume and its replica, with the endpoints that have them.

    :ivar tag: the hold tag of this job and target, set on both sides
    """

    source: Endpoint
    source_volume: VolumeId
    target: Endpoint
    target_volume: VolumeId
    tag: str

    def replica_of(self, volume: VolumeId) -> VolumeId:
        """Where the replica of another volume of the same source is on this target."""
        place = self.target_volume.name.removesuffix(self.source_volume.name)
        return VolumeId(self.target_volume.storage, place + volume.name)

    @property
    def target_text(self) -> str:
        """The target as people name it: NODE:STORAGE."""
        return f"{self.target.node}:{self.target_volume.storage}"


@dataclass(frozen=True, slots=True)
class Options:
    """How to replicate.

    :ivar policy: which snapshots are sent
    :ivar pacers: every one of them holds the stream back
    :ivar origin_first: the volume is a clone, and the same job brings what it is a clone of to the same target
    """

    policy: SendPolicy
    limits: Limits = field(default_factory=Limits)
    pacers: tuple[Pacer, ...] = ()
    origin_first: bool = False


@dataclass(slots=True)
class Outcome:
    """What a run did. Counted even when it fails in the middle.

    :ivar done: bytes of changes brought over; :ivar sent: bytes that crossed the network
    :ivar steps: steps that were committed
    :ivar newest: newest version that both sides have, complete
    :ivar origins: guids of snapshots that clones began as: not to be pruned
    """

    done: int = 0
    sent: int = 0
    steps: int = 0
    attempts: int = 0
    newest: Version | None = None
    origins: frozenset[str] = frozenset()


Observer = Callable[[Progress], None]
Listed = tuple[VolumeListing, VolumeListing]
"""The two sides of a pair in a listing of many volumes."""


def new_key() -> str:
    """A fresh key for one stream, in hex."""
    return secrets.token_hex(KEY_SIZE)


class Volumes:
    """The volumes of storages, listed once however many ask. Thread-safe; for one run, and for looking things up that
    are looked at again before anything is done."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listed: dict[tuple[str, str], tuple[VolumeInfo, ...]] = {}

    def of(self, endpoint: Endpoint, storage: str) -> tuple[VolumeInfo, ...]:
        """As the first who asked has found them."""
        with self._lock:
            place = (endpoint.node, storage)
            if place not in self._listed:
                self._listed[place] = endpoint.volumes(storage)
            return self._listed[place]

    def forget(self) -> None:
        """They are not as they were listed."""
        with self._lock:
            self._listed.clear()


class Way(Protocol):
    """What is moved, and where to; a :class:`Pair` is one."""

    @property
    def source_volume(self) -> VolumeId:
        """What is read."""

    @property
    def target_text(self) -> str:
        """Where it goes, as people name it."""


def primary_lineage(pair: Pair) -> Lineage:
    """The lineage of a source; one that has none yet gets it, which takes more of a right than to look.

    :raises ConflictError: the source is a replica
    """
    state = pair.source.state(pair.source_volume)
    if state is not None and state.lineage is not None and state.lineage.role is Role.PRIMARY:
        return state.lineage
    return pair.source.ensure_primary(pair.source_volume)


class Meter:
    """Counts a stream, tells the observer at most a few times a second, holds it back, and stops it on request."""

    INTERVAL = 0.2
    WINDOW = 3.0
    """Seconds over which the rate is smoothed."""

    def __init__(
        self,
        pair: Way,
        step: str,
        *,
        total: int | None,
        observer: Observer,
        outcome: Outcome,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._observer = observer
        self._outcome = outcome
        now = clock()
        self._began = self._told = self._marked = now
        self._marked_done = 0
        self.progress = Progress(str(pair.source_volume), pair.target_text, step, 0, total, 0, 0.0)

    def add(self, length: int, wire_bytes: int) -> None:
        """A chunk of ``length`` bytes of changes went by and took ``wire_bytes`` on the network."""
        self._outcome.done += length
        self._outcome.sent += wire_bytes
        done, sent = self.progress.done + length, self.progress.sent + wire_bytes
        now = self._clock()
        rate = self.progress.rate
        if now - self._marked >= self.INTERVAL:
            fresh = (done - self._marked_done) / (now - self._marked)
            weight = min(1.0, (now - self._marked) / self.WINDOW) if rate else 1.0
            rate += (fresh - rate) * weight
            self._marked, self._marked_done = now, done
        self.progress = replace(self.progress, done=done, sent=sent, rate=rate)
        if now - self._told >= self.INTERVAL:
            self._told = now
            self._observer(self.progress)

    def finish(self) -> None:
        """Tell the last figures; the rate is that of the whole."""
        elapsed = self._clock() - self._began
        if elapsed > 0:
            self.progress = replace(self.progress, rate=self.progress.done / elapsed)
        self._observer(self.progress)


class ObservedStream(ChunkStream):
    """A stream with counting, pacing, watching and cancellation around each chunk."""

    def __init__(
        self, stream: Stream, meter: Meter, watchdog: Watchdog, options: Options, cancel: Cancellation
    ) -> None:
        super().__init__(stream.kind, self._observe(stream), estimate=stream.estimate, on_close=stream.close)
        self._meter = meter
        self._watchdog = watchdog
        self._options = options
        self._cancel = cancel

    def _observe(self, stream: Stream) -> Iterator[Chunk]:
        limits = self._options.limits
        wire = 0
        for chunk in stream:
            self._cancel.check()
            self._watchdog.phase("the target took the data", limits.stall)
            length, size = chunk.length, len(chunk.data)
            yield chunk
            crossed = stream.wire_bytes + self.wire_bytes - wire  # the source's connection, or the target's
            wire += crossed
            self._meter.add(length, crossed)
            self._watchdog.phase("the rate limit held it back", limits.prepare)
            for pacer in self._options.pacers:
                pacer.wait(crossed or size, self._cancel)
            self._watchdog.phase("the source was read", limits.stall)
        self._watchdog.phase("the target made it durable", limits.prepare)


def _nobody_asks(_version: Version) -> None:
    """For who only wants it done."""


class Replication:
    """One run for one pair: plan, transfer step by step, try again where that may help.

    :param volumes: shared by those that run or plan together
    :param arrived: is told each version once the target has it complete; what follows of a run may take its time
    """

    def __init__(
        self,
        pair: Pair,
        options: Options,
        *,
        observer: Observer,
        cancel: Cancellation,
        volumes: Volumes | None = None,
        arrived: Callable[[Version], None] = _nobody_asks,
    ) -> None:
        self._pair = pair
        self._volumes = volumes or Volumes()
        self._held: set[tuple[str, VolumeId, str, str]] = set()
        self._released: set[tuple[str, VolumeId, str, str]] = set()
        self._options = options
        self._observer = observer
        self._cancel = cancel
        self._arrived = arrived
        self._asked: tuple[Property, ...] | None = None
        self.outcome = Outcome()

    def plan(
        self, listed: Listed | None = None, *, again: bool = False
    ) -> tuple[Plan | Conflict, VolumeState, VolumeState | None]:
        """List both sides and plan; changes nothing.

        :param listed: both sides, where they were listed just now
        :param again: a replica was not found where it was listed, which is looked at once more and not for ever
        :raises NoSuchVolume: the source volume does not exist
        :raises VolumeBusy: the target lists a replica that is not there
        """
        pair = self._pair
        source = listed[0].get() if listed is not None else pair.source.state(pair.source_volume)
        if source is None:
            raise NoSuchVolume(
                f"node {pair.source.node} has no volume {pair.source_volume}",
                hint="its replicas are kept; take it out of the job, or bring it back with `replicator restore`",
            )
        target = listed[1].get() if listed is not None else pair.target.state(pair.target_volume)
        here, there = (
            pair.source.storage(pair.source_volume.storage),
            pair.target.storage(pair.target_volume.storage),
        )
        renamed = None
        if target is None and Capability.RENAME in there.capabilities:
            renamed = find_replica(pair, source.lineage, self._volumes)
            target = pair.target.state(renamed) if renamed is not None else None
            if renamed is not None and target is None:  # it has moved since, perhaps to where it should be
                if again:
                    raise VolumeBusy(
                        f"{renamed} of node {pair.target.node} is listed, and is not there",
                        hint="it may be on its way to another name; the next attempt looks again",
                    )
                self._volumes.forget()
                return self.plan(again=True)
        route = Route.between(pair.source_volume, here, pair.target.node, there)
        origin = OriginThere()
        if Capability.ORIGINS in here.capabilities & there.capabilities:
            origin = find_origin(pair, source, target, self._options.policy, route, first=self._options.origin_first)
        found = plan(source, target, self._options.policy, route, origin.clone, origin_passed=origin.passed)
        if isinstance(found, Recreated) and Capability.RENAME in there.capabilities:
            found = replace(found, elsewhere=find_replica(pair, source.lineage, self._volumes))
        if isinstance(found, Plan) and target is not None and renamed is not None:
            note = f"the source was renamed: the replica {renamed} becomes {pair.target_volume}"
            found = replace(found, renamed=renamed, notes=(note, *found.notes))
        return found, source, target

    def run(self, listed: Listed | None = None) -> Outcome:
        """Bring the target to the source's newest version.

        :param listed: both sides, where they were listed just now; whatever is done looks at them again
        :raises ConflictError: the two sides cannot be reconciled without a decision
        :raises ReplicatorError: the last attempt's error; what was committed before it stays, see ``outcome``
        """
        while True:
            self.outcome.attempts += 1
            before = self.outcome.steps, self.outcome.done
            try:
                while not self._once(listed):
                    listed = None
            except ReplicatorError as error:
                listed = None
                if self._cancel.cancelled or not error.retryable:
                    raise
                moved = (self.outcome.steps, self.outcome.done) != before
                if self.outcome.attempts >= self._options.limits.attempts * (2 if moved else 1):
                    raise
                if self._cancel.wait(PAUSE_BETWEEN_ATTEMPTS):
                    raise
            else:
                return self.outcome

    def _once(self, listed: Listed | None) -> bool:
        """Plan and do its steps; whether the plan was done to its end (False: plan again)."""
        self._cancel.check()
        pair = self._pair
        self._held.clear()
        self._released.clear()
        found, source, target = self.plan(listed)
        lineage = source.lineage
        if lineage is None or lineage.role is not Role.PRIMARY:
            lineage = pair.source.ensure_primary(pair.source_volume)
            found, source, target = self.plan()
        if not isinstance(found, Plan):
            raise found.to_error()
        self.outcome.origins = origin_guids(source, self._options.policy)
        if found.waits_for is not None:
            raise _waits(pair, found.waits_for)
        if found.renamed is not None:
            pair.target.rename(found.renamed, pair.target_volume)
        if found.abort_partial:
            pair.target.abort_receive(pair.target_volume)
        newest = found.common.source if found.common else None
        for step in found.steps:
            try:
                committed = self._transfer(step, lineage)
            except StaleResume:
                self._discard_stale(step)
                raise
            self.outcome.steps += 1
            newest = step.to
            self._arrived(newest)
            self._settle(step, committed)
            if step.resume is not None:
                return False  # a resumed step finishes what was begun; only now is it known what else there is
        if newest is not None:
            self._tidy_holds(source, target, newest)
        self.outcome.newest = newest
        return True

    def _discard_stale(self, step: Step) -> None:
        """A plan only sees of a partial state what it continues. Where a storage then says that nothing does, the next
        attempt would find the same: unless the partial state has become another meanwhile, it has to go."""
        state = self._pair.target.state(self._pair.target_volume)
        if step.resume is not None and state is not None and state.resume == step.resume:
            self._pair.target.abort_receive(self._pair.target_volume)

    def put_back(self, step: Step, aside: str, prepare: Callable[[Lineage], None]) -> Version:
        """Send one step of a native stream that first puts the target back to the step's base.

        What the target has after that base is kept there as ``aside``; without a base, all that it has.

        :param prepare: gets the target ready to take the stream, whose lineage it is told; called once the source has
            begun to send: of one that cannot (a key is not loaded, a pool is suspended or damaged, a right is missing)
            the target learns nothing, and has its replica
        """
        lineage = primary_lineage(self._pair)
        committed = self._transfer(step, lineage, ReceiveMode.REBUILD, aside, prepare)
        self.outcome.steps += 1
        self._settle(step, committed)
        return committed

    def _transfer(
        self,
        step: Step,
        lineage: Lineage,
        mode: ReceiveMode = ReceiveMode.REPLICA,
        aside: str = "",
        prepare: Callable[[Lineage], None] | None = None,
    ) -> Version:
        """Send one step and return the target's new version."""
        pair, cancel = self._pair, self._cancel
        self._hold(pair.source, pair.source_volume, step.to)
        if step.clone is not None:
            origin = step.clone
            pair.source.hold(origin.source, origin.common.source.ref, clone_tag(pair.tag))
            pair.target.hold(origin.target, origin.common.target.ref, clone_tag(pair.tag))
        elif step.base is not None and step.base.kind is not step.base.kind.BOOKMARK:
            self._hold(pair.source, pair.source_volume, step.base)
        if step.target_base is not None and step.clone is None:
            self._hold(pair.target, pair.target_volume, step.target_base)
        key = new_key()
        send = SendRequest(
            pair.source_volume,
            step.base.ref if step.base else None,
            step.to.ref,
            key,
            lineage=lineage,
            intermediates=step.intermediates,
            resume=step.resume,
        )
        with cancel.child() as part:
            watchdog = Watchdog(part)
            with (
                watchdog.watching("the source prepared the stream", self._options.limits.prepare),
                pair.source.send(send, part) as opened,
            ):
                stream: Stream = opened
                if prepare is not None:
                    stream = BegunStream(opened)
                    prepare(lineage)
                receive = ReceiveRequest(
                    pair.target_volume,
                    lineage,
                    step.target_base.ref if step.target_base else None,
                    step.arriving,
                    key,
                    mode=mode,
                    kind=stream.kind,
                    hold=pair.tag,
                    resume=step.resume,
                    aside=aside,
                    origin=step.clone.target if step.clone is not None else None,
                    properties=self._properties(),
                    intermediates=step.intermediates,
                )
                done = step.resume.offset if step.resume and step.resume.kind is StreamKind.NATIVE else 0
                total = stream.estimate if stream.estimate is not None else step.estimate
                meter = Meter(pair, step.to.name, total=total, observer=self._observer, outcome=self.outcome)
                meter.progress = replace(meter.progress, done=done)
                with ObservedStream(stream, meter, watchdog, self._options, part) as chunks:
                    committed = pair.target.receive(receive, chunks, part)
                meter.finish()
        self._held.add((pair.target.node, pair.target_volume, committed.guid, pair.tag))
        return committed

    def _hold(self, endpoint: Endpoint, volume: VolumeId, version: Version) -> None:
        """Hold a version, unless it is known to be held."""
        tag = self._pair.tag
        mark = (endpoint.node, volume, version.guid, tag)
        if tag not in version.holds and mark not in self._held:
            endpoint.hold(volume, version.ref, tag)
            self._held.add(mark)

    def _release(self, endpoint: Endpoint, volume: VolumeId, version: Version, tag: str) -> None:
        """Release a version, unless that is done."""
        mark = (endpoint.node, volume, version.guid, tag)
        if mark not in self._released:
            endpoint.release(volume, version.ref, tag)
            self._released.add(mark)

    def _properties(self) -> tuple[Property, ...]:
        """The source's, for a target that may take them over; asked for once."""
        if self._asked is None:
            pair = self._pair
            capable = Capability.PROPERTIES in pair.target.storage(pair.target_volume.storage).capabilities
            self._asked = pair.source.properties(pair.source_volume) if capable else ()
        return self._asked

    def _settle(self, step: Step, committed: Version) -> None:
        """The new version is common and held on both sides: the old base's holds have done their work."""
        pair = self._pair
        if step.clone is not None:  # from now on its clones keep it from being destroyed
            pair.source.release(step.clone.source, step.clone.common.source.ref, clone_tag(pair.tag))
            pair.target.release(step.clone.target, step.clone.common.target.ref, clone_tag(pair.tag))
            return
        if step.base is not None and step.base.guid != committed.guid:
            self._release(pair.source, pair.source_volume, step.base, pair.tag)
        if step.target_base is not None and step.target_base.guid != committed.guid:
            self._release(pair.target, pair.target_volume, step.target_base, pair.tag)

    def _tidy_holds(self, source: VolumeState, target: VolumeState | None, newest: Version) -> None:
        """Release holds of ours that an earlier, interrupted run left; make sure the newest common version has one."""
        pair = self._pair
        for endpoint, volume, state in (
            (pair.source, pair.source_volume, source),
            (pair.target, pair.target_volume, target),
        ):
            if state is None:
                continue
            common = state.by_guid(newest.guid)
            if common is not None and common in state.snapshots:
                self._hold(endpoint, volume, common)
            stale = stale_holds(state, pair.tag, frozenset({newest.guid}))
            # Now that it has followed, it needs no more than the newest that both have; and who has yet to follow
            # needs nothing of a replica.
            changed = [rejoin_tag(pair.target.node)]
            if endpoint is pair.target:
                changed = [
                    handover_tag(pair.source.node),
                    *sorted({t for v in state.versions for t in v.holds if is_rejoin_tag(t)}),
                ]
            for work in (clone_tag(pair.tag), verify_tag(pair.tag), *changed):
                stale += stale_holds(state, work, frozenset())
            for version, tag in stale:
                self._release(endpoint, volume, version, tag)


def find_replica(pair: Pair, lineage: Lineage | None, volumes: Volumes | None = None) -> VolumeId | None:
    """A replica of that lineage on the target which has another name than it should: its source was renamed, or the
    job's ``replica_path`` changed. What a resync kept aside is not one.

    :param volumes: where they may be listed already
    """
    if lineage is None:
        return None
    for volume in (volumes or Volumes()).of(pair.target, pair.target_volume.storage):
        theirs = volume.lineage
        aside = f"-{DIVERGED_PREFIX}" in volume.id.name
        if aside or theirs is None or volume.id in (pair.target_volume, pair.source_volume):
            continue
        if (theirs.uuid, theirs.role) == (lineage.uuid, Role.REPLICA):
            return volume.id
    return None


def _waits(pair: Pair, origin: CloneBase) -> StorageError:
    """Sent in full instead, it would be a clone no more, for good."""
    return StorageError(
        f"{pair.source_volume} is a clone of {origin.source}@{origin.common.source.name}, which goes to "
        f"{pair.target_text} first and is not there yet",
        hint=f"the next run after that of {origin.source} sends the clone; see what keeps {origin.source}, or sync it",
    )
