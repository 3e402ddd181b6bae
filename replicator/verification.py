"""Verifies a replica of blocks, and makes one right again: only what differs crosses the network.

Storages of streams of their own are verified by ``native_verification.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum

from replicator.block_comparison import Compared, Comparison, merge
from replicator.cancellation import Cancellation
from replicator.endpoint import MAX_RANGES, Endpoint, Range, ReceiveMode, ReceiveRequest, SendRequest
from replicator.errors import NoSuchSnapshot, NoSuchVolume, Unsupported
from replicator.manifest_comparison import FileDifference
from replicator.model import (
    DIVERGED_PREFIX,
    StreamKind,
    Version,
    VersionRef,
    VolumeId,
    VolumeState,
    format_time,
    verify_tag,
)
from replicator.replication import Meter, ObservedStream, Observer, Options, Outcome, Pair, new_key, primary_lineage
from replicator.streams import Chunk, ChunkStream
from replicator.watchdog import Watchdog

MAX_REPORTED_RANGES = 1000
"""Differing ranges named in a report; their number and bytes are always exact."""
MAX_REPORTED_FILES = 1000
"""Differing entries of a filesystem named in a report; their number is always exact."""


class Method(StrEnum):
    """How two snapshots were compared."""

    BLOCKS = "blocks"
    """Every block of both was read."""
    FILES = "files"
    """Every file and folder of both was read."""
    SCRUB = "scrub"
    """Neither was read by us: their identities are equal, and the pools' own scrubs read them."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """What a verification found to differ and nothing has made right since; see ``mismatches.py``.

    :ivar snapshot: the source's name of what was compared; ``guid``: its identity, "" where an earlier version of this
        program found it
    :ivar differing: bytes, as in :class:`Verification`
    :ivar read: it was found by reading, so only reading can say that it is right
    :ivar mended: that snapshot is right since
    :ivar passed: what follows it is right since
    """

    snapshot: str
    differing: int
    guid: str = ""
    read: bool = True
    mended: bool = False
    passed: bool = False

    def is_of(self, snapshot: str, guid: str) -> bool:
        """Whether it is about that snapshot."""
        return self.guid == guid if self.guid and guid else self.snapshot == snapshot


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of comparing one snapshot on two sides.

    :ivar checked: bytes compared; 0 with ``Method.SCRUB``, which reads nothing here
    :ivar differing: bytes in blocks (and entries) that differ, as far as that is known in bytes; at least 1 where
        anything differs
    :ivar ranges: the first ``MAX_REPORTED_RANGES`` of them, merged; of a filesystem they are in ``files``
    :ivar range_count: how many there are
    :ivar repaired: whether they were mended afterwards
    :ivar aside: where the replaced data is kept, "" if nothing was
    :ivar entries: files and folders compared
    :ivar files: the first ``MAX_REPORTED_FILES`` entries that differ; ``file_count``: how many there are
    :ivar problems: what else is wrong, a sentence each
    :ivar notes: what to know beside that: why the data was not read, what it was that a scrub covered
    :ivar guid: of the snapshot
    :ivar standing: all that is known to differ after this verification, of this snapshot or of others, in the order in
        which it was found; only where it was looked after (``mending.py``)
    """

    volume: str
    target: str
    snapshot: str
    checked: int
    differing: int
    ranges: tuple[Range, ...]
    range_count: int
    repaired: bool = False
    aside: str = ""
    method: Method = Method.BLOCKS
    entries: int = 0
    files: tuple[FileDifference, ...] = ()
    file_count: int = 0
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    guid: str = ""
    standing: tuple[Mismatch, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether the two were equal when they were compared."""
        return self.differing == 0 and self.file_count == 0 and not self.problems


@contextmanager
def held(endpoint: Endpoint, volume: VolumeId, version: VersionRef, tag: str) -> Iterator[None]:
    endpoint.hold(volume, version, tag)
    try:
        yield
    finally:
        endpoint.release(volume, version, tag)


def both_states(pair: Pair) -> tuple[VolumeState, VolumeState]:
    """What both sides have. :raises NoSuchVolume: one of them is not there"""
    source, target = pair.source.state(pair.source_volume), pair.target.state(pair.target_volume)
    if source is None:
        raise NoSuchVolume(f"node {pair.source.node} has no volume {pair.source_volume}", hint="")
    if target is None:
        raise NoSuchVolume(f"{pair.target_text} has no replica of {pair.source_volume}", hint=_remedy(pair))
    return source, target


def _remedy(pair: Pair) -> str:
    return f"make the replica with `replicator resync {pair.source_volume} --target {pair.target_text}`"


def common_snapshot(pair: Pair, snapshot: str | None) -> tuple[Version, Version]:
    """The newest snapshot that both sides have (or the one named), as each side has it."""
    source, target = both_states(pair)
    theirs = {version.guid: version for version in target.snapshots}
    for version in reversed(source.snapshots):
        if version.guid in theirs and (snapshot is None or snapshot in (version.name, version.guid)):
            return version, theirs[version.guid]
    wanted = f"snapshot {snapshot!r}" if snapshot else "no snapshot"
    mine = source.find(snapshot) if snapshot else None
    other = target.find(snapshot) if snapshot else None
    if mine is not None and other is not None:
        wanted = f"{wanted} is not the same on both sides (guid {mine.guid} and {other.guid}): it"
    raise NoSuchSnapshot(
        f"{wanted} is {'not ' if snapshot else ''}on both sides of {pair.source_volume} and {pair.target_text}",
        hint=f"`replicator snapshots {pair.source_volume}` lists them; {_remedy(pair)}",
    )


def _check_kind(pair: Pair) -> None:
    for endpoint, volume in ((pair.source, pair.source_volume), (pair.target, pair.target_volume)):
        storage = endpoint.storage(volume.storage)
        if storage.stream is not StreamKind.BLOCKS:
            raise Unsupported(
                f"storage {storage.name} of node {endpoint.node} ({storage.kind}) does not take single blocks",
                hint="`replicator resync` puts a replica of such a storage back to what both sides have",
            )


def verify(
    pair: Pair, options: Options, *, observer: Observer, cancel: Cancellation, snapshot: str | None = None
) -> Verification:
    """Compare the newest common snapshot (or ``snapshot``) of both sides block by block, reading both in full.

    :raises NoSuchSnapshot: there is none in common, or not that one
    """
    _check_kind(pair)
    mine, theirs = common_snapshot(pair, snapshot)
    return compare_blocks(pair, mine, theirs, options, observer=observer, cancel=cancel)


def compare_blocks(
    pair: Pair, mine: Version, theirs: Version, options: Options, *, observer: Observer, cancel: Cancellation
) -> Verification:
    """Compare a snapshot of the source with one of the target block by block, holding both meanwhile."""
    tag = verify_tag(pair.tag)
    outcome = Outcome()
    meter = Meter(pair, f"verifying {mine.name}", total=mine.size, observer=observer, outcome=outcome)
    ranges: list[Range] = []
    counted = 0
    with (
        held(pair.source, pair.source_volume, mine.ref, tag),
        held(pair.target, pair.target_volume, theirs.ref, tag),
        cancel.child() as part,
    ):
        watchdog = Watchdog(part)
        comparison = Comparison(pair, mine, theirs, new_key(), part)
        with watchdog.watching("both sides were read", options.limits.stall):
            steps = comparison.run(watchdog, options.limits.stall)

            def found() -> Iterator[Range]:
                for step in steps:
                    meter.add(step.end - step.offset, 0)
                    yield from step.differing

            for item in merge(found()):
                counted += 1
                if len(ranges) < MAX_REPORTED_RANGES:
                    ranges.append(item)
    meter.finish()
    if theirs.size is not None and mine.size is not None and theirs.size > mine.size:
        counted += 1
        ranges.append(Range(mine.size, theirs.size - mine.size))
    return Verification(
        str(pair.source_volume),
        pair.target_text,
        mine.name,
        comparison.checked,
        comparison.differing,
        tuple(ranges),
        counted,
        problems=tuple(unreadable_problems(pair, comparison.unreadable_source, comparison.unreadable_target)),
        guid=mine.guid,
    )


def unreadable_problems(pair: Pair, source: int, target: int) -> Iterator[str]:
    """A sentence for each side that could not read so many bytes."""
    for node, volume, size in (
        (pair.source.node, pair.source_volume, source),
        (pair.target.node, pair.target_volume, target),
    ):
        if size:
            yield f"{size} bytes of {volume} on {node} cannot be read: its disks do not have what was written"


@dataclass(frozen=True, slots=True)
class Resync:
    """What a resync did.

    :ivar compared: bytes compared by digest, 0 where the target had nothing to compare with
    :ivar changed: bytes of blocks that were sent (or zeroed) because they differed
    :ivar sent: bytes that crossed the network
    :ivar aside: names under which the target's own data is kept
    :ivar made_equal: all data of the replica was compared with the source's or sent anew. If not, it continues from
        what both sides have, and nobody looked whether that is equal
    """

    volume: str
    target: str
    snapshot: str
    compared: int
    changed: int
    sent: int
    aside: tuple[str, ...]
    made_equal: bool = True


def aside_name(moment: datetime | None = None) -> str:
    """A name for data kept aside now."""
    return DIVERGED_PREFIX + format_time(moment or datetime.now(UTC))


def rebuild(
    pair: Pair,
    to: Version,
    reference: Version,
    options: Options,
    *,
    observer: Observer,
    cancel: Cancellation,
    aside: str,
) -> tuple[int, Outcome]:
    """Make ``to`` on the target out of ``reference`` (a version of the target) and the blocks that differ.

    Bytes compared, and what was sent. If the target has a version of that identity already, it is replaced in one
    step and kept as ``aside``.
    """
    key = new_key()
    tag = f"{pair.tag}:resync"
    outcome = Outcome()
    lineage = primary_lineage(pair)
    with (
        held(pair.source, pair.source_volume, to.ref, tag),
        held(pair.target, pair.target_volume, reference.ref, tag),
        cancel.child() as part,
    ):
        watchdog = Watchdog(part)
        comparison = Comparison(pair, to, reference, key, part)
        source_wire = 0

        def chunks() -> Iterator[Chunk]:
            nonlocal source_wire
            for window in _windows(comparison.run(watchdog, options.limits.stall)):
                request = SendRequest(pair.source_volume, None, to.ref, key, lineage=lineage, ranges=window)
                with pair.source.send(request, part) as stream:
                    for chunk in stream:
                        yield chunk
                        outer.wire_bytes += stream.wire_bytes - source_wire
                        source_wire = stream.wire_bytes
                source_wire = 0

        outer = ChunkStream(StreamKind.BLOCKS, chunks())
        receive = ReceiveRequest(
            pair.target_volume,
            lineage,
            reference.ref,
            to,
            key,
            mode=ReceiveMode.REBUILD,
            hold=pair.tag,
            aside=aside,
        )
        meter = Meter(pair, f"resync to {to.name}", total=None, observer=observer, outcome=outcome)
        with (
            watchdog.watching("both sides were read", options.limits.prepare),
            ObservedStream(outer, meter, watchdog, options, part) as stream,
        ):
            pair.target.receive(receive, stream, part)
        meter.finish()
    return comparison.checked, outcome


_WINDOW = 256 * 1024 * 1024
"""Bytes of differing blocks asked for in one request, at most."""


def _windows(steps: Iterator[Compared]) -> Iterator[tuple[Range, ...]]:
    """Differing ranges, gathered into requests that keep to the caps of :class:`SendRequest`."""
    window: list[Range] = []
    size = 0
    for item in merge(item for step in steps for item in step.differing):
        offset, left = item.offset, item.length
        while left:
            length = min(left, _WINDOW - size)
            window.append(Range(offset, length))
            size, offset, left = size + length, offset + length, left - length
            if size == _WINDOW or len(window) == MAX_RANGES:
                yield tuple(window)
                window, size = [], 0
    if window:
        yield tuple(window)


def repair(
    pair: Pair, found: Verification, options: Options, *, observer: Observer, cancel: Cancellation
) -> Verification:
    """Mend what :func:`verify` found: the snapshot is rebuilt from the source, the damaged one kept aside."""
    if found.equal:
        return found
    mine, theirs = common_snapshot(pair, found.snapshot)
    aside = aside_name()
    rebuild(pair, mine, theirs, options, observer=observer, cancel=cancel, aside=aside)
    return replace(found, repaired=True, aside=aside)


def _nearest(pair: Pair, target: VolumeState) -> Version | None:
    """The newest snapshot of the target that the source has too: the least should differ from it."""
    source = pair.source.state(pair.source_volume)
    known = {version.guid for version in source.versions} if source else set()
    return next((version for version in reversed(target.snapshots) if version.guid in known), None)


def resync(pair: Pair, to: Version, options: Options, *, observer: Observer, cancel: Cancellation) -> Resync:
    """Make the target's newest version equal ``to`` of the source, whatever happened to the target.

    The target's own live data and a damaged snapshot of the same identity are kept aside first; only blocks that
    differ cross the network. The caller has asked for consent. A target without any version gets a full send, with a
    :class:`~replicator.replication.Replication`, instead; so this needs an existing target volume.

    :raises NoSuchVolume, NoSuchSnapshot: the target has nothing to compare with
    """
    _check_kind(pair)
    lineage = primary_lineage(pair)
    aside = aside_name()
    kept = []
    own = pair.target.set_aside(pair.target_volume, aside)
    if own is not None:
        kept.append(own.name)
    pair.target.adopt(pair.target_volume, lineage)
    pair.target.abort_receive(pair.target_volume)
    state = pair.target.state(pair.target_volume)
    if state is None or not state.snapshots:
        raise NoSuchSnapshot(f"{pair.target_text} has no data of {pair.source_volume} to compare with", hint="")
    same = state.by_guid(to.guid)
    reference = same or _nearest(pair, state) or (state.by_guid(own.guid) if own else None) or state.snapshots[-1]
    replaced = aside + "-replaced" if own else aside
    compared, outcome = rebuild(pair, to, reference, options, observer=observer, cancel=cancel, aside=replaced)
    if same is not None:
        kept.append(replaced)
    return Resync(str(pair.source_volume), pair.target_text, to.name, compared, outcome.done, outcome.sent, tuple(kept))
