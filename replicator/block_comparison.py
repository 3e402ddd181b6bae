"""Compares two snapshots block by block, by digests that each side makes of what it reads.

What a diff said, what was sent before and what is in a cache plays no part. The key is fresh for each comparison, so
nobody who chooses a disk's contents can prepare blocks that look equal (see ``transport/checksum.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from replicator.cancellation import Cancellation
from replicator.endpoint import UNREADABLE_DIGEST, DigestBatch, DigestRequest, Endpoint, Range
from replicator.errors import ProtocolError
from replicator.model import Version, VolumeId
from replicator.prefetch import ahead
from replicator.replication import Pair
from replicator.streams import BLOCK_SIZE, DIGEST_SIZE
from replicator.watchdog import Watchdog


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
    """Ranges of blocks whose digests differ, or that a side cannot read. Equal stretches cost little."""
    unreadable = UNREADABLE_DIGEST in bytes(a)
    if a == b and not unreadable:
        return
    if not b:
        yield Range(offset, min(len(a) // DIGEST_SIZE * BLOCK_SIZE, size - offset))
        return
    step = 64 * DIGEST_SIZE
    for start in range(0, len(a), step):
        if not unreadable and a[start : start + step] == b[start : start + step]:
            continue
        for cut in range(start, min(start + step, len(a)), DIGEST_SIZE):
            mine = a[cut : cut + DIGEST_SIZE]
            if mine != b[cut : cut + DIGEST_SIZE] or mine == UNREADABLE_DIGEST:
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
        self.unreadable_source = 0
        self.unreadable_target = 0

    def _digests(self, endpoint: Endpoint, volume: VolumeId, version: Version) -> Callable[[], Iterator[DigestBatch]]:
        request = DigestRequest(volume, version.ref, self._key)
        return lambda: endpoint.digests(request, self._cancel)

    def _ours(self, batches: Iterator[DigestBatch]) -> Iterator[DigestBatch]:
        for batch in batches:
            self.unreadable_source += _unreadable(batch)
            yield batch

    def _theirs(self, batches: Iterator[DigestBatch]) -> Iterator[DigestBatch]:
        for batch in batches:
            self.unreadable_target += _unreadable(batch)
            yield batch

    def run(self, watchdog: Watchdog, stall: float) -> Iterator[Compared]:
        """Read both sides at the same time; yields as far as both are known."""
        pair = self._pair
        size = self._source.size or 0
        with (
            ahead(self._digests(pair.source, pair.source_volume, self._source), self._cancel) as left,
            ahead(self._digests(pair.target, pair.target_volume, self._target), self._cancel) as right,
        ):
            for step in compare_digests(self._ours(left), self._theirs(right), size):
                watchdog.phase("both sides were read", stall)
                self.checked += step.end - step.offset
                self.differing += sum(item.length for item in step.differing)
                yield step
        if self._target.size is not None and self._target.size > size:
            self.differing += self._target.size - size


def _unreadable(batch: DigestBatch) -> int:
    """Bytes that the storage could not read, as far as it says so."""
    if UNREADABLE_DIGEST not in batch.digests:
        return 0
    digests = batch.digests
    found = sum(digests[at : at + DIGEST_SIZE] == UNREADABLE_DIGEST for at in range(0, len(digests), DIGEST_SIZE))
    return found * batch.block_size
