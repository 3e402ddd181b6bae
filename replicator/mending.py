"""Verifies, mends and resyncs one replica of a job, and says beforehand what that changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol, TypeGuard

from replicator import mismatches, native_verification, verification
from replicator.cancellation import Cancellation
from replicator.control import Listener, Note
from replicator.errors import NoSuchSnapshot, ReplicatorError, Unsupported
from replicator.model import Capability, Progress, Role, StreamKind, VerifyBy, Version, VolumeId, VolumeState
from replicator.planning import newest_common
from replicator.rejoining import Manner, manner, rejoin, sent_whole
from replicator.replication import Observer, Pair, Replication, find_replica
from replicator.runs import Runner
from replicator.tasks import Task
from replicator.tracker import ReplicaKey
from replicator.units import format_size
from replicator.verification import Mismatch, Resync, Verification


class Results(Protocol):
    """Who remembers what came of it (see ``replicator.history``)."""

    def verified(self, result: Verification, job: str) -> None:
        """A verification ended."""

    def resynced(self, result: Resync, job: str) -> None:
        """A resync ended."""

    def known(self, key: ReplicaKey, differing: tuple[Mismatch, ...]) -> None:
        """From now on this is all that is known to differ in a replica."""


class Mender:
    """Works on one task at a time, each with the replica to itself."""

    def __init__(self, runner: Runner, results: Results) -> None:
        self._runner = runner
        self._results = results

    def effects(self, task: Task, full: bool = False) -> Iterator[str]:
        """What a resync would change, a sentence each."""
        pair = task.pair
        where = f"{pair.target.node}/{pair.target_volume}"
        source, state = pair.source.state(pair.source_volume), pair.target.state(pair.target_volume)
        yield f"a new snapshot of {task.key.volume} is taken, and the replica is brought to it"
        renamed = _renamed(pair, source) if state is None else None
        if renamed is not None:
            yield f"the replica {renamed} becomes {where}"
            state = pair.target.state(renamed)
        if not _has_something(state):
            yield f"{where} has nothing yet: everything is sent{_cost(task)}"
            return
        if pair.target.storage(pair.target_volume.storage).stream is StreamKind.NATIVE:
            how = manner(pair, source, state, full=full, known=self._known(task))
            yield from _native_effects(where, source, state, how, _cost(task))
        else:
            yield f"only blocks that differ from what is in {where} are sent"
            yield from self._left_as_it_is(task, source, state)
        lineage = source.lineage if source is not None else None
        if state.head_changed and pair.target.storage(pair.target_volume.storage).stream is StreamKind.BLOCKS:
            yield f"live data of {where} is moved into a snapshot diverged-<time> there; it stops being writable"
        if state.lineage is None or lineage is None or state.lineage.uuid != lineage.uuid:
            yield f"{where} becomes a replica of {task.key.volume}; it is not one now"
        elif state.lineage.role is not Role.REPLICA:
            yield f"{where} is a primary of its own now; it becomes a replica again"
        if state.resume is not None:
            yield f"the half-received {state.resume.to_name} is discarded"
        yield "no snapshot of the target is destroyed"

    def _known(self, task: Task) -> tuple[Mismatch, ...]:
        """What the replica is known to differ in."""
        return self._runner.tracker.get(task.key).mismatches or ()

    def _left_as_it_is(self, task: Task, source: VolumeState | None, target: VolumeState) -> Iterator[str]:
        """What differs in older snapshots, which a comparison with a new one does not mend, and no alarm tells of
        afterwards."""
        for known in self._known(task):
            there = next((v for v in target.snapshots if known.is_of(v.name, v.guid)), None)
            if there is None or known.mended:
                continue
            way = f"restore nothing from it: {task.key.volume} has it no more, so nothing can mend it"
            if source is not None and source.by_guid(there.guid) in source.snapshots:
                way = (
                    f"`replicator verify {task.key.volume} --target {task.key.target} --snapshot {known.snapshot} "
                    "--repair` mends it"
                )
            yield f"the older snapshot {there.name} stays as it is, and differs; {way}"

    def resync(self, task: Task, full: bool, listen: Listener, cancel: Cancellation) -> Resync:
        """Bring the replica to a new snapshot of its source, keeping what only it has.

        :param full: of a native storage: send everything anew, also where that is not known to be necessary
        """
        pair, options = task.pair, self._runner.options(task)
        with self._runner.turns.exclusive(task, cancel):
            at = pair.source if task.reversed else None
            failed = self._runner.snapshots.take(task.job, (pair.source_volume,), cancel, at=at)
            if pair.source_volume in failed:
                raise failed[pair.source_volume]
            source, state = pair.source.state(pair.source_volume), pair.target.state(pair.target_volume)
            renamed = _renamed(pair, source) if state is None else None
            if renamed is not None:  # first of all, or it would be continued from there as it is
                pair.target.rename(renamed, pair.target_volume)
                state = pair.target.state(pair.target_volume)
            observer = _progress_to(listen, task)
            if not _has_something(state):
                result = self._full(task, state, observer, cancel)
            else:
                to = self._newest(task)
                if pair.target.storage(pair.target_volume.storage).stream is StreamKind.NATIVE:
                    how = manner(pair, source, state, full=full, known=self._known(task))
                    result = rejoin(pair, to, options, observer=observer, cancel=cancel, anew=bool(how.why_all))
                    result = replace(result, made_equal=result.made_equal or how.made_anew)
                else:
                    result = self._compared(task, to, listen, cancel)
        survey = self._runner.surveys.of(task)
        if survey.error is None:
            self._runner.healed(task, made_equal=result.made_equal)
        if result.made_equal:
            self._remember(task, ())
        self._results.resynced(result, task.job.name)
        listen(result)
        return result

    def _compared(self, task: Task, to: Version, listen: Listener, cancel: Cancellation) -> Resync:
        """Mend a replica by the blocks that differ."""
        pair, options, observer = task.pair, self._runner.options(task), _progress_to(listen, task)
        listen(Note(f"comparing {task.key.volume} with {task.key.target}"))
        result = verification.resync(pair, to, options, observer=observer, cancel=cancel)
        # Whatever is newer by now, and the holds of the runs before, are an ordinary run's work.
        Replication(pair, options, observer=observer, cancel=cancel).run()
        return result

    def _full(self, task: Task, state: VolumeState | None, observer: Observer, cancel: Cancellation) -> Resync:
        """Nothing to compare with: an ordinary first replication."""
        pair = task.pair
        if state is not None:
            pair.target.adopt(pair.target_volume, pair.source.ensure_primary(pair.source_volume))
        replication = Replication(pair, self._runner.options(task), observer=observer, cancel=cancel)
        outcome = replication.run()
        name = outcome.newest.name if outcome.newest else ""
        return Resync(
            str(pair.source_volume), pair.target_text, name, 0, outcome.done, outcome.sent, (), sent_whole(pair)
        )

    def _newest(self, task: Task) -> Version:
        state = task.pair.source.state(task.pair.source_volume)
        mine = [v for v in state.snapshots if v.job == task.job.name] if state else []
        if not mine:
            raise NoSuchSnapshot(f"{task.key.volume} has no snapshot of job {task.job.name}", hint="sync it first")
        return max(mine, key=lambda v: v.position)

    def verify(
        self,
        task: Task,
        snapshot: str | None,
        repair: bool,
        listen: Listener,
        cancel: Cancellation,
        *,
        scrub: bool = False,
    ) -> Verification:
        """Compare the replica with its source, and mend it if asked to. What differs is remembered until something
        ends it; see ``mismatches.py``."""
        pair, options, observer = task.pair, self._runner.options(task), _progress_to(listen, task)
        with self._runner.turns.exclusive(task, cancel):
            native = native_verification.is_native(pair)
            if native:
                found = native_verification.verify(
                    pair, options, observer=observer, cancel=cancel, snapshot=snapshot,
                    by=VerifyBy.SCRUB if scrub else task.job.verify_by, scrub_now=scrub,
                )  # fmt: skip
            elif scrub:
                raise Unsupported(
                    f"{task.key.volume} is not in a pool that can be scrubbed",
                    hint="its blocks are read and compared: `replicator verify` without --scrub",
                )
            else:
                found = verification.verify(pair, options, observer=observer, cancel=cancel, snapshot=snapshot)
            found = self._settled(task, found)
            if repair and not found.equal:
                listen(Note(f"mending {found.snapshot} of {task.key.volume} on {task.key.target}"))
                try:
                    if native:
                        mended = native_verification.repair(
                            pair, found, options, observer=observer, cancel=cancel,
                            renew=lambda: self._renew(task, observer, cancel),
                        )  # fmt: skip
                    else:
                        mended = verification.repair(pair, found, options, observer=observer, cancel=cancel)
                except ReplicatorError:
                    self._results.verified(found, task.job.name)  # what was found stays found
                    raise
                # what ZFS healed counts only with the newest snapshot, which was verified afterwards
                found = self._settled(task, mended, newest=native and mended.repaired)
        self._results.verified(found, task.job.name)
        listen(found)
        return found

    def _settled(self, task: Task, found: Verification, *, newest: bool = False) -> Verification:
        """The result with all that is known to differ now, which is remembered."""
        pair = task.pair
        try:
            sides = pair.source.state(pair.source_volume), pair.target.state(pair.target_volume)
        except ReplicatorError:  # what cannot be looked at ends nothing
            sides = None, None
        known = mismatches.settle(self._known(task), found, *sides, newest=newest)
        self._remember(task, known)
        return replace(found, standing=known)

    def _remember(self, task: Task, known: tuple[Mismatch, ...]) -> None:
        self._runner.tracker.recall(task.key, mismatches=known)
        self._results.known(task.key, known)

    def _renew(self, task: Task, observer: Observer, cancel: Cancellation) -> None:
        """Take a snapshot and bring it over, in a task that is ours already."""
        pair = task.pair
        at = pair.source if task.reversed else None
        failed = self._runner.snapshots.take(task.job, (pair.source_volume,), cancel, at=at)
        if pair.source_volume in failed:
            raise failed[pair.source_volume]
        Replication(pair, self._runner.options(task), observer=observer, cancel=cancel).run()


def _cost(task: Task) -> str:
    """What a copy of all of the source takes, as far as it is known: `` (about 3.2 GiB; 10 GiB are free there)``."""
    pair = task.pair
    source = pair.source.state(pair.source_volume)
    newest = source.snapshots[-1] if source is not None and source.snapshots else None
    size = pair.source.estimate(pair.source_volume, None, newest.ref) if newest is not None else None
    free = pair.target.storage(pair.target_volume.storage).free
    if size is None:
        return f" ({format_size(free)} are free there)"
    short = "" if size <= free else ", which is too little"
    return f" (about {format_size(size)}; {format_size(free)} are free there{short})"


def _has_something(state: VolumeState | None) -> TypeGuard[VolumeState]:
    """Whether a target has anything beside what a first copy that was cut off left."""
    return state is not None and bool(state.versions or state.head_changed)


def _renamed(pair: Pair, source: VolumeState | None) -> VolumeId | None:
    """Where the replica is, if it is not where it should be."""
    there = pair.target.storage(pair.target_volume.storage)
    return find_replica(pair, source.lineage) if source and Capability.RENAME in there.capabilities else None


def _native_effects(
    where: str, source: VolumeState | None, target: VolumeState, how: Manner, cost: str
) -> Iterator[str]:
    common = newest_common(source, target) if source is not None else None
    if how.why_all or common is None:
        yield (
            f"{how.why_all}: all of {where} is kept aside as {where}-diverged-<time>, and everything is sent anew{cost}"
        )
        return
    newer = [v.name for v in target.snapshots if v.position > common.target.position]
    if newer or target.head_changed:
        yield f"{where} is put back to {common.target.name}; what it has after that is kept as {where}-diverged-<time>"
    yield f"what changed since {common.target.name} is sent"
    yield "nobody looks whether what both have is equal: `replicator verify` does; with --full everything is sent anew"


def _progress_to(listen: Listener, task: Task) -> Observer:
    def observe(progress: Progress) -> None:
        listen(replace(progress, volume=task.key.volume))

    return observe
