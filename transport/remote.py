"""Another node as an :class:`~replicator.endpoint.Endpoint`, over connections to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from replicator.cancellation import Cancellation
from replicator.endpoint import (
    DigestBatch,
    DigestRequest,
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
from replicator.errors import Cancelled, ConnectionLost, ProtocolError, RemoteError, ReplicatorError
from replicator.model import Lineage, Property, StorageInfo, Version, VersionRef, VolumeId, VolumeInfo, VolumeState
from replicator.streams import ChunkStream, Stream
from transport import messages
from transport.compression import AdaptiveCompressor
from transport.connection import Connection
from transport.frames import Frame, FrameType
from transport.messages import MAX_VOLUMES, RESPONSE_CAP, Request, StatesPart, StreamOpened
from transport.payloads import STATES, Link
from transport.pool import Pool
from transport.wirestream import StreamBinding, StreamReceiver, StreamSender


@dataclass(slots=True)
class _Call:
    """A request under way: its connection, its stream number, its bytes, and the first frame of the answer."""

    connection: Connection
    stream: int
    raw: bytes
    first: Frame

    def answer(self, kind: Any) -> Any:
        """The whole answer, from the first frame on."""
        data = self.connection.join_message(self.first, FrameType.RESPONSE, self.stream, RESPONSE_CAP)
        return messages.decode_answer(kind, data)


class RemoteEndpoint:
    """A peer's storages.

    :param pool: connections to it
    :param rate_limit: bytes per second that the caller holds streams to, for deciding about compression; None: none
    :param compress: whether streams may be compressed at all
    """

    def __init__(
        self,
        node: str,
        pool: Pool,
        *,
        rate_limit: Callable[[], float | None] = lambda: None,
        compress: bool = True,
    ) -> None:
        self._node = node
        self._pool = pool
        self._rate_limit = rate_limit
        self._compress = compress

    @property
    def node(self) -> str:
        """The peer's name."""
        return self._node

    def link(self) -> Link | None:
        """Round trip and clock difference, None before the first heartbeat."""
        return self._pool.link

    # -- requests

    def _begin(self, request: Request, cancel: Cancellation, stack: ExitStack) -> _Call:
        """Send a request and wait for the answer to begin.

        A connection from the pool may have ended unnoticed; requests are idempotent, so a fresh one is tried once.
        ``stack`` gives the connection back: to the pool, or, after an error, to nobody.
        """
        raw = messages.encode_request(request)
        connection, used = self._pool.take()
        try:
            return self._ask(connection, raw, cancel, stack)
        except ConnectionLost:
            if not used or cancel.cancelled:
                raise
        connection, _ = self._pool.take(fresh=True)
        return self._ask(connection, raw, cancel, stack)

    def _ask(self, connection: Connection, raw: bytes, cancel: Cancellation, stack: ExitStack) -> _Call:
        with ExitStack() as opened:
            opened.enter_context(self._borrowed(connection, cancel))
            stream = connection.next_stream()
            connection.send_message(FrameType.REQUEST, raw, stream=stream)
            call = _Call(connection, stream, raw, connection.receive(connection.deadlines.answer))
            stack.push(opened.pop_all())
        return call

    @contextmanager
    def _borrowed(self, connection: Connection, cancel: Cancellation) -> Iterator[None]:
        def stop() -> None:
            connection.abort(cancel.error or Cancelled("stopped on request", hint="the next run continues from here"))

        try:
            with cancel.unblock(stop):
                yield
        except GeneratorExit:
            self._pool.drop(connection)
            raise
        except ReplicatorError as error:
            self._pool.drop(connection, error)
            raise
        except BaseException:
            self._pool.drop(connection, RemoteError("the other node failed; see its log", hint=""))
            raise
        self._pool.give(connection)

    def _call(self, request: Request) -> Any:
        with ExitStack() as stack:
            return self._begin(request, Cancellation(), stack).answer(messages.ANSWERS[type(request)])

    # -- Endpoint

    def storages(self) -> tuple[StorageInfo, ...]:
        """See :class:`~replicator.endpoint.Endpoint`."""
        found: tuple[StorageInfo, ...] = self._call(messages.Storages())
        return found

    def storage(self, name: str) -> StorageInfo:
        """See :class:`~replicator.endpoint.Endpoint`."""
        found: StorageInfo = self._call(messages.Storage(name))
        return found

    def volumes(self, storage: str) -> tuple[VolumeInfo, ...]:
        """See :class:`~replicator.endpoint.Endpoint`."""
        found: tuple[VolumeInfo, ...] = self._call(messages.Volumes(storage))
        return found

    def state(self, volume: VolumeId) -> VolumeState | None:
        """See :class:`~replicator.endpoint.Endpoint`."""
        found: VolumeState | None = self._call(messages.State(volume))
        return found

    def states(self, volumes: Sequence[VolumeId]) -> tuple[VolumeListing, ...]:
        """See :class:`~replicator.endpoint.Endpoint`. A peer that does not know the request is asked one by one."""
        found: dict[VolumeId, VolumeListing] = {}
        wanted = tuple(dict.fromkeys(volumes))
        if wanted and not self._knows(STATES):
            return tuple(self._listed(volume) for volume in volumes)
        for start in range(0, len(wanted), MAX_VOLUMES):
            found.update(self._states(wanted[start : start + MAX_VOLUMES]))
        return tuple(found[volume] for volume in volumes)

    def _states(self, volumes: tuple[VolumeId, ...]) -> dict[VolumeId, VolumeListing]:
        with ExitStack() as stack:
            call = self._begin(messages.States(volumes), Cancellation(), stack)
            listings: list[VolumeListing] = []
            part: StatesPart = call.answer(StatesPart)
            while part.more and len(listings) < len(volumes):
                listings += (listed.listing for listed in part.listed)
                call.first = call.connection.receive(call.connection.deadlines.answer)
                part = call.answer(StatesPart)
            listings += (listed.listing for listed in part.listed)
            if part.more or tuple(listing.volume for listing in listings) != volumes:
                raise call.connection.refuse("the listing of volumes is not of those that were asked for")
            return {listing.volume: listing for listing in listings}
        raise AssertionError  # an exit stack swallows nothing

    def _listed(self, volume: VolumeId) -> VolumeListing:
        try:
            return VolumeListing(volume, self.state(volume))
        except ReplicatorError as error:
            return VolumeListing(volume, None, error)

    def heads(self, volumes: Sequence[VolumeId]) -> tuple[Head, ...]:
        """See :class:`~replicator.endpoint.Endpoint`. A peer that does not know the request can tell of none."""
        wanted = tuple(dict.fromkeys(volumes))
        if not wanted or not self._knows(STATES):
            return ()
        found: list[Head] = []
        for start in range(0, len(wanted), MAX_VOLUMES):
            found += self._call(messages.Heads(wanted[start : start + MAX_VOLUMES]))
        return tuple(head for head in found if head.volume in wanted)

    def _knows(self, feature: str) -> bool:
        """Whether the peer's hello has it."""
        connection, _ = self._pool.take()
        known = feature in connection.features
        self._pool.give(connection)
        return known

    def ensure_primary(self, volume: VolumeId) -> Lineage:
        """See :class:`~replicator.endpoint.Endpoint`."""
        found: Lineage = self._call(messages.EnsurePrimary(volume))
        return found

    def snapshot(self, request: SnapshotRequest) -> tuple[Taken, ...]:
        """See :class:`~replicator.endpoint.Endpoint`."""
        if not request.volumes:
            return ()
        answer: tuple[messages.SnapshotTaken, ...] = self._call(messages.Snapshot(request))
        if [each.volume for each in answer] != list(request.volumes):
            raise ProtocolError(
                f"node {self.node} answered with snapshots of other volumes than were asked for",
                hint="both nodes must run the same version",
            )
        return tuple(each.taken for each in answer)

    def hold(self, volume: VolumeId, version: VersionRef, tag: str) -> None:
        """See :class:`~replicator.endpoint.Endpoint`."""
        self._call(messages.Hold(volume, version, tag))

    def release(self, volume: VolumeId, version: VersionRef, tag: str) -> None:
        """See :class:`~replicator.endpoint.Endpoint`."""
        self._call(messages.Release(volume, version, tag))

    def estimate(
        self, volume: VolumeId, base: VersionRef | None, to: VersionRef, *, intermediates: bool = False
    ) -> int | None:
        """See :class:`~replicator.endpoint.Endpoint`."""
        found: int | None = self._call(messages.Estimate(volume, base, to, intermediates))
        return found

    def abort_receive(self, volume: VolumeId) -> None:
        """See :class:`~replicator.endpoint.Endpoint`."""
        self._call(messages.AbortReceive(volume))

    def set_aside(self, volume: VolumeId, name: str) -> VersionRef | None:
        """See :class:`~replicator.endpoint.Endpoint`."""
        found: VersionRef | None = self._call(messages.SetAside(volume, name))
        return found

    def adopt(self, volume: VolumeId, lineage: Lineage) -> None:
        """See :class:`~replicator.endpoint.Endpoint`."""
        self._call(messages.Adopt(volume, lineage))

    def rename(self, volume: VolumeId, new: VolumeId) -> None:
        """See :class:`~replicator.endpoint.Endpoint`."""
        self._call(messages.Rename(volume, new))

    def properties(self, volume: VolumeId) -> tuple[Property, ...]:
        """See :class:`~replicator.endpoint.Endpoint`."""
        found: tuple[Property, ...] = self._call(messages.Properties(volume))
        return found

    def prune(self, request: PruneRequest) -> tuple[PruneOutcome, ...]:
        """See :class:`~replicator.endpoint.Endpoint`."""
        found: tuple[PruneOutcome, ...] = self._call(messages.Prune(request))
        return found

    def remove(self, request: RemoveRequest) -> None:
        """See :class:`~replicator.endpoint.Endpoint`."""
        self._call(messages.Remove(request))

    def clone(self, volume: VolumeId, version: VersionRef, new: VolumeId) -> VolumeInfo:
        """See :class:`~replicator.endpoint.Endpoint`."""
        found: VolumeInfo = self._call(messages.Clone(volume, version, new))
        return found

    def scrub(self, request: ScrubRequest) -> Scrub:
        """See :class:`~replicator.endpoint.Endpoint`."""
        found: Scrub = self._call(messages.Scrub(request))
        return found

    # -- streams

    def send(self, request: SendRequest, cancel: Cancellation) -> Stream:
        """See :class:`~replicator.endpoint.Endpoint`."""
        return self._open(messages.Send(request), request.key, cancel)

    def manifest(self, request: ManifestRequest, cancel: Cancellation) -> Stream:
        """See :class:`~replicator.endpoint.Endpoint`."""
        return self._open(messages.Manifest(request), request.key, cancel)

    def _open(self, request: messages.Send | messages.Manifest, key: str, cancel: Cancellation) -> Stream:
        cancel.check()
        with ExitStack() as stack:
            call = self._begin(request, cancel, stack)
            opened: StreamOpened = call.answer(StreamOpened)
            binding = StreamBinding(bytes.fromhex(key), "pull", opened.kind, call.raw)
            receiver = StreamReceiver(call.connection, call.stream, binding)
            return _RemoteStream(opened, receiver, stack.pop_all())
        raise AssertionError  # an exit stack swallows nothing

    def digests(self, request: DigestRequest, cancel: Cancellation) -> Iterator[DigestBatch]:
        """See :class:`~replicator.endpoint.Endpoint`."""
        cancel.check()
        with ExitStack() as stack:
            call = self._begin(messages.Digests(request), cancel, stack)
            opened: StreamOpened = call.answer(StreamOpened)
            binding = StreamBinding(bytes.fromhex(request.key), "pull", opened.kind, call.raw)
            receiver = StreamReceiver(call.connection, call.stream, binding)
            yield from receiver.digests(request.block_size, request.offset)

    def receive(self, request: ReceiveRequest, stream: Stream, cancel: Cancellation) -> Version:
        """See :class:`~replicator.endpoint.Endpoint`."""
        cancel.check()
        with ExitStack() as stack:
            call = self._begin(messages.Receive(request, stream.estimate), cancel, stack)
            if call.first.type is FrameType.RESPONSE:  # the stream is wanted
                call.answer(StreamOpened)
                binding = StreamBinding(bytes.fromhex(request.key), "push", request.kind, call.raw)
                compressor = AdaptiveCompressor(rate_limit=self._rate_limit()) if self._compress else None
                StreamSender(call.connection, call.stream, binding, compressor).send_all(stream)
                call.first = call.connection.receive(call.connection.deadlines.answer)
            if call.first.type is not FrameType.COMMITTED or call.first.stream != call.stream:
                raise call.connection.unexpected(call.first)
            committed: Version = messages.decode_answer(Version, bytes(call.first.payload))
            return committed
        raise AssertionError  # an exit stack swallows nothing

    # -- the cluster's own requests

    def crl(self) -> bytes:
        """The newest revocation list that the peer knows; PEM, empty for none."""
        text: str = self._call(messages.GetCrl())
        return text.encode()

    def renew(self, csr_pem: bytes) -> bytes:
        """A new certificate for this node, from the peer that has the CA; PEM.

        :raises IdentityError: the peer does not have the CA
        """
        text: str = self._call(messages.Renew(csr_pem.decode()))
        return text.encode()

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()


class _RemoteStream(ChunkStream):
    """A stream that comes from a peer. Reaching its end gives the connection back; leaving it before ends that."""

    def __init__(self, opened: StreamOpened, receiver: StreamReceiver, borrowed: ExitStack) -> None:
        super().__init__(
            opened.kind, receiver.chunks(opened.kind, self._count), estimate=opened.estimate, on_close=self._give_back
        )
        self._receiver = receiver
        self._borrowed = borrowed

    def _count(self, size: int) -> None:
        self.wire_bytes += size

    def _give_back(self) -> None:
        if self._receiver.ended:
            self._borrowed.close()
        else:
            left = GeneratorExit()
            self._borrowed.__exit__(GeneratorExit, left, None)
