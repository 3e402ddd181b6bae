"""Verifies a replica of a storage with streams of its own (ZFS), without trusting those streams.

Both sides read their own snapshot: volumes with blocks are compared by digests of their blocks, filesystems by
manifests of all that is in them. Where a side cannot read (a key that is not loaded, a user that may not mount), or
where that is asked for, the next best is taken, and named: the identities of the snapshots are equal, and the last
scrub of each pool has read every block of them and found no error. That says that each side has what it was given and
can still read it; it does not say that both were given the same. So a result always tells which way it came about.

In every case a snapshot of the target that has the name of one of the source but another identity is a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

from replicator.cancellation import Cancellation
from replicator.endpoint import (
    Endpoint,
    ManifestRequest,
    ReceiveMode,
    ReceiveRequest,
    Scrub,
    ScrubRequest,
    SendRequest,
)
from replicator.errors import NotReadable, StorageError, Unsupported
from replicator.manifest import records
from replicator.manifest_comparison import FileDifference, Tally, compare_manifests
from replicator.model import StreamKind, VerifyBy, Version, VolumeId, VolumeState, verify_tag
from replicator.prefetch import ahead
from replicator.replication import Meter, ObservedStream, Observer, Options, Outcome, Pair, new_key
from replicator.streams import NativeChunk
from replicator.verification import (
    MAX_REPORTED_FILES,
    Method,
    Verification,
    both_states,
    common_snapshot,
    compare_blocks,
    held,
    unreadable_problems,
)
from replicator.watchdog import Watchdog

SCRUB_POLL = 2.0
"""Seconds between two looks at a scrub that is under way."""
_MOST = 2**63 - 1
"""Bytes: what is counted of a hostile or absurd manifest ends here."""


def is_native(pair: Pair) -> bool:
    """Whether both sides have streams of their own."""
    ends = ((pair.source, pair.source_volume), (pair.target, pair.target_volume))
    return all(endpoint.storage(volume.storage).stream is StreamKind.NATIVE for endpoint, volume in ends)


def verify(
    pair: Pair,
    options: Options,
    *,
    observer: Observer,
    cancel: Cancellation,
    snapshot: str | None = None,
    by: VerifyBy = VerifyBy.AUTO,
    scrub_now: bool = False,
) -> Verification:
    """Compare the newest common snapshot (or ``snapshot``) of both sides.

    :param scrub_now: with ``VerifyBy.SCRUB``: scrub both pools now and wait for it
    :raises NoSuchSnapshot: there is none in common, or not that one
    :raises NotReadable: a side cannot read, and scrubs are not taken or cannot be asked for
    """
    source, target = both_states(pair)
    strangers = tuple(_strangers(pair, source, target))
    if by is VerifyBy.SCRUB:
        found = _by_scrub(pair, source, target, snapshot, observer=observer, cancel=cancel, start=scrub_now)
    else:
        mine, theirs = common_snapshot(pair, snapshot)
        try:
            found = _by_reading(pair, mine, theirs, options, observer=observer, cancel=cancel)
        except NotReadable as error:
            if by is VerifyBy.READING:
                raise
            found = _instead(pair, source, target, snapshot, error, observer=observer, cancel=cancel)
    if not strangers:
        return found
    return replace(found, problems=(*strangers, *found.problems), differing=max(1, found.differing))


def _strangers(pair: Pair, source: VolumeState, target: VolumeState) -> Iterator[str]:
    """Snapshots of the target that are called like one of the source, and are another."""
    known = {version.name: version for version in source.snapshots}
    for version in target.snapshots:
        other = known.get(version.name)
        if other is not None and other.guid != version.guid:
            yield (
                f"snapshot {version.name} of {pair.target_volume} on {pair.target.node} is not the source's: its guid "
                f"is {version.guid}, not {other.guid}; it was made there, by somebody else"
            )


# -- by reading


def _by_reading(
    pair: Pair, mine: Version, theirs: Version, options: Options, *, observer: Observer, cancel: Cancellation
) -> Verification:
    if mine.size is not None:
        return compare_blocks(pair, mine, theirs, options, observer=observer, cancel=cancel)
    return _compare_files(pair, mine, theirs, options, observer=observer, cancel=cancel)


def _compare_files(
    pair: Pair, mine: Version, theirs: Version, options: Options, *, observer: Observer, cancel: Cancellation
) -> Verification:
    key, tag = new_key(), verify_tag(pair.tag)
    tally = Tally()
    files: list[FileDifference] = []
    count = differing = 0
    with ExitStack() as stack:
        stack.enter_context(held(pair.source, pair.source_volume, mine.ref, tag))
        stack.enter_context(held(pair.target, pair.target_volume, theirs.ref, tag))
        part = stack.enter_context(cancel.child())
        watchdog = Watchdog(part)
        stack.enter_context(watchdog.watching("both sides were read", options.limits.stall))
        meter = Meter(pair, f"verifying {mine.name}", total=None, observer=observer, outcome=Outcome())
        ours = _manifest(pair.source, ManifestRequest(pair.source_volume, mine.ref, key), part)
        other = _manifest(pair.target, ManifestRequest(pair.target_volume, theirs.ref, key), part)
        left = records(stack.enter_context(ahead(ours, part)))
        right = records(stack.enter_context(ahead(other, part)))
        told = 0
        for found in compare_manifests(left, right, tally):
            watchdog.touch()
            meter.add(tally.checked - told, 0)
            told = tally.checked
            if found is not None:
                count += 1
                differing += found.differing
                if len(files) < MAX_REPORTED_FILES:
                    files.append(found)
    meter.finish()
    notes: tuple[str, ...] = ()
    if tally.holes:
        notes = (f"{tally.holes} files are stored with other holes than at the source; their content is the same",)
    return Verification(
        str(pair.source_volume),
        pair.target_text,
        mine.name,
        min(tally.checked, _MOST),
        min(differing, _MOST),
        (),
        0,
        method=Method.FILES,
        entries=tally.entries,
        files=tuple(files),
        file_count=count,
        problems=tuple(unreadable_problems(pair, tally.unreadable_source, tally.unreadable_target)),
        notes=notes,
        guid=mine.guid,
    )


def _manifest(
    endpoint: Endpoint, request: ManifestRequest, cancel: Cancellation
) -> Callable[[], Iterator[NativeChunk]]:
    def chunks() -> Iterator[NativeChunk]:
        with endpoint.manifest(request, cancel) as stream:
            for chunk in stream:
                copy = bytes(chunk.data)  # its buffer is needed for what comes
                chunk.release()
                yield NativeChunk(copy)

    return chunks


# -- by identity and scrub


def _instead(
    pair: Pair,
    source: VolumeState,
    target: VolumeState,
    snapshot: str | None,
    error: NotReadable,
    *,
    observer: Observer,
    cancel: Cancellation,
) -> Verification:
    try:
        found = _by_scrub(pair, source, target, snapshot, observer=observer, cancel=cancel, start=False)
    except StorageError as second:
        raise NotReadable(
            f"{error}; and the pools' scrubs do not stand in for that: {second}", hint=f"{error.hint}; or {second.hint}"
        ) from error
    return replace(found, notes=(str(error), *found.notes))


@dataclass(frozen=True, slots=True)
class _Side:
    endpoint: Endpoint
    volume: VolumeId
    versions: dict[str, Version]

    def looked(self, start: bool = False) -> Scrub:
        return self.endpoint.scrub(ScrubRequest(self.volume, start))

    def named(self, scrub: Scrub) -> str:
        return f"pool {scrub.pool} of {self.endpoint.node}"


def _by_scrub(
    pair: Pair,
    source: VolumeState,
    target: VolumeState,
    snapshot: str | None,
    *,
    observer: Observer,
    cancel: Cancellation,
    start: bool,
) -> Verification:
    sides = tuple(
        _Side(endpoint, volume, {v.guid: v for v in state.snapshots})
        for endpoint, volume, state in (
            (pair.source, pair.source_volume, source),
            (pair.target, pair.target_volume, target),
        )
    )
    common, _ = common_snapshot(pair, snapshot)
    if start:
        for side in sides:
            _scrub(pair, side, common.guid, observer=observer, cancel=cancel)
    scrubs = [side.looked() for side in sides]
    for side, scrub in zip(sides, scrubs, strict=True):
        if scrub.finished is None or scrub.position is None:
            raise StorageError(
                f"{side.named(scrub)} has no complete scrub in its history",
                hint="`replicator verify VOLUME --scrub` scrubs both pools and waits",
            )
    covered = _covered(sides, scrubs, source, snapshot)
    if covered is None:
        at = " and ".join(
            f"that of {side.named(scrub)} of {_time(scrub)}" for side, scrub in zip(sides, scrubs, strict=True)
        )
        raise StorageError(
            f"no scrub has read {snapshot or 'a common snapshot'} of {pair.source_volume} on both sides: "
            f"{at} began before",
            hint="`replicator verify VOLUME --scrub` scrubs both pools and waits",
        )
    problems = [problem for side, scrub in zip(sides, scrubs, strict=True) for problem in _damage(side, scrub)]
    return Verification(
        str(pair.source_volume),
        pair.target_text,
        covered.name,
        0,
        len(problems),
        (),
        0,
        method=Method.SCRUB,
        problems=tuple(problems),
        notes=tuple(_told(side, scrub) for side, scrub in zip(sides, scrubs, strict=True)),
        guid=covered.guid,
    )


def _covered(
    sides: tuple[_Side, ...], scrubs: list[Scrub], source: VolumeState, snapshot: str | None
) -> Version | None:
    """The newest common snapshot (or the one named) that was there on each side when its scrub began."""
    for version in reversed(source.snapshots):
        if snapshot is not None and snapshot not in (version.name, version.guid):
            continue
        own = [side.versions.get(version.guid) for side in sides]
        if all(
            v is not None and scrub.position is not None and v.position <= scrub.position
            for v, scrub in zip(own, scrubs, strict=True)
        ):
            return version
    return None


def _scrub(pair: Pair, side: _Side, guid: str, *, observer: Observer, cancel: Cancellation) -> None:
    """Have a scrub of the side's pool that has read a snapshot; wait for it with progress."""
    wanted = side.versions[guid].position
    state = side.looked(start=True)
    meter = Meter(pair, f"scrubbing {side.named(state)}", total=state.total, observer=observer, outcome=Outcome())
    done = 0
    again = False
    while True:
        cancel.check()
        if not state.running:
            if state.position is not None and state.position >= wanted:
                break
            if again:  # one that was running before has ended, and this one was stopped
                raise StorageError(
                    f"the scrub of {side.named(state)} was stopped",
                    hint="`zpool status` and `zpool history -i` say why",
                )
            again = True
            state = side.looked(start=True)
            continue
        meter.add(max(0, state.done - done), 0)
        done = max(done, state.done)
        cancel.wait(SCRUB_POLL)
        state = side.looked()
    meter.finish()


def _damage(side: _Side, scrub: Scrub) -> Iterator[str]:
    for name in scrub.damaged:
        yield f"{side.named(scrub)} says that {name} is damaged"
    if scrub.errors and not scrub.damaged and not scrub.damaged_elsewhere:
        yield f"the scrub of {side.named(scrub)} of {_time(scrub)} found {scrub.errors} errors"


def _told(side: _Side, scrub: Scrub) -> str:
    elsewhere = f"; {scrub.damaged_elsewhere} damaged things elsewhere in it" if scrub.damaged_elsewhere else ""
    return f"{side.named(scrub)}: scrubbed until {_time(scrub)}, {scrub.errors} errors{elsewhere}"


def _time(scrub: Scrub) -> str:
    return scrub.finished.strftime("%Y-%m-%d %H:%M UTC") if scrub.finished is not None else "no time"


# -- mending


def repair(
    pair: Pair,
    found: Verification,
    options: Options,
    *,
    observer: Observer,
    cancel: Cancellation,
    renew: Callable[[], object],
) -> Verification:
    """Heal the snapshot that :func:`verify` found wrong with the source's data, and verify again.

    Healing replaces blocks that the target cannot read any more, and nothing else: content that is readable and
    different stays, and the result says so. What is verified is the next snapshot, which has the healed blocks as well:
    OpenZFS marks the healed one so that it can be sent, but not be mounted or cloned.

    :param renew: takes a new snapshot and brings it to the target

    :raises Unsupported: the target's storage cannot heal
    :raises DamagedData: the source cannot be read itself
    """
    if found.equal:
        return found
    mine, theirs = common_snapshot(pair, found.snapshot)
    key, tag = new_key(), verify_tag(pair.tag)
    outcome = Outcome()
    lineage = pair.source.ensure_primary(pair.source_volume)
    with (
        held(pair.source, pair.source_volume, mine.ref, tag),
        held(pair.target, pair.target_volume, theirs.ref, tag),
        cancel.child() as part,
    ):
        watchdog = Watchdog(part)
        send = SendRequest(pair.source_volume, None, mine.ref, key, lineage=lineage)
        receive = ReceiveRequest(
            pair.target_volume, lineage, None, theirs, key, mode=ReceiveMode.HEAL, kind=StreamKind.NATIVE
        )
        with watchdog.watching("the source was read", options.limits.prepare), pair.source.send(send, part) as inner:
            meter = Meter(pair, f"healing {mine.name}", total=inner.estimate, observer=observer, outcome=outcome)
            with ObservedStream(inner, meter, watchdog, options, part) as stream:
                try:
                    pair.target.receive(receive, stream, part)
                except Unsupported as error:
                    hint = f"{_send_anew(pair)}; or {error.hint}" if error.hint else _send_anew(pair)
                    raise Unsupported(error.message, hint=hint) from error
            meter.finish()
    renew()
    scrub = found.method is Method.SCRUB
    by = VerifyBy.SCRUB if scrub else VerifyBy.READING
    again = verify(pair, options, observer=observer, cancel=cancel, by=by, scrub_now=scrub)
    if again.equal:
        healed = (
            f"healed; {again.snapshot}, which was taken afterwards, was verified in the same way and is equal",
            f"OpenZFS lets {theirs.name} on {pair.target.node} only be sent now: restore from a newer snapshot",
        )
        return replace(found, repaired=True, notes=(*again.notes, *healed))
    return replace(
        again,
        notes=(
            *again.notes,
            f"healing was tried and did not help: {_send_anew(pair)}",
        ),
    )


def _send_anew(pair: Pair) -> str:
    """The way out where nothing can be mended in its place."""
    return (
        f"`replicator resync {pair.source_volume} --target {pair.target_text} --full` keeps the whole replica aside "
        "there as …-diverged-<time> and sends everything anew; it says what that costs, and asks"
    )
