"""An endpoint that fails where a test says: faults are added by wrapping, production code knows nothing of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from replicator.cancellation import Cancellation
from replicator.endpoint import (
    DigestBatch,
    DigestRequest,
    Endpoint,
    Head,
    ManifestRequest,
    PruneOutcome,
    PruneRequest,
    ReceiveRequest,
    RemoveRequest,
    Scrub,
    ScrubRequest,
    SendRequest,
    SnapshotRequest,
    Taken,
    VolumeListing,
)
from replicator.model import Lineage, Property, StorageInfo, Version, VersionRef, VolumeId, VolumeInfo, VolumeState
from replicator.streams import Chunk, ChunkStream, Stream


class Crash(Exception):
    """The driving process dies here: nothing after it runs, nobody handles it."""


class Point(StrEnum):
    """Where a call can fail."""

    BEFORE = "before"
    """Nothing was done."""
    CUT = "cut"
    """In the middle of a stream."""
    AFTER = "after"
    """All of it was done, and nobody was told."""


@dataclass(slots=True)
class Fault:
    """One failure, once.

    :ivar call: the method's name
    :ivar nth: which call of it fails, from 0
    :ivar chunks: CUT: how many chunks pass before
    """

    call: str
    point: Point
    error: Exception
    nth: int = 0
    chunks: int = 0


class FaultyEndpoint:
    """Passes everything on to an endpoint, except what ``fault`` says."""

    def __init__(self, inner: Endpoint, fault: Fault | None = None) -> None:
        self._inner = inner
        self.fault = fault

    def _due(self, call: str, point: Point) -> bool:
        """Whether the fault is here and now. A fault that happened is over."""
        fault = self.fault
        if fault is None or fault.call != call or fault.point is not point:
            return False
        if fault.nth > 0:
            fault.nth -= 1
            return False
        return True

    def _fail(self, call: str, point: Point) -> None:
        if self._due(call, point):
            fault, self.fault = self.fault, None
            assert fault is not None
            raise fault.error

    @property
    def node(self) -> str:
        return self._inner.node

    def storages(self) -> tuple[StorageInfo, ...]:
        return self._inner.storages()

    def storage(self, name: str) -> StorageInfo:
        return self._inner.storage(name)

    def volumes(self, storage: str) -> tuple[VolumeInfo, ...]:
        return self._inner.volumes(storage)

    def state(self, volume: VolumeId) -> VolumeState | None:
        self._fail("state", Point.BEFORE)
        return self._inner.state(volume)

    def states(self, volumes: Sequence[VolumeId]) -> tuple[VolumeListing, ...]:
        self._fail("states", Point.BEFORE)
        return self._inner.states(volumes)

    def heads(self, volumes: Sequence[VolumeId]) -> tuple[Head, ...]:
        self._fail("heads", Point.BEFORE)
        return self._inner.heads(volumes)

    def ensure_primary(self, volume: VolumeId) -> Lineage:
        self._fail("ensure_primary", Point.BEFORE)
        lineage = self._inner.ensure_primary(volume)
        self._fail("ensure_primary", Point.AFTER)
        return lineage

    def snapshot(self, request: SnapshotRequest) -> tuple[Taken, ...]:
        self._fail("snapshot", Point.BEFORE)
        made = self._inner.snapshot(request)
        self._fail("snapshot", Point.AFTER)
        return made

    def hold(self, volume: VolumeId, version: VersionRef, tag: str) -> None:
        self._fail("hold", Point.BEFORE)
        self._inner.hold(volume, version, tag)
        self._fail("hold", Point.AFTER)

    def release(self, volume: VolumeId, version: VersionRef, tag: str) -> None:
        self._fail("release", Point.BEFORE)
        self._inner.release(volume, version, tag)
        self._fail("release", Point.AFTER)

    def estimate(
        self, volume: VolumeId, base: VersionRef | None, to: VersionRef, *, intermediates: bool = False
    ) -> int | None:
        return self._inner.estimate(volume, base, to, intermediates=intermediates)

    def send(self, request: SendRequest, cancel: Cancellation) -> Stream:
        self._fail("send", Point.BEFORE)
        return self._inner.send(request, cancel)

    def receive(self, request: ReceiveRequest, stream: Stream, cancel: Cancellation) -> Version:
        self._fail("receive", Point.BEFORE)
        made = self._inner.receive(request, ChunkStream(stream.kind, self._cut(stream)), cancel)
        self._fail("receive", Point.AFTER)
        return made

    def _cut(self, stream: Stream) -> Iterator[Chunk]:
        if not self._due("receive", Point.CUT):
            yield from stream
            return
        fault, self.fault = self.fault, None
        assert fault is not None
        for number, chunk in enumerate(stream):
            if number == fault.chunks:
                raise fault.error
            yield chunk
        raise fault.error

    def abort_receive(self, volume: VolumeId) -> None:
        self._fail("abort_receive", Point.BEFORE)
        self._inner.abort_receive(volume)
        self._fail("abort_receive", Point.AFTER)

    def digests(self, request: DigestRequest, cancel: Cancellation) -> Iterator[DigestBatch]:
        self._fail("digests", Point.BEFORE)
        return self._inner.digests(request, cancel)

    def manifest(self, request: ManifestRequest, cancel: Cancellation) -> Stream:
        self._fail("manifest", Point.BEFORE)
        return self._inner.manifest(request, cancel)

    def scrub(self, request: ScrubRequest) -> Scrub:
        self._fail("scrub", Point.BEFORE)
        return self._inner.scrub(request)

    def set_aside(self, volume: VolumeId, name: str) -> VersionRef | None:
        self._fail("set_aside", Point.BEFORE)
        kept = self._inner.set_aside(volume, name)
        self._fail("set_aside", Point.AFTER)
        return kept

    def adopt(self, volume: VolumeId, lineage: Lineage) -> None:
        self._fail("adopt", Point.BEFORE)
        self._inner.adopt(volume, lineage)
        self._fail("adopt", Point.AFTER)

    def rename(self, volume: VolumeId, new: VolumeId) -> None:
        self._fail("rename", Point.BEFORE)
        self._inner.rename(volume, new)
        self._fail("rename", Point.AFTER)

    def properties(self, volume: VolumeId) -> tuple[Property, ...]:
        return self._inner.properties(volume)

    def prune(self, request: PruneRequest) -> tuple[PruneOutcome, ...]:
        self._fail("prune", Point.BEFORE)
        return self._inner.prune(request)

    def remove(self, request: RemoveRequest) -> None:
        self._fail("remove", Point.BEFORE)
        self._inner.remove(request)
        self._fail("remove", Point.AFTER)

    def clone(self, volume: VolumeId, version: VersionRef, new: VolumeId) -> VolumeInfo:
        return self._inner.clone(volume, version, new)

    def close(self) -> None:
        self._inner.close()
