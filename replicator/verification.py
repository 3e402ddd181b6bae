"""Compares two snapshots block by block, and makes a replica right again.

Both sides read their own snapshot and answer with keyed digests; what a diff said, what was sent before and what is in
a cache plays no part. The key is fresh for each comparison, so nobody who chooses a disk's contents can prepare
blocks that look equal (see ``transport/checksum.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from replicator.cancellation import Cancellation
from replicator.endpoint import (
    MAX_RANGES,
    DigestBatch,
    DigestRequest,
    Endpoint,
    Range,
    ReceiveMode,
    ReceiveRequest,
    SendRequest,
)
from replicator.errors import NoSuchSnapshot, NoSuchVolume, ProtocolError, Unsupported
from replicator.model import DIVERGED_PREFIX, StreamKind, Version, VersionRef, VolumeId, VolumeState, format_time
from replicator.prefetch import ahead
from replicator.replication import Meter, ObservedStream, Observer, Options, Outcome, Pair, new_key
from replicator.streams import BLOCK_SIZE, DIGEST_SIZE, Chunk, ChunkStream
from replicator.watchdog import Watchdog

MAX_REPORTED_RANGES = 1000
"""Differing ranges named in a report; their number and bytes are always exact."""


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of comparing one snapshot on two sides.

    :ivar checked: bytes compared
    :ivar differing: bytes in blocks that differ
    :ivar ranges: the first ``MAX_REPORTED_RANGES`` of them, merged
    :ivar range_count: how many there are
    :ivar repaired: whether they were mended afterwards
    :ivar aside: where the replaced data is kept, "" if nothing was
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

    @property
    def equal(self) -> bool:
        """Whether the two were equal when they were compared."""
        return self.differing == 0


def merge(ranges: Iterator[Range]) -> Iterator[Range]:
    """Adjacent ranges as one."""
    current: Range | None = None
    for item in ranges:
        if current is not None and current.end == item.offset:
            current = Range(current.offset, current.length + item.length)
            continue
        if current is not None:
            yield current
        current = item
    if current is not None:
        yield current


@dataclass(frozen=True, slots=True)
class Compared:
    """A step of a comparison: blocks from ``offset`` to ``end`` were compared, ``differing`` of them are not equal."""

    offset: int
    end: int
    differing: tuple[Range, ...]


def compare_digests(left: Iterator[DigestBatch], right: Iterator[DigestBatch], size: int) -> Iterator[Compared]:
    """Compare two digest sequences of volumes of the same block size, up to ``size`` bytes of the left one.

    Blocks that only the left has differ. Both must begin at offset 0 and have no gaps; the last block of the shorter
    one may be short, which makes it differ, as it must.

    :raises ProtocolError: batches out of order or of another block size
    """
    yield from _compare(_Digests(left), _Digests(right), size)


class _Digests:
    """A digest sequence that can be consumed in pieces of any number of blocks."""

    def __init__(self, batches: Iterator[DigestBatch]) -> None:
        self._batches = batches
        self._next = 0
        self._buffer = memoryview(b"")
        self.ended = False

    def fill(self) -> int:
        """Have at least one digest, or be at the end; how many are there now."""
        while not self._buffer and not self.ended:
            batch = next(self._batches, None)
            if batch is None:
                self.ended = True
                break
            if batch.block_size != BLOCK_SIZE or batch.offset != self._next or len(batch.digests) % DIGEST_SIZE:
                raise ProtocolError(
                    f"digests of {batch.block_size}-byte blocks at {batch.offset} came where blocks of {BLOCK_SIZE} "
                    f"at {self._next} were due",
                    hint="both nodes must run the same version",
                )
            self._buffer = memoryview(batch.digests)
            self._next += len(batch) * BLOCK_SIZE
        return len(self._buffer) // DIGEST_SIZE

    def take(self, blocks: int) -> memoryview:
        """The next ``blocks`` digests, which ``fill`` said are there."""
        cut = blocks * DIGEST_SIZE
        taken, self._buffer = self._buffer[:cut], self._buffer[cut:]
        return taken


def _compare(left: _Digests, right: _Digests, size: int) -> Iterator[Compared]:
    offset = 0
    while offset < size:
        mine = left.fill()
        if not mine:
            raise ProtocolError(
                f"the digests of the source end at {offset} of {size} bytes", hint="run it again; see the source's log"
            )
        theirs = right.fill()
        blocks = min(mine, theirs) if theirs else mine
        a, b = left.take(blocks), right.take(blocks) if theirs else memoryview(b"")
        end = min(offset + blocks * BLOCK_SIZE, size)
        yield Compared(offset, end, tuple(_differing(a, b, offset, size)))
        offset = end


def _differing(a: memoryview, b: memoryview, offset: int, size: int) -> Iterator[Range]:
    """Ranges of blocks whose digests differ. Halves what is equal or wholly unknown, so equal stretches cost little."""
    if a == b:
        return
    if not b:
        yield Range(offset, min(len(a) // DIGEST_SIZE * BLOCK_SIZE, size - offset))
        return
    step = 64 * DIGEST_SIZE
    for start in range(0, len(a), step):
        if a[start : start + step] == b[start : start + step]:
            continue
        for cut in range(start, min(start + step, len(a)), DIGEST_SIZE):
            if a[cut : cut + DIGEST_SIZE] != b[cut : cut + DIGEST_SIZE]:
                at = offset + cut // DIGEST_SIZE * BLOCK_SIZE
                yield Range(at, min(BLOCK_SIZE, size - at))


class Comparison:
    """Compares one version of the source with one of the target, over whatever endpoints they are on."""

    def __init__(self, pair: Pair, source: Version, target: Version, key: str, cancel: Cancellation) -> None:
        self._pair = pair
        self._source = source
        self._target = target
        self._key = key
        self._cancel = cancel
        self.checked = 0
        self.differing = 0

    def _digests(self, endpoint: Endpoint, volume: VolumeId, version: Version) -> Callable[[], Iterator[DigestBatch]]:
        request = DigestRequest(volume, version.ref, self._key)
        return lambda: endpoint.digests(request, self._cancel)

    def run(self, watchdog: Watchdog, stall: float) -> Iterator[Compared]:
        """Read both sides at the same time; yields as far as both are known."""
        pair = self._pair
        size = self._source.size or 0
        with (
            ahead(self._digests(pair.source, pair.source_volume, self._source), self._cancel) as left,
            ahead(self._digests(pair.target, pair.target_volume, self._target), self._cancel) as right,
        ):
            for step in compare_digests(left, right, size):
                watchdog.phase("both sides were read", stall)
                self.checked += step.end - step.offset
                self.differing += sum(item.length for item in step.differing)
                yield step
        if self._target.size is not None and self._target.size > size:
            self.differing += self._target.size - size


@contextmanager
def _held(endpoint: Endpoint, volume: VolumeId, version: VersionRef, tag: str) -> Iterator[None]:
    endpoint.hold(volume, version, tag)
    try:
        yield
    finally:
        endpoint.release(volume, version, tag)


def _newest_common(pair: Pair, snapshot: str | None) -> tuple[Version, Version]:
    """The newest snapshot that both sides have (or the one named), as each side has it."""
    source, target = pair.source.state(pair.source_volume), pair.target.state(pair.target_volume)
    if source is None:
        raise NoSuchVolume(f"node {pair.source.node} has no volume {pair.source_volume}", hint="")
    resync = f"make the replica with `replicator resync {pair.source_volume} --target {pair.target_text}`"
    if target is None:
        raise NoSuchVolume(f"{pair.target_text} has no replica of {pair.source_volume}", hint=resync)
    theirs = {version.guid: version for version in target.snapshots}
    for version in reversed(source.snapshots):
        if version.guid in theirs and (snapshot is None or snapshot in (version.name, version.guid)):
            return version, theirs[version.guid]
    wanted = f"snapshot {snapshot!r}" if snapshot else "no snapshot"
    raise NoSuchSnapshot(
        f"{wanted} is {'not ' if snapshot else ''}on both sides of {pair.source_volume} and {pair.target_text}",
        hint=f"`replicator snapshots {pair.source_volume}` lists them; {resync}",
    )


def _check_kind(pair: Pair) -> None:
    for endpoint, volume in ((pair.source, pair.source_volume), (pair.target, pair.target_volume)):
        storage = endpoint.storage(volume.storage)
        if storage.stream is not StreamKind.BLOCKS:
            raise Unsupported(
                f"storage {storage.name} of node {endpoint.node} ({storage.kind}) cannot be compared block by block",
                hint="use the storage's own verification",
            )


def verify(
    pair: Pair, options: Options, *, observer: Observer, cancel: Cancellation, snapshot: str | None = None
) -> Verification:
    """Compare the newest common snapshot (or ``snapshot``) of both sides, reading both in full.

    :raises NoSuchSnapshot: there is none in common, or not that one
    """
    _check_kind(pair)
    mine, theirs = _newest_common(pair, snapshot)
    tag = f"{pair.tag}:verify"
    outcome = Outcome()
    meter = Meter(pair, f"verifying {mine.name}", total=mine.size, observer=observer, outcome=outcome)
    ranges: list[Range] = []
    counted = 0
    with (
        _held(pair.source, pair.source_volume, mine.ref, tag),
        _held(pair.target, pair.target_volume, theirs.ref, tag),
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
    )


@dataclass(frozen=True, slots=True)
class Resync:
    """What a resync did.

    :ivar compared: bytes compared by digest, 0 where the target had nothing to compare with
    :ivar changed: bytes of blocks that were sent (or zeroed) because they differed
    :ivar sent: bytes that crossed the network
    :ivar aside: names under which the target's own data is kept
    """

    volume: str
    target: str
    snapshot: str
    compared: int
    changed: int
    sent: int
    aside: tuple[str, ...]


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
    lineage = pair.source.ensure_primary(pair.source_volume)
    with (
        _held(pair.source, pair.source_volume, to.ref, tag),
        _held(pair.target, pair.target_volume, reference.ref, tag),
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
    mine, theirs = _newest_common(pair, found.snapshot)
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
    lineage = pair.source.ensure_primary(pair.source_volume)
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
